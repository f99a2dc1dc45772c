//! A runner that speaks the lines it was given, and an engine around it: no model, no waiting for
//! luck. What the runner has "computed" decides the next token, so a wrong cache gives wrong words.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tabagent_model::config::GenerationConfig;
use tabagent_model::context::message::{Event, FinishReason, Stats, TokenLogprobs};
use tabagent_model::context::runner::{Interrupt, Limits, Outcome, Row, Runner};
use tabagent_model::context::{Capacity, Context, Prompt};
use tabagent_model::error::{Error, Result};

pub const VOCABULARY: usize = 100;
/// The token that ends a generation.
pub const END: i32 = 99;
/// A prompt that begins with this one gets one good token; then the logits are not numbers.
pub const POISON: i32 = 98;

/// A hang is a failure, and says so.
const PATIENCE: Duration = Duration::from_secs(20);

/// From all that a slot holds to the next token.
pub type Rule = fn(&[i32]) -> i32;

/// One more than the last: 96, 97, 98, END.
pub fn count_up(history: &[i32]) -> i32 {
    (history[history.len() - 1] + 1) % VOCABULARY as i32
}

/// Another token whenever anything before it is another; one in sixteen is the end.
pub fn hash_all(history: &[i32]) -> i32 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for &token in history {
        hash = (hash ^ token as u64).wrapping_mul(0x100_0000_01b3);
    }
    match hash >> 60 {
        0 => END,
        _ => ((hash >> 32) % 60) as i32,
    }
}

pub fn text_of(tokens: &[i32]) -> String {
    tokens.iter().map(|token| format!("{token} ")).collect()
}

/// What the runner does at one step instead of computing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trick {
    Compute,
    /// Computes so many rows, then says that it was interrupted.
    Abort {
        after: usize,
    },
    NoRoom,
    Refuse,
    /// Computes half of the rows, then has no memory for the rest.
    Exhaust,
    Fail,
    Panic,
}

/// Asked before each step; it sees the number of the step and its rows.
pub type Plot = Box<dyn FnMut(usize, &[Row]) -> Trick + Send>;

pub struct Setup {
    pub n_ctx: usize,
    pub n_batch: usize,
    pub n_slots: usize,
    pub queue_size: usize,
    /// A token takes four bytes there.
    pub prompt_cache_bytes: usize,
    pub can_shift: bool,
    /// What the runner advises beside so many who generate, when so many wait to be read.
    pub prompt_rows: fn(usize, usize) -> usize,
    pub rule: Rule,
    /// Tokens that all slots together can hold.
    pub cells: usize,
    /// Recurrent memory does not.
    pub forgets_parts: bool,
    /// Steps that run before the gate has to be opened; `None` means that there is no gate.
    pub gate: Option<usize>,
    pub plot: Plot,
    /// Of how many calls of `forget` one panics; and every call of `forget_all`.
    pub forget_panics: Option<u32>,
    pub forget_all_panics: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            n_ctx: 128,
            n_batch: 16,
            n_slots: 2,
            queue_size: 1000,
            prompt_cache_bytes: 0,
            can_shift: true,
            prompt_rows: |_, _| usize::MAX,
            rule: count_up,
            cells: usize::MAX,
            forgets_parts: true,
            gate: None,
            plot: Box::new(|_, _| Trick::Compute),
            forget_panics: None,
            forget_all_panics: false,
        }
    }
}

pub fn at_step(at: usize, trick: Trick) -> Plot {
    Box::new(move |step, _| if step == at { trick } else { Trick::Compute })
}

/// What a test sees of the runner, from outside of its thread.
#[derive(Default)]
pub struct Stage {
    state: Mutex<StageState>,
    changed: Condvar,
}

#[derive(Default)]
struct StageState {
    batches: Vec<Vec<Row>>,
    faults: Vec<String>,
    /// Slots that got a saved state, and how many tokens it had.
    restored: Vec<(usize, usize)>,
    /// Steps that may still run; `None` means all.
    permits: Option<usize>,
    /// No more tricks.
    is_calm: bool,
    dropped: bool,
}

impl Stage {
    /// Every batch that reached the runner.
    pub fn batches(&self) -> Vec<Vec<Row>> {
        self.lock().batches.clone()
    }

    /// The rows of the batches from `from` on: slot, position, token.
    pub fn rows_since(&self, from: usize) -> Vec<(usize, usize, i32)> {
        let rows = |batch: &Vec<Row>| {
            batch.iter().map(|row| (row.slot, row.position, row.token)).collect::<Vec<_>>()
        };
        self.lock().batches[from..].iter().flat_map(rows).collect()
    }

    pub fn num_batches(&self) -> usize {
        self.lock().batches.len()
    }

