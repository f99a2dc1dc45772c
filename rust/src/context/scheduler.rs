//! The loop: hear, choose, run, tell.
//!
//! The scheduler owns the only thread that talks to llama.cpp. It never waits for Python: commands
//! come in through one channel, events leave through another, one list per step.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use super::Shared;
use super::message::{Command, Event, Outbox};
use super::runner::{Limits, Outcome, Row, Runner};
use super::sequence::{Ending, Sequence};
use super::slots::{Slots, common_prefix};
use crate::error::Error;
use crate::log;

/// Steps with at least this many prompt tokens take long enough to be worth interrupting.
const LONG_STEP: usize = 32;

/// A copy between slots costs about as much as computing so many tokens.
const WORTH_COPYING: usize = 32;

pub struct Scheduler<R: Runner> {
    runner: R,
    limits: Limits,
    end_tokens: Vec<i32>,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    /// One queue for each priority, highest first.
    waiting: [VecDeque<Sequence>; 3],
    running: Vec<Sequence>,
    slots: Slots,
    batch: Vec<Row>,
    events: Vec<(Arc<Outbox>, Event)>,
    /// The memory was too small for everyone: nobody is admitted until somebody has ended.
    is_crowded: bool,
    panics: bool,
}

impl<R: Runner> Scheduler<R> {
    pub fn new(runner: R, commands: Receiver<Command>, shared: Arc<Shared>) -> Scheduler<R> {
        let limits = runner.limits();
        Scheduler {
            end_tokens: runner.end_tokens(),
            runner,
            limits,
            commands,
            shared,
            waiting: Default::default(),
            running: Vec::new(),
            slots: Slots::new(limits.n_slots),
            batch: Vec::with_capacity(limits.n_batch),
            events: Vec::new(),
            is_crowded: false,
            panics: false,
        }
    }

    pub fn run(mut self) {
        // Also a panic while recovering from one ends in a goodbye, not in readers that wait for ever.
        if catch_unwind(AssertUnwindSafe(|| self.live())).is_err() {
            log::note(log::Level::Error, "the engine could not recover; its context is closed");
        }
        self.say_goodbye();
    }

    fn live(&mut self) {
        while self.hear() {
            if catch_unwind(AssertUnwindSafe(|| self.step())).is_err() {
                self.recover();
            }
            self.tell();
        }
    }

