//! Which llama.cpp sequence holds which tokens: find a prefix, reserve, release, forget.

use std::cmp::Reverse;

/// A slot is one llama.cpp sequence id, and the tokens whose keys and values lie in it. There may be
/// more behind them, which nobody knows and the next user removes.
///
/// What a finished request left behind stays, so that the next one with the same beginning
/// (a conversation's next turn) computes only what is new.
#[derive(Debug, Default, Clone)]
pub struct Slot {
    pub tokens: Vec<i32>,
    pub busy: bool,
    /// When it was released: the one that has been idle longest is overwritten first.
    released: u64,
}

#[derive(Debug)]
pub struct Slots {
    slots: Vec<Slot>,
    releases: u64,
}

impl Slots {
    pub fn new(count: usize) -> Slots {
        Slots { slots: vec![Slot::default(); count], releases: 0 }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub fn num_busy(&self) -> usize {
        self.slots.iter().filter(|slot| slot.busy).count()
    }

    /// The free slot that shares the longest beginning with `prompt`, and how long that is.
    ///
    /// The last prompt token never counts: llama.cpp gives logits only for what it decodes. What the
    /// slot holds beyond the beginning is still there, until `hold` says otherwise.
    pub fn try_reserve(&mut self, prompt: &[i32]) -> Option<(usize, usize)> {
        let usable = &prompt[..prompt.len().saturating_sub(1)];
        let free = self.slots.iter().enumerate().filter(|(_, slot)| !slot.busy);
        let shared = free.map(|(index, slot)| (index, common_prefix(&slot.tokens, usable), slot));
        // Among slots that share nothing, an empty or long idle one; a short accidental overlap
        // (one begin-of-text token) is no reason to overwrite somebody's long conversation. The lowest
        // of equals: llama.cpp computes ids without gaps in one pass over the weights.
        let (index, cached, _) = shared.max_by_key(|(index, cached, slot)| {
            let worth = if *cached * 2 >= slot.tokens.len() { *cached } else { 0 };
            (worth, slot.tokens.is_empty(), Reverse(slot.released), Reverse(*index))
        })?;
        self.slots[index].busy = true;
        Some((index, cached))
    }

    pub fn is_full(&self) -> bool {
        self.slots.iter().all(|slot| slot.busy)
    }

    /// What lies in the slot. Somebody who generates holds more than is said here.
    pub fn tokens(&self, index: usize) -> &[i32] {
        &self.slots[index].tokens
    }

    /// Whether another slot begins with all that this one holds.
    pub fn is_held_elsewhere(&self, index: usize) -> bool {
        let mut others = self.slots.iter().enumerate().filter(|(other, _)| *other != index);
        others.any(|(_, other)| other.tokens.starts_with(&self.slots[index].tokens))
    }

    /// The first free slot after `first` and before `last`.
    pub fn free_between(&self, first: usize, last: usize) -> Option<usize> {
        (first + 1..last).find(|&index| !self.slots[index].busy)
    }

    /// Somebody who was in another slot goes on here.
    pub fn occupy(&mut self, index: usize, tokens: &[i32]) {
        self.slots[index].busy = true;
        self.hold(index, tokens);
    }

    /// A slot that shares more than `more_than` tokens of the prompt's beginning, and how many.
    pub fn find_shared(&self, prompt: &[i32], more_than: usize) -> Option<(usize, usize)> {
        let usable = &prompt[..prompt.len().saturating_sub(1)];
        let shared = self.slots.iter().map(|slot| common_prefix(&slot.tokens, usable)).enumerate();
        shared.filter(|(_, shared)| *shared > more_than).max_by_key(|(_, shared)| *shared)
    }

    /// Whether a slot beside that one shares more than `more_than` tokens of the prompt's beginning.
    pub fn is_shared_beside(&self, one: Option<usize>, prompt: &[i32], more_than: usize) -> bool {
        let mut others = self.slots.iter().enumerate().filter(|(index, _)| Some(*index) != one);
        others.any(|(_, slot)| common_prefix(&slot.tokens, prompt) > more_than)
    }

    /// As `find_shared`, with the last token; where a busy slot may be copied, that is no hindrance.
    pub fn find_exportable(&self, tokens: &[i32], also_busy: bool) -> Option<(usize, usize)> {
        let slots = self.slots.iter().enumerate().filter(|(_, slot)| also_busy || !slot.busy);
        let shared = slots.map(|(index, slot)| (index, common_prefix(&slot.tokens, tokens)));
        shared.filter(|(_, shared)| *shared > 0).max_by_key(|(_, shared)| *shared)
    }

    /// What a busy slot holds by now, for others to share.
    pub fn hold(&mut self, index: usize, tokens: &[i32]) {
        let held = &mut self.slots[index].tokens;
        held.clear();
        held.extend_from_slice(tokens);
    }

    /// `tokens` are those whose keys and values now lie in the slot.
    pub fn release(&mut self, index: usize, tokens: &[i32]) {
        self.releases += 1;
        let slot = &mut self.slots[index];
        slot.busy = false;
        slot.released = self.releases;
        self.hold(index, tokens);
    }

    /// Free slots that still hold something; nothing is remembered of them afterwards.
    pub fn forget_idle(&mut self) -> Vec<usize> {
        let idle = |slot: &Slot| !slot.busy && !slot.tokens.is_empty();
        let indices: Vec<usize> =
            self.slots.iter().enumerate().filter_map(|(i, slot)| idle(slot).then_some(i)).collect();
        for &index in &indices {
            self.slots[index].tokens.clear();
        }
        indices
    }

    pub fn forget_all(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.tokens.clear());
    }
}

pub fn common_prefix(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}
