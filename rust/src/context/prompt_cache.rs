//! What slots held and lost, kept in main memory: copying it back is cheaper than computing it.

use super::slots::common_prefix;

/// States of sequences by their tokens. The one that was of no use for longest goes first; pinned
/// ones stay.
pub struct PromptCache {
    entries: Vec<Entry>,
    capacity: usize,
    uses: u64,
}

struct Entry {
    tokens: Vec<i32>,
    state: Vec<u8>,
    last_use: u64,
    /// The request that asked for it to stay.
    pin: Option<u64>,
}

impl PromptCache {
    /// `capacity` is in bytes; 0 keeps nothing.
    pub fn new(capacity: usize) -> PromptCache {
        PromptCache { entries: Vec::new(), capacity, uses: 0 }
    }

    /// The state that shares the longest beginning with `prompt`, longer than `more_than`, and how
    /// long that is. States that cannot be cut must be a beginning as a whole.
    pub fn find(
        &mut self,
        prompt: &[i32],
        more_than: usize,
        can_cut: bool,
    ) -> Option<(&[u8], usize)> {
        let shared = self.entries.iter().map(|entry| {
            let shared = common_prefix(&entry.tokens, prompt);
            if can_cut || shared == entry.tokens.len() { shared } else { 0 }
        });
        let (index, shared) = shared.enumerate().max_by_key(|(_, shared)| *shared)?;
        if shared <= more_than {
            return None;
        }
        self.uses += 1;
        let entry = &mut self.entries[index];
        entry.last_use = self.uses;
        Some((&entry.state, shared))
    }

    /// Whether some state holds all of these tokens.
    pub fn holds(&self, tokens: &[i32]) -> bool {
        self.entries.iter().any(|entry| entry.tokens.starts_with(tokens))
    }

    /// Whether so many bytes could be kept, if everything that may go went.
    pub fn could_keep(&self, bytes: usize) -> bool {
        bytes <= self.room_without_pins()
    }

    pub fn room_without_pins(&self) -> usize {
        let pinned = self.entries.iter().filter(|entry| entry.pin.is_some());
        self.capacity.saturating_sub(pinned.map(Entry::bytes).sum())
    }

    /// Keeps a state, if there can be room for it; what it continues is not needed any more.
    pub fn insert(&mut self, tokens: Vec<i32>, state: Vec<u8>, pin: Option<u64>) -> bool {
        if !self.could_keep(state.len()) {
            return false;
        }
        self.entries.retain(|entry| entry.pin.is_some() || !tokens.starts_with(&entry.tokens));
        while self.bytes() + state.len() > self.capacity {
            let oldest = self.entries.iter().enumerate().filter(|(_, entry)| entry.pin.is_none());
            let oldest = oldest.min_by_key(|(_, entry)| entry.last_use);
            let Some((index, _)) = oldest else { return false };
            self.entries.swap_remove(index);
        }
        self.uses += 1;
        self.entries.push(Entry { tokens, state, last_use: self.uses, pin });
        true
    }

    /// From now on it may go like any other.
    pub fn unpin(&mut self, id: u64) {
        let pinned = self.entries.iter_mut().filter(|entry| entry.pin == Some(id));
        pinned.for_each(|entry| entry.pin = None);
    }

    pub fn forget_unpinned(&mut self) {
        self.entries.retain(|entry| entry.pin.is_some());
    }

    pub fn bytes(&self) -> usize {
        self.entries.iter().map(Entry::bytes).sum()
    }
}

impl Entry {
    fn bytes(&self) -> usize {
        self.state.len()
    }
}
