//! Context: the handle of one llama.cpp context. It submits, aborts, hands out events and closes;
//! the work is done by its owner thread.

mod admission;
mod attention;
mod budget;
mod core_waits;
mod layouts;
mod line;
pub mod message;
mod metrics;
mod pace;
mod plan;
mod pool;
mod prompt_cache;
mod queue;
pub mod runner;
mod sampler;
mod scheduler;
mod sequence;
mod slots;
mod state;
mod stopwatch;
mod text;

/// The locks of `line.rs`, which its test replaces.
mod sync {
    pub use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
}

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crate::config::{ContextConfig, GenerationConfig, KvType, Overflow};
use crate::constraint::Guide;
use crate::error::{Error, Result};
use crate::gguf::Description;
use crate::hardware::{cpu, memory};
use crate::log;
use crate::model::Model;
use message::{Command, Event, Exported, FinishReason, Outbox, Request, Tap};
use metrics::{Meter, add};
use prompt_cache::PromptCache;
use runner::{Interrupt, Limits, LlamaRunner, Runner};
use scheduler::Scheduler;
use sequence::dropped_at_once;
use state::Kind;

pub use crate::ffi::MemoryUse;
pub use attention::{ALL as ATTENTIONS, Attention, Heads, Options, Timing, measure};
pub use budget::Budget;
pub use layouts::{LayoutPace, LayoutTiming, measure_layouts};
pub use metrics::{Distribution, Metrics, SlotView};
pub use pace::Pace;
pub use plan::Plan;
pub use pool::Turn;
pub use sampler::{Breakers, LlamaSampler, Sampler, dry_breakers, llama_samplers};
pub use slots::Slots;
pub use text::TextStream;

/// A prompt that is cut to fit may have at most so many times the tokens of the context.
const LONGEST_PROMPT: usize = 64;

pub struct Context {
    model: Weak<Model>,
    commands: Mutex<Sender<Command>>,
    owner: Mutex<Option<JoinHandle<()>>>,
    owner_id: ThreadId,
    known_breakers: sampler::KnownBreakers,
    shared: Arc<Shared>,
    limits: Limits,
    n_threads: u32,
    attention: Attention,
    memory: Vec<MemoryUse>,
    queue_size: usize,
    state_kind: Option<Kind>,
    process: u32,
    closed: AtomicBool,
}

/// How much a context keeps besides what it computes.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    pub queue_size: usize,
    pub prompt_cache_bytes: usize,
}

/// What the handle and the owner thread both see.
pub struct Shared {
    pub outbox: Arc<Outbox>,
    interrupt: Interrupt,
    is_busy: AtomicBool,
    /// The requests that have not had their last event.
    under_way: Mutex<HashSet<u64>>,
    /// The requests of a step that takes long; empty during a short one.
    in_long_step: Mutex<Vec<u64>>,
    meter: Meter,
    slots: Mutex<Vec<SlotView>>,
}

impl Context {
    /// Creates the context on its own thread, warms it up, and gives the handle.
    pub(crate) fn open(model: Arc<Model>, config: &ContextConfig) -> Result<Context> {
        config.validate()?;
        check_generates(model.description())?;
        check_blocks(&model, config.kv_type)?;
        let mut config = config.clone();
        let n_ctx = trained(model.description(), config.n_ctx);
        if config.n_ctx > n_ctx {
            let asked = config.n_ctx;
            let line =
                format!("n_ctx={asked} is more than the model was trained with; using {n_ctx}");
            // Nobody needs to be warned of what nobody asked for.
            let is_default = asked == ContextConfig::default().n_ctx;
            log::note(if is_default { log::Level::Info } else { log::Level::Warning }, line);
            config.n_ctx = n_ctx;
        }
        let free = memory::available_bytes();
        let gpu_layers = model.gpu_layers();
        if let Some(options) = Options::of(model.description(), &config, gpu_layers, free) {
            let Attention { flash_attn, kv_type } = options.built_in();
            config = ContextConfig { flash_attn, kv_type, ..config };
        } else if config.kv_type == KvType::Auto {
            config.kv_type = KvType::F16;
        }
        let plan = Plan::of(model.description(), &config, free);
        plan.check(&config, free)?;
        let Plan { n_seq_max, prompt_cache_bytes, .. } = plan;
        let n_threads = threads_of(&config);
        let interrupt = Interrupt::default();
        let weak = Arc::downgrade(&model);
        let state_kind = Kind::of(&model, &config, n_seq_max);
        let mut runner = LlamaRunner::new(model, &config, n_seq_max, n_threads, interrupt.clone())?;
        if config.warmup {
            runner.warm_up()?;
        }
        let memory = runner.memory()?;
        let capacity = Capacity { queue_size: config.queue_size, prompt_cache_bytes };
        let mut context = Context::with_runner(runner, capacity, interrupt)?;
        context.model = weak;
        context.state_kind = Some(state_kind);
        context.n_threads = n_threads;
        context.memory = memory;
        context.attention = Attention { flash_attn: config.flash_attn, kv_type: config.kv_type };
        Ok(context)
    }