    /// Rules of the house that the scheduler broke.
    pub fn faults(&self) -> Vec<String> {
        self.lock().faults.clone()
    }

    /// Slots that got a saved state, and how many tokens it had.
    pub fn restored(&self) -> Vec<(usize, usize)> {
        self.lock().restored.clone()
    }

    pub fn is_dropped(&self) -> bool {
        self.lock().dropped
    }

    /// Waits until the runner has been given its `count`th batch; with a gate it may stand before it.
    pub fn wait_for_batch(&self, count: usize) {
        self.wait_until(|state| state.batches.len() >= count);
    }

    pub fn let_through(&self, steps: usize) {
        let mut state = self.lock();
        state.permits = state.permits.map(|permits| permits + steps);
        self.changed.notify_all();
    }

    pub fn shut(&self) {
        self.lock().permits = Some(0);
    }

    pub fn calm_down(&self) {
        self.lock().is_calm = true;
    }

    pub fn open(&self) {
        self.lock().permits = None;
        self.changed.notify_all();
    }

    /// False: it was interrupted.
    fn pass(&self, interrupt: &Interrupt) -> bool {
        let mut state = self.lock();
        while state.permits == Some(0) {
            if interrupt.is_set() {
                return false;
            }
            let waited = self.changed.wait_timeout(state, Duration::from_millis(1));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.permits = state.permits.map(|permits| permits - 1);
        true
    }

    fn wait_until(&self, is_so: impl Fn(&StageState) -> bool) {
        let waited = self.changed.wait_timeout_while(self.lock(), PATIENCE, |state| !is_so(state));
        let waited = waited.unwrap_or_else(PoisonError::into_inner);
        assert!(!waited.1.timed_out(), "the runner never got there");
    }

    fn lock(&self) -> MutexGuard<'_, StageState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct ScriptedRunner {
    setup: Setup,
    stage: Arc<Stage>,
    interrupt: Interrupt,
    /// The tokens that each slot holds, by position.
    slots: Vec<Vec<i32>>,
    logits: Vec<Option<Vec<f32>>>,
    dice: fastrand::Rng,
}

impl ScriptedRunner {
    pub fn new(setup: Setup, interrupt: Interrupt) -> (ScriptedRunner, Arc<Stage>) {
        let stage = Arc::new(Stage::default());
        stage.lock().permits = setup.gate;
        let slots = vec![Vec::new(); setup.n_slots];
        let (logits, dice) = (Vec::new(), fastrand::Rng::with_seed(7));
        (ScriptedRunner { setup, stage: stage.clone(), interrupt, slots, logits, dice }, stage)
    }

    /// What llama.cpp would answer with an assert, or with nonsense.
    fn check(&self, batch: &[Row]) {
        let mut faults = Vec::new();
        if batch.is_empty() || batch.len() > self.setup.n_batch {
            faults.push(format!("a batch of {} rows", batch.len()));
        }
        let mut lengths: Vec<usize> = self.slots.iter().map(Vec::len).collect();
        let mut answered = BTreeSet::new();
        for row in batch {
            match lengths.get_mut(row.slot) {
                Some(length) if *length == row.position && *length < self.setup.n_ctx => {
                    *length += 1;
                }
                Some(length) => faults.push(format!("{row:?} where position {length} is next")),
                None => faults.push(format!("{row:?}, and there is no such slot")),
            }
            if answered.contains(&row.slot) {
                faults.push(format!("{row:?} after the row of its slot that wanted logits"));
            }
            if row.wants_logits {
                answered.insert(row.slot);
            }
        }
        self.stage.lock().faults.extend(faults);
    }

    fn compute(&mut self, rows: &[Row]) {
        for row in rows {
            self.slots[row.slot].push(row.token);
            self.logits.push(row.wants_logits.then(|| self.logits_after(&self.slots[row.slot])));
        }
    }

    fn logits_after(&self, history: &[i32]) -> Vec<f32> {
        let mut logits = vec![0.0; VOCABULARY];
        logits[(self.setup.rule)(history) as usize] = 10.0;
        if history[0] == POISON && history.len() > 2 {
            logits[VOCABULARY / 2] = f32::NAN;
        }
        logits
    }
}

impl Runner for ScriptedRunner {
    fn limits(&self) -> Limits {
        let Setup { n_ctx, n_batch, n_slots, can_shift, .. } = self.setup;
        Limits { n_ctx, n_batch, n_slots, can_shift }
    }

