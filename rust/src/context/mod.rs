//! Context: the handle of one llama.cpp context. It submits, aborts, hands out events and closes;
//! the work is done by its owner thread.

pub mod message;
mod pace;
pub mod runner;
mod sampler;
mod scheduler;
mod sequence;
mod slots;
mod text;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crate::config::{ContextConfig, GenerationConfig};
use crate::error::{Error, Result};
use crate::gguf::Description;
use crate::hardware::{cpu, memory};
use crate::log;
use crate::model::Model;
use message::{Command, Event, FinishReason, Outbox, Request};
use runner::{Interrupt, Limits, LlamaRunner, N_CTX_STEP, Runner};
use scheduler::Scheduler;

pub use pace::Pace;
pub use sampler::{Breakers, LlamaSampler, Sampler, dry_breakers, llama_samplers};
pub use slots::Slots;
pub use text::TextStream;

/// With nothing asked for, a context has at most so many sequences, and their keys and values take
/// at most this share of the free memory.
const MOST_SEQUENCES: u64 = 4;
const SHARE_OF_FREE_MEMORY: u64 = 8;

pub struct Context {
    model: Weak<Model>,
    commands: Mutex<Sender<Command>>,
    owner: Mutex<Option<JoinHandle<()>>>,
    owner_id: ThreadId,
    known_breakers: sampler::KnownBreakers,
    shared: Arc<Shared>,
    limits: Limits,
    n_threads: u32,
    queue_size: usize,
    process: u32,
    closed: AtomicBool,
}

/// What the handle and the owner thread both see.
pub struct Shared {
    pub outbox: Arc<Outbox>,
    interrupt: Interrupt,
    /// The requests of a step that takes long; empty during a short one.
    in_long_step: Mutex<Vec<u64>>,
    waiting: AtomicUsize,
    running: AtomicUsize,
    requests: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    steps: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metrics {
    pub running: u64,
    pub waiting: u64,
    pub requests: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub generated_tokens: u64,
    pub steps: u64,
}

impl Context {
    /// Creates the context on its own thread, warms it up, and gives the handle.
    pub(crate) fn open(model: Arc<Model>, config: &ContextConfig) -> Result<Context> {
        config.validate()?;
        check_generates(model.description())?;
        let mut config = config.clone();
        let trained = model.context_train_size();
        if trained > 0 && config.n_ctx > trained {
            let asked = config.n_ctx;
            let line =
                format!("n_ctx={asked} is more than the model was trained with; using {trained}");
            log::note(log::Level::Warning, line);
            config.n_ctx = trained;
        }
        let n_seq_max = plan_sequences(&model, &config)?;
        let n_threads = match config.n_threads {
            0 => cpu::default_threads() as u32,
            n => n.min(std::thread::available_parallelism().map_or(1, usize::from) as u32),
        };
        let interrupt = Interrupt::default();
        let weak = Arc::downgrade(&model);
        let mut runner = LlamaRunner::new(model, &config, n_seq_max, n_threads, interrupt.clone())?;
        if config.warmup {
            runner.warm_up()?;
        }
        let mut context = Context::with_runner(runner, config.queue_size, interrupt)?;
        context.model = weak;
        context.n_threads = n_threads;
        Ok(context)
    }

    /// A context over any runner: the seam for tests, which need no model.
    pub fn with_runner(
        runner: impl Runner + Send + 'static,
        queue_size: usize,
        interrupt: Interrupt,
    ) -> Result<Context> {
        let limits = runner.limits();
        let shared = Arc::new(Shared::new(interrupt));
        let (sender, receiver) = channel();
        let scheduler = Scheduler::new(runner, receiver, shared.clone());
        let outbox = shared.outbox.clone();
        let owner = std::thread::Builder::new()
            .name("tabagent-context".into())
            .stack_size(16 << 20)
            .spawn(move || {
                scheduler.run();
                outbox.close();
            })
            .map_err(|error| Error::internal(format!("no thread for the context: {error}")))?;
        Ok(Context {
            model: Weak::new(),
            commands: Mutex::new(sender),
            owner_id: owner.thread().id(),
            owner: Mutex::new(Some(owner)),
            known_breakers: sampler::KnownBreakers::default(),
            shared,
            limits,
            n_threads: 1,
            queue_size,
            process: std::process::id(),
            closed: AtomicBool::new(false),
        })
    }

