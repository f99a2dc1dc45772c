//! The loop: hear, choose, run, tell.
//!
//! The scheduler owns the only thread that talks to llama.cpp. It never waits for Python: commands
//! come in through one channel, events leave through another, one list per step. In a worker most of them
//! go into its socket instead, and so it waits for a parent that does not read.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use super::message::{Command, Event, Exported, Outbox};
use super::metrics::add;
use super::prompt_cache::PromptCache;
use super::queue::Queue;
use super::runner::{Limits, Outcome, Row, Runner};
use super::sequence::{Ending, Sequence};
use super::slots::Slots;
use super::{Shared, lock};
use crate::error::Error;
use crate::log;

/// Steps with at least this many prompt tokens take long enough to be worth interrupting.
const LONG_STEP: usize = 32;

/// Prompts that are soon read go first; in one of so many steps the one that came first does.
const OLDEST_FIRST: u64 = 4;

pub struct Scheduler<R: Runner> {
    pub(super) runner: R,
    pub(super) limits: Limits,
    end_tokens: Vec<i32>,
    commands: Receiver<Command>,
    pub(super) shared: Arc<Shared>,
    pub(super) waiting: Queue,
    /// In the order of their admission.
    pub(super) running: Vec<Sequence>,
    pub(super) slots: Slots,
    pub(super) cache: PromptCache,
    batch: Vec<Row>,
    events: Vec<(Arc<Outbox>, Event)>,
    /// The memory was too small for everyone: nobody is admitted until somebody has ended.
    pub(super) is_crowded: bool,
    pub(super) steps_with_gap: u32,
    num_steps: u64,
    /// Batches in a row that were refused, or for which there was no memory.
    refusals: u32,
    panics: bool,
    hangs: bool,
}

impl<R: Runner> Scheduler<R> {
    pub fn new(
        runner: R,
        cache: PromptCache,
        commands: Receiver<Command>,
        shared: Arc<Shared>,
    ) -> Scheduler<R> {
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
            cache,
            batch: Vec::with_capacity(limits.n_batch),
            events: Vec::new(),
            is_crowded: false,
            steps_with_gap: 0,
            num_steps: 0,
            refusals: 0,
            panics: false,
            hangs: false,
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
        self.runner.begin();
        while self.hear() {
            if catch_unwind(AssertUnwindSafe(|| self.step())).is_err() {
                self.recover();
            }
            self.tell();
        }
    }

