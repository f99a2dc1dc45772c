//! From the queue into a slot, and out of it again before the end.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::lock;
use super::metrics::{SlotView, add};
use super::runner::Runner;
use super::scheduler::Scheduler;
use super::sequence::{Ending, Sequence};
use super::slots::{Slots, common_prefix};
use crate::config::Priority;
use crate::error::Error;

/// A copy between slots costs about as much as computing so many tokens.
pub const WORTH_COPYING: usize = 32;

/// A gap between slots is closed when it has been there for so many steps: many close by themselves.
const LASTING: u32 = 4;

impl<R: Runner> Scheduler<R> {
    /// As many as there are free slots for.
    pub fn admit(&mut self) {
        if self.is_crowded && !self.running.is_empty() {
            return;
        }
        self.is_crowded = false;
        let now = Instant::now();
        while let Some(next) = self.waiting.next(|sequence| self.may_begin(sequence)) {
            let (id, priority, wants_nothing) = (next.id, next.priority, next.wants_nothing());
            if !wants_nothing && self.slots.is_full() && !self.make_way(priority) {
                return;
            }
            let mut sequence = self.waiting.take(id).expect("just looked at it");
            self.shared.left_queue();
            if wants_nothing {
                self.end(sequence, Ending::Length);
                continue;
            }
            let (slot, cached) = self.slots.try_reserve(&sequence.tokens).expect("one is free");
            sequence.start(slot, now);
            self.running.push(sequence); // before the runner is called: a panic there must find it
            let cached = self.prepare(slot, cached);
            let sequence = self.running.last_mut().expect("just pushed");
            if sequence.found(cached) {
                self.shared.count_prompt(sequence.tokens.len(), cached);
            }
        }
    }

    /// Whoever can soon share what another one is just computing lets others go first meanwhile.
    fn may_begin(&self, sequence: &Sequence) -> bool {
        sequence.wants_nothing()
            || !self.runner.can_copy()
            || !is_under_way(sequence, &self.running, &self.slots)
    }

    /// Makes the slot hold as much of the youngest request's beginning as is known anywhere, and
    /// nothing else; says how much that is.
    fn prepare(&mut self, slot: usize, cached: usize) -> usize {
        let tokens = self.running.last().expect("just pushed").tokens.clone();
        let usable = &tokens[..tokens.len() - 1];
        let can_cut = self.runner.can_cut_states();
        self.cache.find(usable, cached, can_cut); // it counts as used before anything has to go for others
        self.keep_what_goes(slot, cached);
        let other = match self.runner.can_copy() {
            true => self.slots.find_shared(&tokens, cached + WORTH_COPYING),
            false => None,
        };
        let best = other.map_or(cached + WORTH_COPYING, |(_, shared)| shared);
        let mut kept = cached;
        if let Some((state, shared)) = self.cache.find(usable, best, can_cut) {
            kept = if self.runner.restore(slot, state) { shared } else { 0 };
        } else if let Some((source, shared)) = other {
            kept = if self.runner.copy(source, slot) { shared } else { 0 };
        }
        if !self.runner.forget(slot, kept) {
            self.runner.forget(slot, 0); // this kind of memory keeps a sequence whole or not at all
            kept = 0;
        }
        self.slots.hold(slot, &tokens[..kept]);
        kept
    }

    /// What the slot holds beyond `kept` is about to be overwritten: it goes to the prompt cache, unless
    /// another slot holds it as well.
    fn keep_what_goes(&mut self, slot: usize, kept: usize) {
        let held = self.slots.tokens(slot);
        let is_worth_it = held.len() >= kept + WORTH_COPYING;
        if !is_worth_it || self.slots.is_held_elsewhere(slot) || self.cache.holds(held) {
            return;
        }
        // Nothing else may be behind it: some kinds of memory are saved from their end.
        if !self.runner.forget(slot, held.len()) {
            return;
        }
        if self.cache.could_keep(self.runner.state_size(slot))
            && let Some(state) = self.runner.save(slot)
        {
            let held = self.slots.tokens(slot).to_vec();
            self.cache.insert(held, state, None);
        }
    }

    /// Takes a slot from somebody of low priority for one who waits and is more urgent.
    fn make_way(&mut self, for_whom: Priority) -> bool {
        if for_whom == Priority::Low {
            return false;
        }
        let gives_way = |s: &Sequence| s.priority == Priority::Low && !s.keeps_its_slot;
        let Some(youngest) = self.running.iter().rposition(gives_way) else { return false };
        self.preempt(youngest);
        true
    }

    /// Back to the queue. What was computed stays in the slot until somebody else needs it.
    ///
    /// The runner is not called here: a panic would lose who is in nobody's list.
    fn preempt(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        let slot = sequence.slot.expect("running sequences have slots");
        self.slots.release(slot, sequence.reusable());
        sequence.stop();
        add(&self.shared.meter.preemptions, 1);
        self.shared.entered_queue();
        self.waiting.push_front(sequence);
    }