    /// A context over any runner: the seam for tests, which need no model.
    pub fn with_runner(
        runner: impl Runner + Send + 'static,
        capacity: Capacity,
        interrupt: Interrupt,
    ) -> Result<Context> {
        let limits = runner.limits();
        let shared = Arc::new(Shared::new(interrupt));
        let (sender, receiver) = channel();
        let cache = PromptCache::new(capacity.prompt_cache_bytes);
        let scheduler = Scheduler::new(runner, cache, receiver, shared.clone());
        let outbox = shared.outbox.clone();
        let owner = std::thread::Builder::new()
            .name("tabagent-context".into())
            .stack_size(16 << 20)
            .spawn(move || {
                scheduler.run();
                outbox.close();
            })
            .map_err(|error| Error::exhausted(format!("a thread for the context: {error}")))?;
        Ok(Context {
            model: Weak::new(),
            commands: Mutex::new(sender),
            owner_id: owner.thread().id(),
            owner: Mutex::new(Some(owner)),
            known_breakers: sampler::KnownBreakers::default(),
            shared,
            limits,
            n_threads: 1,
            attention: attention::ALL[0],
            memory: Vec::new(),
            queue_size: capacity.queue_size,
            state_kind: None,
            process: std::process::id(),
            closed: AtomicBool::new(false),
        })
    }

    /// Tokenizes on the caller's thread, then queues. What is wrong is said here, before that.
    pub fn submit(&self, id: u64, prompt: Prompt, config: GenerationConfig) -> Result<()> {
        self.submit_to(self.shared.outbox.clone(), id, prompt, config)
    }

    /// Whether a request's last event is still to come.
    pub fn has(&self, id: u64) -> bool {
        lock(&self.shared.under_way).contains(&id)
    }

    /// Asks for the end of a request. An id that is not, or no longer, there is fine.
    pub fn abort(&self, id: u64) {
        if self.is_foreign() {
            return;
        }
        let _ = lock(&self.commands).send(Command::Abort(id));
        // The lock is held while setting, so that it cannot hit the step after.
        let ids = lock(&self.shared.in_long_step);
        if ids.contains(&id) {
            self.shared.interrupt.set();
        }
    }

    /// Lets somebody hear events before they wait here.
    pub fn tap(&self, tap: Tap) {
        self.shared.outbox.tap(tap);
    }

    /// Sleeps until a step has produced something. An empty list means that it is closed.
    pub fn next_events(&self) -> Vec<Event> {
        if self.is_foreign() { Vec::new() } else { self.shared.outbox.take() }
    }

    /// One request, waited for. `on_text` stops it by saying false; `idle` is called while nothing
    /// comes, and stops it as well.
    pub fn generate(
        &self,
        prompt: Prompt,
        config: GenerationConfig,
        mut on_text: impl FnMut(&str) -> bool,
        mut idle: impl FnMut() -> bool,
    ) -> Result<String> {
        static NEXT: AtomicU64 = AtomicU64::new(1 << 63); // apart from the ids that callers choose
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let outbox = Arc::new(Outbox::default());
        self.submit_to(outbox.clone(), id, prompt, config)?;
        let _if_a_callback_panics = AbortOnPanic { context: self, id };
        let mut text = String::new();
        let mut go_on = true;
        loop {
            let events = outbox.take_within(Duration::from_millis(20));
            for event in events {
                if go_on && !event.text.is_empty() {
                    text.push_str(&event.text);
                    go_on = on_text(&event.text);
                }
                match event.end {
                    Some(end) if go_on && end.reason == FinishReason::Error => {
                        return Err(end
                            .error
                            .unwrap_or_else(|| Error::internal("no reason given")));
                    }
                    Some(_) => return Ok(text),
                    None => {}
                }
            }
            if go_on && !idle() {
                go_on = false;
            }
            if !go_on {
                self.abort(id);
            }
        }
    }