    /// Takes what has been asked; sleeps only when there is nothing to do. False means: close.
    fn hear(&mut self) -> bool {
        let is_idle = self.running.is_empty() && self.waiting.is_empty();
        self.shared.is_busy(!is_idle);
        let mut first = if is_idle { self.commands.recv().ok() } else { None };
        self.shared.is_busy(true);
        if is_idle && first.is_none() {
            return false;
        }
        loop {
            match first.take().map_or_else(|| self.commands.try_recv(), Ok) {
                Ok(Command::Add(request)) => {
                    self.waiting.push(Sequence::new(request, self.limits.n_ctx));
                }
                Ok(Command::Abort(id)) => self.abort(id),
                Ok(Command::Unpin(id)) => self.cache.unpin(id),
                Ok(Command::Export { tokens, reply }) => {
                    let _ = reply.send(self.export(&tokens));
                }
                Ok(Command::Import { exported, reply }) => {
                    let Exported { tokens, state } = exported;
                    let _ = reply.send(self.cache.insert(tokens, state, None));
                }
                Ok(Command::Panic) => self.panics = true,
                Ok(Command::Hang) => self.hangs = true,
                Ok(Command::Close) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn step(&mut self) {
        self.end_overdue();
        self.admit();
        self.close_gap();
        self.choose();
        if self.batch.is_empty() {
            return;
        }
        self.tell(); // who was cancelled does not wait for a step of others
        assert!(!std::mem::take(&mut self.panics), "asked to panic");
        if self.hangs {
            loop {
                std::thread::park();
            }
        }
        self.shared.begin_step(&self.running_ids_of_a_long_step());
        let outcome = self.runner.run(&self.batch);
        self.shared.end_step();
        let is_refused = matches!(outcome, Outcome::Refused(_) | Outcome::Exhausted);
        self.refusals = if is_refused { self.refusals + 1 } else { 0 };
        match outcome {
            Outcome::Done => self.advance(),
            Outcome::Aborted if self.runner.can_be_interrupted() => self.resynchronize(),
            Outcome::Aborted => self.begin_anew(), // it was, for everything is being closed
            Outcome::NoRoom => self.make_room(),
            Outcome::Refused(what) if self.refusals == 1 => self.compute_again(&what),
            Outcome::Refused(what) => self.fail_running(&Error::internal(what)),
            Outcome::Exhausted if self.refusals == 1 => {
                self.cache.forget_unpinned();
                self.compute_again(
                    "there was no memory for a step, and the prompt cache gave its own",
                );
            }
            Outcome::Exhausted => {
                let device = self.runner.device();
                self.fail_running(&Error::StepMemory { device });
            }
            Outcome::Failed(what) => self.fail_running(&Error::internal(what)),
        }
    }

    fn abort(&mut self, id: u64) {
        if let Some(sequence) = self.waiting.remove(id) {
            self.shared.left_queue();
            self.end(sequence, Ending::Cancelled);
        } else if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            let sequence = self.running.remove(at);
            self.end(sequence, Ending::Cancelled);
        }
    }

    fn end_overdue(&mut self) {
        let now = Instant::now();
        let mut overdue = self.waiting.remove_overdue(now);
        overdue.iter().for_each(|_| self.shared.left_queue());
        overdue.extend(self.running.extract_if(.., |sequence| sequence.is_overdue(now)));
        for sequence in overdue {
            let error = sequence.timeout_error(now);
            self.end(sequence, Ending::Failed(error));
        }
    }

    /// One token for everyone who is generating, then prompt chunks up to the step's budget.
    fn choose(&mut self) {
        self.batch.clear();
        let (ready, mut prompts): (Vec<_>, Vec<_>) =
            self.running.iter().partition(|sequence| sequence.remaining() == 1);
        for sequence in &ready {
            self.batch.push(row(sequence, sequence.computed));
        }
        let is_turn_of_oldest = self.num_steps.is_multiple_of(OLDEST_FIRST) && prompts.len() > 1;
        if !is_turn_of_oldest {
            prompts.sort_by_key(|sequence| (sequence.priority, sequence.remaining()));
        }
        for (index, sequence) in prompts.iter().enumerate() {
            // Who gets a first token in this step should not wait long for the others either, and
            // who gets one in the next step not for the oldest in this one.
            let others = ready.len() + index;
            let generating = others.max(usize::from(is_turn_of_oldest));
            let left = prompts.len() - index;
            let advised = self.runner.prompt_rows(sequence.num_to_read(), generating, left);
            let room = advised.min(self.limits.n_batch - self.batch.len());
            let count = sequence.remaining().min(room);
            let rows = sequence.computed..sequence.computed + count;
            self.batch.extend(rows.map(|position| row(sequence, position)));
            if count < sequence.remaining() {
                break; // a piece each would cost a pass over the weights each
            }
        }
        // Only sequences in ascending order are computed together; others cost a pass each.
        self.batch.sort_by_key(|row| row.slot);
    }

    fn running_ids_of_a_long_step(&self) -> Vec<u64> {
        let num_prompt = self.batch.iter().filter(|row| !row.wants_logits).count();
        if num_prompt < LONG_STEP || !self.runner.can_be_interrupted() {
            return Vec::new();
        }
        self.running.iter().map(|sequence| sequence.id).collect()
    }

    /// The batch was computed: sample where logits were wanted.
    fn advance(&mut self) {
        let now = Instant::now();
        let mut ended = Vec::new();
        for index in 0..self.running.len() {
            let sequence = &mut self.running[index];
            let slot = sequence.slot.expect("running sequences have slots");
            let first = self.batch.partition_point(|row| row.slot < slot);
            let rows = self.batch[first..].iter().take_while(|row| row.slot == slot).count();
            sequence.computed += rows;
            if rows > 0 && sequence.num_generated() == 0 {
                // Others may begin with the same prompt, or a part of it.
                self.slots.hold(slot, &sequence.tokens[..sequence.computed]);
            }
            if rows == 0 || sequence.remaining() > 0 {
                continue;
            }
            let ending = match sequence.is_pin {
                true => Some(self.pin(index)),
                false => self.generate(index, first + rows - 1, now),
            };
            ended.extend(ending.map(|ending| (index, ending)));
        }
        self.note_step();
        for (index, ending) in ended.into_iter().rev() {
            let sequence = self.running.remove(index);
            self.end(sequence, ending);
        }
        self.shift_full();
    }

    /// The next token of a request, from a row of the batch.
    fn generate(&mut self, index: usize, row: usize, now: Instant) -> Option<Ending> {
        let sequence = &mut self.running[index];
        let logits = match self.runner.logits(row) {
            Ok(logits) => logits,
            Err(error) => return Some(Ending::Failed(error)),
        };
        let before = sequence.num_generated();
        let ending = sequence.advance(logits, &self.end_tokens, &self.runner, now);
        add(&self.shared.meter.generated_tokens, (sequence.num_generated() - before) as u64);
        if let Some(gap) = sequence.last_gap() {
            self.shared.meter.note_gap(gap);
        }
        if ending.is_none() {
            let news = sequence.take_news();
            self.events.extend(news.map(|event| (sequence.outbox().clone(), event)));
        }
        ending
    }

    fn note_step(&mut self) {
        self.num_steps += 1;
        add(&self.shared.meter.steps, 1);
        add(&self.shared.meter.shared_steps, u64::from(self.runner.was_shared()));
        add(&self.shared.meter.busy_slots, self.running.len() as u64);
    }

    /// The state of a slot that holds the longest beginning of these tokens.
    fn export(&mut self, tokens: &[i32]) -> Option<Exported> {
        let can_cut = self.runner.can_cut_states();
        let (slot, _) = self.slots.find_exportable(tokens, can_cut)?;
        if !can_cut && !self.runner.forget(slot, self.slots.tokens(slot).len()) {
            return None;
        }
        let state = self.runner.save(slot)?;
        Some(Exported { tokens: self.slots.tokens(slot).to_vec(), state })
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

    /// The memory is not what we believe. Nobody has to suffer for that.
    fn compute_again(&mut self, what: &str) {
        log::note(log::Level::Error, format!("{what}; computing all {} again", self.running.len()));
        self.begin_anew();
    }

    /// What is running is computed once more, and nothing else is held.
    fn begin_anew(&mut self) {
        self.slots.forget_all();
        self.runner.forget_all();
        self.running.iter_mut().for_each(Sequence::compute_again);
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
    pub(super) fn end(&mut self, mut sequence: Sequence, ending: Ending) {
        if let Some(slot) = sequence.slot {
            self.is_crowded = false;
            self.slots.release(slot, sequence.reusable());
        }
        let event = sequence.end(ending, Instant::now());
        if let Some(end) = &event.end {
            self.shared.meter.note_end(end.reason, &end.stats);
        }
        lock(&self.shared.under_way).remove(&sequence.id);
        self.events.push((sequence.outbox().clone(), event));
    }

    /// One wake-up of each reader for all events of the step.
    fn tell(&mut self) {
        self.note_load();
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
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Add(request) = command {
                self.waiting.push(Sequence::new(request, self.limits.n_ctx));
            }
        }
        let waiting = self.waiting.drain();
        waiting.iter().for_each(|_| self.shared.left_queue());
        for sequence in std::mem::take(&mut self.running).into_iter().chain(waiting) {
            self.end(sequence, Ending::Failed(Error::ModelUnloaded));
        }
        self.tell();
    }
}

fn row(sequence: &Sequence, position: usize) -> Row {
    Row {
        token: sequence.tokens[position],
        position,
        slot: sequence.slot.expect("running sequences have slots"),
        wants_logits: position + 1 == sequence.tokens.len(),
    }
}
