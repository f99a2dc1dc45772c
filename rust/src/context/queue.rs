//! Who waits for a slot, and who gets the next one.

use std::collections::VecDeque;
use std::time::Instant;

use super::sequence::Sequence;

/// A class that was passed over so often has the next slot, whoever else waits.
const PATIENCE: u32 = 8;

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

    /// The one that `pop` gives.
    pub fn next(&self) -> Option<&Sequence> {
        self.classes[self.next_class()?].sequences.front()
    }

    pub fn pop(&mut self) -> Option<Sequence> {
        let next = self.next_class()?;
        for class in &mut self.classes[next + 1..] {
            class.passed_over += u32::from(!class.sequences.is_empty());
        }
        let class = &mut self.classes[next];
        let is_due = class.passed_over >= PATIENCE;
        class.passed_over = 0;
        let mut sequence = class.sequences.pop_front()?;
        sequence.keeps_its_slot |= is_due;
        Some(sequence)
    }

    pub fn remove(&mut self, id: u64) -> Option<Sequence> {
        self.classes.iter_mut().find_map(|class| {
            let at = class.sequences.iter().position(|sequence| sequence.id == id)?;
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
        self.next_class().is_none()
    }

    fn next_class(&self) -> Option<usize> {
        let waits = |&class: &usize| !self.classes[class].sequences.is_empty();
        let is_due = |&class: &usize| self.classes[class].passed_over >= PATIENCE;
        let due = (0..3).rev().filter(waits).find(is_due);
        due.or_else(|| (0..3).find(waits))
    }

    fn class_of(&mut self, sequence: &Sequence) -> &mut Class {
        &mut self.classes[sequence.priority as usize]
    }
}