    fn run(&mut self, batch: &[Row]) -> Outcome {
        self.check(batch);
        self.logits.clear();
        let step = {
            let mut state = self.stage.lock();
            state.batches.push(batch.to_vec());
            state.batches.len() - 1
        };
        self.stage.changed.notify_all();
        let is_full = self.slots.iter().map(Vec::len).sum::<usize>().saturating_add(batch.len())
            > self.setup.cells;
        let trick = match (self.setup.plot)(step, batch) {
            _ if is_full => Trick::NoRoom,
            _ if self.stage.lock().is_calm => Trick::Compute,
            trick => trick,
        };
        if !self.stage.pass(&self.interrupt) {
            self.compute(&batch[..batch.len() / 2]);
            return Outcome::Aborted;
        }
        match trick {
            Trick::Compute => {
                self.compute(batch);
                Outcome::Done
            }
            Trick::Abort { after } => {
                self.compute(&batch[..after.min(batch.len())]);
                Outcome::Aborted
            }
            Trick::NoRoom => Outcome::NoRoom,
            Trick::Refuse => Outcome::Refused("the script says so".into()),
            Trick::Exhaust => {
                self.compute(&batch[..batch.len() / 2]);
                Outcome::Exhausted
            }
            Trick::Fail => {
                self.compute(&batch[..batch.len() / 2]);
                Outcome::Failed("the script says so".into())
            }
            Trick::Panic => panic!("the script says so"),
        }
    }

    fn can_be_interrupted(&self) -> bool {
        self.setup.forgets_parts
    }

    fn logits(&self, row: usize) -> Result<&[f32]> {
        let logits = self.logits.get(row).and_then(Option::as_deref);
        logits.ok_or_else(|| Error::internal(format!("row {row} has no logits")))
    }

    fn forget(&mut self, slot: usize, from: usize) -> bool {
        let is_calm = self.stage.lock().is_calm;
        let panics = self.setup.forget_panics.is_some_and(|one_in| self.dice.u32(0..one_in) == 0);
        assert!(is_calm || !panics, "the script says so");
        let held = &mut self.slots[slot];
        if from < held.len() && from > 0 && !self.setup.forgets_parts {
            return false;
        }
        held.truncate(from);
        true
    }

    fn forget_all(&mut self) {
        assert!(!self.setup.forget_all_panics, "the script says so");
        self.slots.iter_mut().for_each(Vec::clear);
    }

    fn can_copy(&self) -> bool {
        self.setup.forgets_parts
    }

    fn copy(&mut self, from: usize, to: usize) -> bool {
        self.slots[to] = self.slots[from].clone();
        true
    }

    fn can_cut_states(&self) -> bool {
        self.setup.forgets_parts
    }

    fn state_size(&self, slot: usize) -> usize {
        self.slots[slot].len() * 4
    }

    fn save(&mut self, slot: usize) -> Option<Vec<u8>> {
        Some(self.slots[slot].iter().flat_map(|token| token.to_le_bytes()).collect())
    }

    fn restore(&mut self, slot: usize, state: &[u8]) -> bool {
        let token = |bytes: &[u8]| i32::from_le_bytes(bytes.try_into().unwrap());
        self.slots[slot] = state.chunks(4).map(token).collect();
        self.stage.lock().restored.push((slot, self.slots[slot].len()));
        true
    }

    fn shift(&mut self, slot: usize, keep: usize, drop: usize) -> bool {
        let held = &mut self.slots[slot];
        if keep + drop > held.len() {
            self.stage.lock().faults.push(format!("a shift of {keep} + {drop} in {}", held.len()));
            return false;
        }
        held.drain(keep..keep + drop);
        true
    }

    fn prompt_rows(&self, _: usize, num_generating: usize, num_prompts: usize) -> usize {
        (self.setup.prompt_rows)(num_generating, num_prompts)
    }

    fn piece(&self, token: i32, out: &mut Vec<u8>) -> Result<()> {
        out.extend_from_slice(text_of(&[token]).as_bytes());
        Ok(())
    }

    fn end_tokens(&self) -> Vec<i32> {
        vec![END]
    }
}

impl Drop for ScriptedRunner {
    fn drop(&mut self) {
        self.stage.lock().dropped = true;
    }
}

/// Everything that one request was told.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub text: String,
    pub tokens: Vec<i32>,
    pub reason: FinishReason,
    pub stop: Option<String>,
    pub error: Option<String>,
}

/// The answer that says `tokens` and nothing else.
pub fn said(tokens: impl IntoIterator<Item = i32>, reason: FinishReason) -> Answer {
    let tokens: Vec<i32> = tokens.into_iter().collect();
    Answer { text: text_of(&tokens), tokens, reason, stop: None, error: None }
}

pub fn failed(tokens: impl IntoIterator<Item = i32>, error: &Error) -> Answer {
    Answer { error: Some(error.to_string()), ..said(tokens, FinishReason::Error) }
}