    /// Ends every request, frees the context, and comes back when that is done. Again: nothing.
    pub fn close(&self) {
        if self.is_foreign() {
            return;
        }
        self.closed.store(true, Ordering::SeqCst);
        let _ = lock(&self.commands).send(Command::Close);
        self.shared.interrupt.set();
        if self.check_thread("closing").is_err() {
            return; // it ends by itself, after this
        }
        if let Some(owner) = lock(&self.owner).take() {
            let _ = owner.join();
        }
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn n_threads(&self) -> u32 {
        self.n_threads
    }

    /// What it computes with. Flash attention may still be automatic: llama.cpp's to choose.
    pub fn attention(&self) -> Attention {
        self.attention
    }

    /// What llama.cpp allocated for it and for its model's weights, by kind of memory.
    pub fn memory(&self) -> &[MemoryUse] {
        &self.memory
    }

    pub fn model(&self) -> Result<Arc<Model>> {
        self.check_process()?;
        let model = self.model.upgrade().filter(|_| !self.is_closed());
        model.ok_or(Error::ModelUnloaded)
    }

    pub fn tokenize(&self, text: &str, add_bos: bool) -> Result<Vec<i32>> {
        self.model()?.vocabulary().tokenize(text, add_bos, false)
    }

    pub fn metrics(&self) -> Metrics {
        self.shared.meter.snapshot()
    }

    /// What each slot is about, after the last step.
    pub fn slots(&self) -> Vec<SlotView> {
        lock(&self.shared.slots).clone()
    }

    /// What was pinned for a request may go like anything else in the prompt cache.
    pub fn unpin(&self, id: u64) {
        if !self.is_foreign() {
            let _ = lock(&self.commands).send(Command::Unpin(id));
        }
    }

    /// The computed state of the longest beginning of `tokens` that a slot holds.
    pub fn export_state(&self, tokens: Vec<i32>) -> Result<Option<Vec<u8>>> {
        let Some(exported) = self.ask(|reply| Command::Export { tokens, reply })? else {
            return Ok(None);
        };
        self.state_kind.map(|kind| exported.to_bytes(kind)).transpose()
    }

    /// Puts an exported state into the prompt cache; says how many tokens of `tokens` it holds.
    pub fn import_state(&self, data: &[u8], tokens: &[i32]) -> Result<usize> {
        self.model()?;
        let Some(kind) = self.state_kind else { return Ok(0) };
        let exported = Exported::from_bytes(data, kind)?;
        let shared = slots::common_prefix(&exported.tokens, tokens);
        let is_kept = self.ask(|reply| Command::Import { exported, reply })?;
        Ok(if is_kept { shared } else { 0 })
    }

    /// A question to the owner thread, answered between two steps.
    fn ask<T>(&self, question: impl FnOnce(Sender<T>) -> Command) -> Result<T> {
        self.check_process()?;
        self.check_thread("waiting")?;
        let (reply, answer) = channel();
        let _ = lock(&self.commands).send(question(reply));
        answer.recv().map_err(|_| Error::ModelUnloaded)
    }

    /// A number that grows as long as the owner thread gets on, and whether there is work for it.
    pub fn pulse(&self) -> (u64, bool) {
        (self.shared.interrupt.beats(), self.shared.is_busy.load(Ordering::Relaxed))
    }

    /// For tests: the next step panics.
    pub fn inject_panic(&self) {
        let _ = lock(&self.commands).send(Command::Panic);
    }

    /// For tests: the next step never ends.
    pub fn inject_hang(&self) {
        let _ = lock(&self.commands).send(Command::Hang);
    }

    fn submit_to(
        &self,
        outbox: Arc<Outbox>,
        id: u64,
        prompt: Prompt,
        mut config: GenerationConfig,
    ) -> Result<()> {
        self.check_process()?;
        self.check_thread("generating")?;
        config.validate()?;
        let submitted = Instant::now();
        let breakers = self.check_vocabulary(&config)?;
        let guide = self.guide(&config)?;
        let prompt = self.tokens_of(prompt, &config)?;
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "nothing", "at least one token"));
        }
        let (prompt, dropped) = self.fitted(prompt, &config)?;
        if let Ok(model) = self.model() {
            config.banned_tokens.extend_from_slice(model.vocabulary().suppressed());
        }
        let commands = lock(&self.commands);
        if self.is_closed() {
            return Err(Error::ModelUnloaded);
        }
        let meter = &self.shared.meter;
        let waiting = meter.waiting.load(Ordering::Relaxed) as usize;
        // Those for whom a slot is free will not wait.
        let free = self.limits.n_slots - meter.running.load(Ordering::Relaxed) as usize;
        if waiting >= self.queue_size + free {
            return Err(Error::QueueFull { waiting });
        }
        if !lock(&self.shared.under_way).insert(id) {
            return Err(Error::invalid("request_id", id, "one that no request under way has"));
        }
        self.shared.entered_queue();
        add(&self.shared.meter.requests, 1);
        let request = Request { id, prompt, dropped, config, breakers, guide, submitted, outbox };
        commands.send(Command::Add(request)).map_err(|_| {
            self.shared.left_queue();
            lock(&self.shared.under_way).remove(&id);
            Error::ModelUnloaded
        })
    }

    /// Refuses ids that the vocabulary does not have, and looks up in it what has to be looked up.
    fn check_vocabulary(&self, config: &GenerationConfig) -> Result<Arc<Breakers>> {
        let Ok(model) = self.model() else { return Ok(Arc::default()) };
        config.check_tokens(model.vocab_size())?;
        match config.dry_multiplier {
            0.0 => Ok(Arc::default()),
            _ => self.known_breakers.of(config, model.vocabulary()),
        }
    }

    /// What is wrong with a constraint is found out here, where it keeps nobody else waiting.
    fn guide(&self, config: &GenerationConfig) -> Result<Option<Guide>> {
        let Some(asked) = &config.constraint else { return Ok(None) };
        let model = self.model()?;
        let GenerationConfig { preserved_tokens, stop_tokens, .. } = config;
        let vocabulary = Some(model.vocabulary());
        model.constraints().guide(asked, preserved_tokens, stop_tokens, vocabulary).map(Some)
    }

    fn tokens_of(&self, prompt: Prompt, config: &GenerationConfig) -> Result<Vec<i32>> {
        match prompt {
            Prompt::Tokens(tokens) => {
                if let Ok(model) = self.model() {
                    model.vocabulary().check_all(&tokens)?;
                }
                Ok(tokens)
            }
            Prompt::Text(text) => {
                let model = self.model()?;
                // Seen before tokenizing, which takes time in proportion to the text.
                let fewest = model.vocabulary().fewest_tokens(text.len());
                let longest = match config.overflow {
                    Overflow::Error => self.limits.n_ctx,
                    Overflow::Shift => self.limits.n_ctx.saturating_mul(LONGEST_PROMPT),
                };
                if fewest >= longest {
                    return Err(self.too_long(fewest + 1));
                }
                model.vocabulary().tokenize(&text, config.add_bos, config.special)
            }
        }
    }

    /// A prompt that leaves room for an answer, and how many tokens had to be dropped for that.
    fn fitted(&self, mut prompt: Vec<i32>, config: &GenerationConfig) -> Result<(Vec<i32>, usize)> {
        let Limits { n_ctx, can_shift, .. } = self.limits;
        if config.overflow == Overflow::Shift && !can_shift {
            let allowed = "`error` with this model, whose memory cannot be shifted";
            return Err(Error::invalid("overflow", "shift", allowed));
        }
        if prompt.len() < n_ctx {
            return Ok((prompt, 0));
        }
        if config.overflow == Overflow::Error {
            return Err(self.too_long(prompt.len() + 1)); // one more for an answer
        }
        // As if it had been shifted just before its last token.
        let keep = config.kept_tokens(prompt.len(), n_ctx);
        let dropped = prompt.len() + dropped_at_once(n_ctx, keep) - n_ctx;
        prompt.drain(keep..keep + dropped);
        Ok((prompt, dropped))
    }

    fn too_long(&self, required: usize) -> Error {
        Error::ContextLimitExceeded { max: self.limits.n_ctx as u32, required: required as u64 }
    }

    fn check_process(&self) -> Result<()> {
        if self.is_foreign() {
            let child = std::process::id();
            return Err(Error::ForkedProcess { owner: self.process, child });
        }
        Ok(())
    }

    /// What waits for the owner thread cannot be called on it, which is where logits hooks run.
    pub fn check_thread(&self, what: &'static str) -> Result<()> {
        match std::thread::current().id() == self.owner_id {
            true => Err(Error::ModelBusy { what }),
            false => Ok(()),
        }
    }

    /// In a forked child the owner thread does not exist, and what it held stays held.
    fn is_foreign(&self) -> bool {
        std::process::id() != self.process
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.close();
    }
}