    /// Takes what has been asked; sleeps only when there is nothing to do. False means: close.
    fn hear(&mut self) -> bool {
        let is_idle = self.running.is_empty() && self.waiting.iter().all(VecDeque::is_empty);
        let mut first = if is_idle { self.commands.recv().ok() } else { None };
        if is_idle && first.is_none() {
            return false;
        }
        loop {
            match first.take().map_or_else(|| self.commands.try_recv(), Ok) {
                Ok(Command::Add(request)) => {
                    let sequence = Sequence::new(request, self.limits.n_ctx);
                    self.waiting[sequence.priority as usize].push_back(sequence);
                }
                Ok(Command::Abort(id)) => self.abort(id),
                Ok(Command::Panic) => self.panics = true,
                Ok(Command::Close) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn step(&mut self) {
        self.end_overdue();
        self.admit();
        self.choose();
        if self.batch.is_empty() {
            return;
        }
        self.tell(); // who was cancelled does not wait for a step of others
        assert!(!std::mem::take(&mut self.panics), "asked to panic");
        self.shared.begin_step(&self.running_ids_of_a_long_step());
        let outcome = self.runner.run(&self.batch);
        self.shared.end_step();
        match outcome {
            Outcome::Done => self.advance(),
            Outcome::Aborted => self.resynchronize(),
            Outcome::NoRoom => self.make_room(),
            Outcome::Failed(what) => self.fail_running(&Error::internal(what)),
        }
    }

    fn abort(&mut self, id: u64) {
        for queue in &mut self.waiting {
            if let Some(at) = queue.iter().position(|sequence| sequence.id == id) {
                if let Some(sequence) = queue.remove(at) {
                    self.shared.left_queue();
                    self.end(sequence, Ending::Cancelled);
                }
                return;
            }
        }
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            let sequence = self.running.remove(at);
            self.end(sequence, Ending::Cancelled);
        }
    }

    fn end_overdue(&mut self) {
        let now = Instant::now();
        for queue in &mut self.waiting {
            let (overdue, kept): (VecDeque<_>, _) =
                std::mem::take(queue).into_iter().partition(|sequence| sequence.is_overdue(now));
            *queue = kept;
            for mut sequence in overdue {
                self.shared.left_queue();
                let error = sequence.timeout_error();
                let event = sequence.end(Ending::Failed(error), now);
                self.events.push((sequence.outbox().clone(), event));
            }
        }
        while let Some(at) = self.running.iter().position(|sequence| sequence.is_overdue(now)) {
            let sequence = self.running.remove(at);
            let error = sequence.timeout_error();
            self.end(sequence, Ending::Failed(error));
        }
    }

    /// From the queues into free slots, higher priorities first.
    fn admit(&mut self) {
        if self.is_crowded && !self.running.is_empty() {
            return;
        }
        self.is_crowded = false;
        let now = Instant::now();
        while let Some(queue) = self.waiting.iter_mut().find(|queue| !queue.is_empty()) {
            let first = queue.front().expect("it is not empty");
            if first.wants_nothing() {
                let sequence = queue.pop_front().expect("just looked at it");
                self.shared.left_queue();
                self.end(sequence, Ending::Length);
                continue;
            }
            if self.runner.can_copy() && is_under_way(&first.tokens, &self.running, &self.slots) {
                return;
            }
            let Some((slot, cached)) = self.slots.try_reserve(&first.tokens) else { return };
            let mut sequence = queue.pop_front().expect("just looked at it");
            self.shared.left_queue();
            sequence.start(slot, cached, now);
            self.running.push(sequence); // before the runner is called: a panic there must find it
            let cached = self.prepare(slot, cached);
            let sequence = self.running.last_mut().expect("just pushed");
            sequence.start(slot, cached, now);
            self.shared.count_prompt(sequence.tokens.len(), cached);
        }
    }

    /// Makes the slot hold as much of the youngest request's beginning as any slot does, and nothing
    /// else; says how much that is.
    fn prepare(&mut self, slot: usize, cached: usize) -> usize {
        let tokens = &self.running.last().expect("just pushed").tokens;
        let mut kept = cached;
        if self.runner.can_copy()
            && let Some((source, shared)) = self.slots.find_shared(tokens, cached + WORTH_COPYING)
        {
            kept = if self.runner.copy(source, slot) { shared } else { 0 };
        }
        if !self.runner.forget(slot, kept) {
            self.runner.forget(slot, 0); // this kind of memory keeps a sequence whole or not at all
            kept = 0;
        }
        let held = self.running.last().expect("just pushed").tokens[..kept].to_vec();
        self.slots.hold(slot, &held);
        kept
    }

    /// One token for everyone who is generating, then prompt chunks up to the step's budget.
    fn choose(&mut self) {
        self.batch.clear();
        let (ready, prompts): (Vec<_>, Vec<_>) =
            self.running.iter().partition(|sequence| sequence.remaining() == 1);
        for sequence in ready.into_iter().chain(prompts) {
            let room = self.limits.n_batch - self.batch.len();
            let end = sequence.tokens.len().min(sequence.computed + room);
            let slot = sequence.slot.expect("running sequences have slots");
            let rows = (sequence.computed..end).map(|position| Row {
                token: sequence.tokens[position],
                position,
                slot,
                wants_logits: position + 1 == sequence.tokens.len(),
            });
            self.batch.extend(rows);
        }
        // Only sequences in ascending order are computed together; others cost a pass each.
        self.batch.sort_by_key(|row| row.slot);
    }

    fn running_ids_of_a_long_step(&self) -> Vec<u64> {
        let num_prompt = self.batch.iter().filter(|row| !row.wants_logits).count();
        if num_prompt < LONG_STEP {
            return Vec::new();
        }
        self.running.iter().map(|sequence| sequence.id).collect()
    }

    /// The batch was computed: sample where logits were wanted.
    fn advance(&mut self) {
        let now = Instant::now();
        let mut ended = Vec::new();
        for (index, sequence) in self.running.iter_mut().enumerate() {
            let slot = sequence.slot.expect("running sequences have slots");
            let mut rows = self.batch.iter().enumerate().filter(|(_, row)| row.slot == slot);
            let computed = rows.clone().count();
            sequence.computed += computed;
            let Some((row, _)) = rows.find(|(_, row)| row.wants_logits) else { continue };
            if sequence.num_generated() == 0 {
                self.slots.hold(slot, &sequence.tokens); // others may begin with the same prompt
            }
            let logits = match self.runner.logits(row) {
                Ok(logits) => logits,
                Err(error) => {
                    ended.push((index, Ending::Failed(error)));
                    continue;
                }
            };
            match sequence.advance(logits, &self.end_tokens, &self.runner, now) {
                Some(ending) => ended.push((index, ending)),
                None => {
                    let news = sequence.take_news();
                    self.events.extend(news.map(|event| (sequence.outbox().clone(), event)));
                }
            }
            self.shared.count_generated();
        }
        self.shared.count_step();
        for (index, ending) in ended.into_iter().rev() {
            let sequence = self.running.remove(index);
            self.end(sequence, ending);
        }
    }

    /// An interrupted decode may have computed a part: every sequence of the batch goes back to
    /// where it was before.
    fn resynchronize(&mut self) {
        for sequence in &mut self.running {
            let slot = sequence.slot.expect("running sequences have slots");
            if self.batch.iter().any(|row| row.slot == slot)
                && !self.runner.forget(slot, sequence.computed)
            {
                self.runner.forget(slot, 0);
                self.slots.hold(slot, &[]);
                sequence.computed = 0;
            }
        }
    }

    /// First what only might be useful again goes, then the youngest request waits once more.
    fn make_room(&mut self) {
        let idle = self.slots.forget_idle();
        if !idle.is_empty() {
            for slot in idle {
                self.runner.forget(slot, 0);
            }
            return;
        }
        let is_alone = self.running.len() == 1;
        let Some(slot) = self.running.last().and_then(|youngest| youngest.slot) else { return };
        if !is_alone {
            self.runner.forget(slot, 0);
        }
        let Some(mut youngest) = self.running.pop() else { return };
        if is_alone {
            let required = youngest.tokens.len() as u64;
            let error = Error::ContextLimitExceeded { max: self.limits.n_ctx as u32, required };
            self.end(youngest, Ending::Failed(error));
            return;
        }
        self.slots.release(slot, &[]);
        youngest.stop();
        self.is_crowded = true;
        self.shared.entered_queue();
        self.waiting[youngest.priority as usize].push_front(youngest);
    }

    /// llama.cpp could not compute the batch; what lies in its memory is not to be trusted.
    fn fail_running(&mut self, error: &Error) {
        for mut sequence in std::mem::take(&mut self.running) {
            sequence.computed = 0;
            self.end(sequence, Ending::Failed(error.clone()));
        }
        self.slots.forget_all();
        self.runner.forget_all();
    }

    /// A panic of ours: those who were running hear of it, everybody else goes on.
    fn recover(&mut self) {
        log::note(log::Level::Error, "a step panicked; its requests were ended");
        self.shared.end_step();
        self.fail_running(&Error::internal("the engine's step panicked"));
    }

    /// The one place where a sequence ends: its slot is free before its last event leaves.
    fn end(&mut self, mut sequence: Sequence, ending: Ending) {
        if let Some(slot) = sequence.slot {
            self.is_crowded = false;
            let computed = sequence.computed.min(sequence.tokens.len());
            self.slots.release(slot, &sequence.tokens[..computed]);
        }
        let event = sequence.end(ending, Instant::now());
        self.events.push((sequence.outbox().clone(), event));
    }

    /// One wake-up of each reader for all events of the step.
    fn tell(&mut self) {
        self.shared.running.store(self.running.len(), Ordering::Relaxed);
        let own = &self.shared.outbox;
        let (common, alone): (Vec<_>, Vec<_>) =
            self.events.drain(..).partition(|(outbox, _)| Arc::ptr_eq(outbox, own));
        if !common.is_empty() {
            own.post(common.into_iter().map(|(_, event)| event));
        }
        for (outbox, event) in alone {
            outbox.post([event]);
        }
    }

    /// Every request gets a last event, also those that we could not finish.
    fn say_goodbye(&mut self) {
        let error = Error::ModelNotLoaded { what: "the model (it was unloaded meanwhile)".into() };
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Add(request) = command {
                let sequence = Sequence::new(request, self.limits.n_ctx);
                self.waiting[sequence.priority as usize].push_back(sequence);
            }
        }
        let waiting = self.waiting.iter_mut().flat_map(std::mem::take).collect::<Vec<_>>();
        waiting.iter().for_each(|_| self.shared.left_queue());
        for sequence in std::mem::take(&mut self.running).into_iter().chain(waiting) {
            self.end(sequence, Ending::Failed(error.clone()));
        }
        self.tell();
    }
}

/// Whether somebody is just computing much of what this prompt begins with: then it is cheaper to
/// wait and share it.
fn is_under_way(prompt: &[i32], running: &[Sequence], slots: &Slots) -> bool {
    let prefills = running.iter().filter(|sequence| sequence.num_generated() == 0);
    let promised = prefills.map(|sequence| common_prefix(&sequence.tokens, prompt)).max();
    let promised = promised.unwrap_or(0).min(prompt.len() - 1);
    promised > WORTH_COPYING && slots.find_shared(prompt, promised - WORTH_COPYING).is_none()
}