    /// Tokenizes on the caller's thread, then queues. What is wrong is said here, before that.
    pub fn submit(&self, id: u64, prompt: Prompt, config: GenerationConfig) -> Result<()> {
        self.submit_to(self.shared.outbox.clone(), id, prompt, config)
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

    pub fn model(&self) -> Result<Arc<Model>> {
        self.check_process()?;
        let gone = || Error::ModelNotLoaded { what: "the model of this context".into() };
        if self.is_closed() { Err(gone()) } else { self.model.upgrade().ok_or_else(gone) }
    }

    pub fn tokenize(&self, text: &str, add_bos: bool) -> Result<Vec<i32>> {
        self.model()?.vocabulary().tokenize(text, add_bos, false)
    }

    pub fn metrics(&self) -> Metrics {
        let shared = &self.shared;
        Metrics {
            running: shared.running.load(Ordering::Relaxed) as u64,
            waiting: shared.waiting.load(Ordering::Relaxed) as u64,
            requests: shared.requests.load(Ordering::Relaxed),
            prompt_tokens: shared.prompt_tokens.load(Ordering::Relaxed),
            cached_tokens: shared.cached_tokens.load(Ordering::Relaxed),
            generated_tokens: shared.generated_tokens.load(Ordering::Relaxed),
            steps: shared.steps.load(Ordering::Relaxed),
        }
    }

    /// For tests: the next step panics.
    pub fn inject_panic(&self) {
        let _ = lock(&self.commands).send(Command::Panic);
    }

    fn submit_to(
        &self,
        outbox: Arc<Outbox>,
        id: u64,
        prompt: Prompt,
        config: GenerationConfig,
    ) -> Result<()> {
        self.check_process()?;
        self.check_thread("generating")?;
        config.validate()?;
        let submitted = Instant::now();
        let breakers = self.check_vocabulary(&config)?;
        let prompt = self.tokens_of(prompt, &config)?;
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "nothing", "at least one token"));
        }
        if prompt.len() >= self.limits.n_ctx {
            // One more, so that there is room for an answer.
            return Err(self.too_long(prompt.len() + 1));
        }
        let commands = lock(&self.commands);
        if self.is_closed() {
            return Err(Error::ModelNotLoaded { what: "the model of this context".into() });
        }
        let waiting = self.shared.waiting.load(Ordering::Relaxed);
        // Those for whom a slot is free will not wait.
        let free = self.limits.n_slots - self.shared.running.load(Ordering::Relaxed);
        if waiting >= self.queue_size + free {
            return Err(Error::QueueFull { waiting });
        }
        self.shared.entered_queue();
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        let request = Request { id, prompt, config, breakers, submitted, outbox };
        commands.send(Command::Add(request)).map_err(|_| {
            self.shared.left_queue();
            let what = "the model of this context (its thread has ended)".into();
            Error::ModelNotLoaded { what }
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
                if fewest >= self.limits.n_ctx {
                    return Err(self.too_long(fewest + 1));
                }
                model.vocabulary().tokenize(&text, config.add_bos, config.special)
            }
        }
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
            in_long_step: Mutex::default(),
            waiting: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            requests: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            cached_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
        }
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
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    fn left_queue(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    fn count_prompt(&self, tokens: usize, cached: usize) {
        self.prompt_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
        self.cached_tokens.fetch_add(cached as u64, Ordering::Relaxed);
    }

    fn count_generated(&self) {
        self.generated_tokens.fetch_add(1, Ordering::Relaxed);
    }

    fn count_step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
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

/// How many sequences the context gets; refuses what does not fit into memory.
fn plan_sequences(model: &Model, config: &ContextConfig) -> Result<u32> {
    let per_token = model.description().kv_values_per_token;
    let n_ctx = u64::from(config.n_ctx.next_multiple_of(N_CTX_STEP));
    let one = config.kv_type.bytes(per_token) * n_ctx;
    let free = memory::available_bytes();
    let most = MOST_SEQUENCES.min(u64::from(config.n_batch));
    let wanted = match (config.n_seq_max, free) {
        (0, Some(free)) => (free / SHARE_OF_FREE_MEMORY / one.max(1)).clamp(1, most),
        (0, None) => 1,
        (n, _) => u64::from(n),
    };
    let needed = one * wanted;
    match free {
        Some(free) if needed > free => {
            let what = format!("a context of {wanted} × {} tokens", config.n_ctx);
            Err(Error::OutOfMemory { what, needed, free })
        }
        _ => Ok(wanted as u32),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
