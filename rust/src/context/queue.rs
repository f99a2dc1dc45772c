//! Who waits for a slot, and who gets the next one.

use std::collections::VecDeque;
use std::time::Instant;

use super::sequence::Sequence;

/// A class that was passed over so often has the next slot, whoever else waits.
const PATIENCE: u32 = 8;

/// Of each class so many are looked at: more may wait, and they are looked at before each step.
const IN_SIGHT: usize = 32;

/// First come, first served within a priority; higher priorities first, but not for ever.
#[derive(Default)]
pub struct Queue {
    classes: [Class; 3],
}

#[derive(Default)]
struct Class {
    sequences: VecDeque<Sequence>,
    /// How many of higher classes have been served while somebody waited here.
    passed_over: u32,
}

impl Queue {
    pub fn push(&mut self, sequence: Sequence) {
        self.class_of(&sequence).sequences.push_back(sequence);
    }

    /// It has been running already.
    pub fn push_front(&mut self, sequence: Sequence) {
        self.class_of(&sequence).sequences.push_front(sequence);
    }

    /// Whose turn it is, among those who may go.
    pub fn next(&self, may_go: impl Fn(&Sequence) -> bool) -> Option<&Sequence> {
        self.order().find_map(|class| {
            self.classes[class].sequences.iter().take(IN_SIGHT).find(|sequence| may_go(sequence))
        })
    }

    /// Takes it out, as the one whose turn it was.
    pub fn take(&mut self, id: u64) -> Option<Sequence> {
        let number = self.classes.iter().position(|class| class.place_of(id).is_some())?;
        for class in &mut self.classes[number + 1..] {
            class.passed_over += u32::from(!class.sequences.is_empty());
        }
        let class = &mut self.classes[number];
        let is_due = class.passed_over >= PATIENCE;
        class.passed_over = 0;
        let mut sequence = class.sequences.remove(class.place_of(id)?)?;
        sequence.keeps_its_slot |= is_due;
        Some(sequence)
    }

    pub fn remove(&mut self, id: u64) -> Option<Sequence> {
        self.classes.iter_mut().find_map(|class| {
            let at = class.place_of(id)?;
            class.sequences.remove(at)
        })
    }

    /// Takes those whose time is over.
    pub fn remove_overdue(&mut self, now: Instant) -> Vec<Sequence> {
        let mut overdue = Vec::new();
        for class in &mut self.classes {
            if class.sequences.iter().any(|sequence| sequence.is_overdue(now)) {
                let (late, kept): (VecDeque<_>, _) = std::mem::take(&mut class.sequences)
                    .into_iter()
                    .partition(|sequence| sequence.is_overdue(now));
                class.sequences = kept;
                overdue.extend(late);
            }
        }
        overdue
    }

    pub fn drain(&mut self) -> Vec<Sequence> {
        self.classes.iter_mut().flat_map(|class| class.sequences.drain(..)).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.classes.iter().all(|class| class.sequences.is_empty())
    }

    /// The classes, the one first that was passed over for too long.
    fn order(&self) -> impl Iterator<Item = usize> {
        let is_due = |&class: &usize| {
            let Class { sequences, passed_over } = &self.classes[class];
            !sequences.is_empty() && *passed_over >= PATIENCE
        };
        let due = (0..3).rev().find(is_due);
        due.into_iter().chain((0..3).filter(move |class| Some(*class) != due))
    }

    fn class_of(&mut self, sequence: &Sequence) -> &mut Class {
        &mut self.classes[sequence.priority as usize]
    }
}

impl Class {
    fn place_of(&self, id: u64) -> Option<usize> {
        self.sequences.iter().position(|sequence| sequence.id == id)
    }
}