    /// The memory has no room: first what only might be useful again goes, then the youngest of the
    /// least urgent waits once more.
    pub fn make_room(&mut self) {
        let idle = self.slots.forget_idle();
        if !idle.is_empty() {
            for slot in idle {
                self.runner.forget(slot, 0);
            }
            return;
        }
        let index = (0..self.running.len()).max_by_key(|&index| self.running[index].priority);
        let Some(index) = index else { return };
        if self.running.len() == 1 {
            let sequence = self.running.remove(index);
            let required = sequence.tokens.len() as u64;
            let max = self.limits.n_ctx as u32;
            self.end(sequence, Ending::Failed(Error::ContextLimitExceeded { max, required }));
            return;
        }
        let slot = self.running[index].slot.expect("running sequences have slots");
        self.preempt(index);
        self.runner.forget(slot, 0);
        self.slots.hold(slot, &[]);
        self.is_crowded = true;
    }

    /// llama.cpp computes the rows of slots without gaps in one pass over the weights; each gap costs
    /// another one per step. So the last one moves into the first gap, if nobody is about to come.
    pub fn close_gap(&mut self) {
        let slots = || self.running.iter().filter_map(|sequence| sequence.slot);
        let (Some(first), Some(last)) = (slots().min(), slots().max()) else { return };
        let is_dense = last - first + 1 == self.running.len();
        if is_dense || !self.waiting.is_empty() || !self.runner.can_copy() {
            self.steps_with_gap = 0;
            return;
        }
        self.steps_with_gap += 1;
        let Some(gap) = self.slots.free_between(first, last) else { return };
        let mover = self.running.iter().position(|s| s.slot == Some(last)).expect("just seen");
        if self.steps_with_gap < LASTING || self.running[mover].remaining() > 1 {
            return;
        }
        self.keep_what_goes(gap, 0);
        if !self.runner.copy(last, gap) {
            self.slots.hold(gap, &[]);
            return;
        }
        self.steps_with_gap = 0;
        self.running[mover].slot = Some(gap);
        let held = self.slots.tokens(last).to_vec();
        self.slots.occupy(gap, &held);
        self.slots.release(last, &[]);
    }

    /// The context of this request is full: a part of it goes, or the request ends.
    pub fn shift_full(&mut self) {
        for index in (0..self.running.len()).rev() {
            let sequence = &mut self.running[index];
            let Some((keep, drop)) = sequence.next_shift() else { continue };
            let slot = sequence.slot.expect("running sequences have slots");
            let is_moved = self.runner.shift(slot, keep, drop);
            if is_moved || self.runner.forget(slot, keep) {
                sequence.shift(keep, drop, is_moved);
                let held = self.slots.tokens(slot);
                let held = held[..held.len().min(keep)].to_vec();
                self.slots.hold(slot, &held);
            } else {
                let sequence = self.running.remove(index);
                self.end(sequence, Ending::Length);
            }
        }
    }

    /// The prompt of a request that wanted nothing else is computed: it stays in the prompt cache.
    pub fn pin(&mut self, index: usize) -> Ending {
        let sequence = &self.running[index];
        let slot = sequence.slot.expect("running sequences have slots");
        let needed = self.runner.state_size(slot);
        let free = self.cache.room_without_pins();
        let refused = |what: String| {
            Ending::Failed(Error::OutOfMemory { what, needed: needed as u64, free: free as u64 })
        };
        if !self.cache.could_keep(needed) {
            return refused(format!(
                "pinning {} tokens in the prompt cache",
                sequence.tokens.len()
            ));
        }
        match self.runner.save(slot) {
            Some(state) => {
                self.cache.insert(sequence.tokens.clone(), state, Some(sequence.id));
                Ending::Length
            }
            None => Ending::Failed(Error::internal("llama.cpp did not give a sequence's state")),
        }
    }

    /// What can be seen from outside.
    pub fn note_load(&self) {
        let meter = &self.shared.meter;
        meter.running.store(self.running.len() as u64, Ordering::Relaxed);
        let held: usize = self.running.iter().map(|sequence| sequence.computed).sum();
        meter.held_tokens.store(held as u64, Ordering::Relaxed);
        meter.prompt_cache_bytes.store(self.cache.bytes() as u64, Ordering::Relaxed);
        let mut views = lock(&self.shared.slots);
        views.clear();
        views.extend((0..self.limits.n_slots).map(|slot| SlotView {
            held_tokens: self.slots.tokens(slot).len(),
            ..SlotView::default()
        }));
        for sequence in &self.running {
            views[sequence.slot.expect("running sequences have slots")] = sequence.view();
        }
    }
}

/// Whether somebody is just computing much of what this prompt begins with: then it is cheaper to
/// wait for that and share it. Not for somebody who is less urgent, who may wait himself.
fn is_under_way(sequence: &Sequence, running: &[Sequence], slots: &Slots) -> bool {
    let prompt = &sequence.tokens;
    running.iter().any(|other| {
        let promised = common_prefix(&other.tokens, prompt).min(prompt.len() - 1);
        let is_coming = other.num_generated() == 0 && other.computed < promised;
        is_coming
            && other.priority <= sequence.priority
            && promised > WORTH_COPYING
            && !slots.is_shared_beside(other.slot, prompt, promised - WORTH_COPYING)
    })
}