pub fn greedy() -> GenerationConfig {
    GenerationConfig { temperature: 0.0, repeat_penalty: 1.0, ..Default::default() }
}

pub fn at_most(max_tokens: i64) -> GenerationConfig {
    GenerationConfig { max_tokens, ..greedy() }
}

/// A context over a scripted runner, and a reader that is always there.
pub struct Engine {
    pub context: Arc<Context>,
    pub stage: Arc<Stage>,
    letters: Receiver<Vec<Event>>,
    reader: Option<JoinHandle<()>>,
    told: BTreeMap<u64, Vec<Event>>,
    /// The requests that have ended, in this order.
    pub ended: Vec<u64>,
}

impl Engine {
    pub fn new(setup: Setup) -> Engine {
        let interrupt = Interrupt::default();
        let (queue_size, prompt_cache_bytes) = (setup.queue_size, setup.prompt_cache_bytes);
        let capacity = Capacity { queue_size, prompt_cache_bytes };
        let (runner, stage) = ScriptedRunner::new(setup, interrupt.clone());
        let context = Arc::new(Context::with_runner(runner, capacity, interrupt).unwrap());
        let (sender, letters) = channel();
        let source = context.clone();
        let reader = std::thread::spawn(move || {
            loop {
                let events = source.next_events();
                let is_closed = events.is_empty();
                let _ = sender.send(events);
                if is_closed {
                    return;
                }
            }
        });
        let (told, ended) = (BTreeMap::new(), Vec::new());
        Engine { context, stage, letters, reader: Some(reader), told, ended }
    }

    pub fn try_submit(&self, id: u64, prompt: &[i32], config: GenerationConfig) -> Result<()> {
        self.context.submit(id, Prompt::Tokens(prompt.to_vec()), config)
    }

    pub fn submit(&self, id: u64, prompt: &[i32], config: GenerationConfig) {
        self.try_submit(id, prompt, config).unwrap();
    }

    /// Waits for the end of these requests. Nobody may hear anything after a last event.
    pub fn answers<const N: usize>(&mut self, ids: [u64; N]) -> [Answer; N] {
        while !ids.iter().all(|id| self.ended.contains(id)) {
            let events = self.letters.recv_timeout(PATIENCE).expect("a request got no last event");
            assert_ne!(events, [], "the context is closed, and {ids:?} did not all end");
            self.note(events);
        }
        ids.map(|id| self.answer(id))
    }

    pub fn answer(&self, id: u64) -> Answer {
        let events = &self.told[&id];
        let end = events.last().and_then(|event| event.end.clone()).expect("it has ended");
        Answer {
            text: events.iter().map(|event| event.text.as_str()).collect(),
            tokens: events.iter().flat_map(|event| event.tokens.clone()).collect(),
            reason: end.reason,
            stop: end.stop,
            error: end.error.map(|error| error.to_string()),
        }
    }

    pub fn stats(&self, id: u64) -> Stats {
        self.told[&id].last().and_then(|event| event.end.clone()).expect("it has ended").stats
    }

    /// As they came: of each event.
    pub fn logprobs(&self, id: u64) -> Vec<Vec<TokenLogprobs>> {
        self.told[&id].iter().map(|event| event.logprobs.clone()).collect()
    }

    /// One request, alone.
    pub fn ask(&mut self, id: u64, prompt: &[i32], config: GenerationConfig) -> Answer {
        self.submit(id, prompt, config);
        let [answer] = self.answers([id]);
        answer
    }

    /// Closes, and reads what is left until the empty list.
    pub fn close(&mut self) {
        self.context.close();
        self.read_to_the_end();
    }

    pub fn read_to_the_end(&mut self) {
        loop {
            let events = self.letters.recv_timeout(PATIENCE).expect("there was no empty list");
            if events.is_empty() {
                return;
            }
            self.note(events);
        }
    }

    /// Who has been told anything.
    pub fn heard(&self) -> Vec<u64> {
        self.told.keys().copied().collect()
    }

    pub fn has_ended(&self, id: u64) -> bool {
        self.ended.contains(&id)
    }

    fn note(&mut self, events: Vec<Event>) {
        for event in events {
            assert!(!self.ended.contains(&event.id), "an event after the last one: {event:?}");
            if event.end.is_some() {
                self.ended.push(event.id);
            }
            self.told.entry(event.id).or_default().push(event);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stage.open();
        self.context.close();
        let reader = self.reader.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(reader, Some(Ok(()))), "the reader did not come home");
            assert_eq!(self.stage.faults(), [""; 0], "the scheduler broke a rule of the runner");
        }
    }
}