struct AbortOnPanic<'a> {
    context: &'a Context,
    id: u64,
}

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.context.abort(self.id);
        }
    }
}

pub enum Prompt {
    Text(String),
    Tokens(Vec<i32>),
}

impl Shared {
    fn new(interrupt: Interrupt) -> Shared {
        Shared {
            outbox: Arc::default(),
            interrupt,
            is_busy: AtomicBool::new(false),
            under_way: Mutex::default(),
            in_long_step: Mutex::default(),
            meter: Meter::default(),
            slots: Mutex::default(),
        }
    }

    fn is_busy(&self, is_busy: bool) {
        self.is_busy.store(is_busy, Ordering::Relaxed);
        self.interrupt.beat();
    }

    fn begin_step(&self, ids: &[u64]) {
        if !ids.is_empty() {
            lock(&self.in_long_step).extend_from_slice(ids);
        }
    }

    /// From here on nobody sets the interrupt, so the next step begins without it.
    fn end_step(&self) {
        let mut ids = lock(&self.in_long_step);
        ids.clear();
        self.interrupt.clear();
    }

    fn entered_queue(&self) {
        self.meter.waiting.fetch_add(1, Ordering::Relaxed);
    }

    fn left_queue(&self) {
        self.meter.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    fn count_prompt(&self, tokens: usize, cached: usize) {
        add(&self.meter.prompt_tokens, tokens as u64);
        add(&self.meter.cached_tokens, cached as u64);
    }
}

/// q8_0 takes 32 numbers at a time; llama.cpp only says that there is no context.
fn check_blocks(model: &Model, kv_type: KvType) -> Result<()> {
    match Heads::of(model.description()) {
        Some(heads) if kv_type == KvType::Q8_0 && heads.dim % 32 != 0 => {
            let allowed = format!("`auto`, `f16`, `bf16` or `f32` with heads of {}", heads.dim);
            Err(Error::invalid("kv_type", "q8_0", &allowed))
        }
        _ => Ok(()),
    }
}

/// Encoders answer a decode with an assert.
fn check_generates(description: &Description) -> Result<()> {
    let what = match description.architecture.as_str() {
        "t5" => "it is an encoder with a decoder, and only decoders generate here",
        _ if description.is_embedding => "it makes embeddings, not text",
        _ => return Ok(()),
    };
    Err(Error::UnsupportedModel { path: description.path.clone(), what: what.into() })
}

/// Tokens of a sequence, at most what the model was trained with.
pub fn trained(description: &Description, n_ctx: u32) -> u32 {
    match description.n_ctx_train {
        0 => n_ctx,
        most => n_ctx.min(most),
    }
}

pub fn threads_of(config: &ContextConfig) -> u32 {
    match config.n_threads {
        0 => cpu::default_threads() as u32,
        n => n.min(std::thread::available_parallelism().map_or(1, usize::from) as u32),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
