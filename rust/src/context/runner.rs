//! What the scheduler needs of an engine, and the real one: llama.cpp through the shim.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::budget::Budget;
use super::core_waits::{CoreWaits, IdleCores};
use super::pace::Pace;
use super::pool::{Pool, Turn};
use crate::config::{ContextConfig, FlashAttention, KvType};
use crate::error::{Error, Result};
use crate::ffi::{self, ContextParams, MemoryUse, ShimContext, ShimPool};
use crate::log;
use crate::model::Model;

/// Runs batches. The scheduler owns one and calls it from its own thread only.
pub trait Runner {
    fn limits(&self) -> Limits;
    /// What most is computed on.
    fn device(&self) -> &'static str {
        "cpu"
    }
    /// Called once, on the thread that everything else is called on.
    fn begin(&mut self) {}
    fn run(&mut self, batch: &[Row]) -> Outcome;
    /// Whether the last run left half of the threads to another context.
    fn was_shared(&self) -> bool {
        false
    }
    /// Whether a run that was interrupted harms nobody but those of its batch.
    fn can_be_interrupted(&self) -> bool;
    /// The logits of one row of the last batch that wanted them.
    fn logits(&self, row: usize) -> Result<&[f32]>;
    /// Forgets what a slot holds from a position on. False: it can only forget everything.
    fn forget(&mut self, slot: usize, from: usize) -> bool;
    fn forget_all(&mut self);
    /// Whether what one slot holds can be copied to another, also while it is being used.
    fn can_copy(&self) -> bool;
    fn copy(&mut self, from: usize, to: usize) -> bool;
    /// Whether of what was saved a beginning can be used; otherwise it is all or nothing.
    fn can_cut_states(&self) -> bool;
    /// The bytes that `save` would give now.
    fn state_size(&self, slot: usize) -> usize;
    fn save(&mut self, slot: usize) -> Option<Vec<u8>>;
    /// Makes the slot hold what was saved; false leaves it empty.
    fn restore(&mut self, slot: usize, state: &[u8]) -> bool;
    /// Forgets `drop` tokens after the first `keep`, and moves the rest up. Only where
    /// `Limits::can_shift` says so. False: it can only be computed again from there on.
    fn shift(&mut self, slot: usize, keep: usize, drop: usize) -> bool;
    /// How much of a prompt with so many tokens to read the next step should have, beside so many who
    /// generate, when so many prompts wait.
    fn prompt_rows(&self, num_tokens: usize, num_generating: usize, num_prompts: usize) -> usize;
    fn piece(&self, token: i32, out: &mut Vec<u8>) -> Result<()>;
    /// As `piece`, but control tokens are written out, too.
    fn name(&self, token: i32, out: &mut Vec<u8>) -> Result<()> {
        self.piece(token, out)
    }
    fn end_tokens(&self) -> Vec<i32>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens that one slot can hold.
    pub n_ctx: usize,
    /// Rows of one batch.
    pub n_batch: usize,
    pub n_slots: usize,
    /// Whether a part of what a slot holds can be dropped, and the rest move up.
    pub can_shift: bool,
}

/// One token on its way through the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub token: i32,
    pub position: usize,
    pub slot: usize,
    pub wants_logits: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The memory has no room for this batch; it is as before.
    NoRoom,
    /// Interrupted; some of the batch may have been computed.
    Aborted,
    /// The batch does not go on where the memory ends, or is broken otherwise; nothing was computed.
    Refused(String),
    /// There was no memory for the step itself; some of the batch may have been computed.
    Exhausted,
    Failed(String),
}

/// Ends the decode that is under way on a CPU: when set from any thread, or when its time is over.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<InterruptState>);

#[derive(Default)]
struct InterruptState {
    is_set: AtomicBool,
    /// Grows whenever llama.cpp asks, between two nodes of its graph, and with each turn of the loop.
    beats: AtomicU64,
    /// Touched by the owner thread only, which is also the one that llama.cpp asks on.
    deadline: Mutex<Option<Instant>>,
}

impl Interrupt {
    pub fn set(&self) {
        self.0.is_set.store(true, Ordering::Relaxed);
    }

    pub fn clear(&self) {
        self.0.is_set.store(false, Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.is_set.load(Ordering::Relaxed)
    }

    /// The owner thread is alive.
    pub fn beat(&self) {
        self.0.beat();
    }

    pub fn beats(&self) -> u64 {
        self.0.beats.load(Ordering::Relaxed)
    }

    fn set_deadline(&self, deadline: Option<Instant>) {
        *self.0.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }
}

impl InterruptState {
    fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    fn wants_an_end(&self) -> bool {
        self.beat();
        let deadline = *self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_set.load(Ordering::Relaxed)
            || deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

/// llama.cpp rounds the length of a sequence up to a multiple of this.
pub const N_CTX_STEP: u32 = 256;

/// The threads that a step can be computed on.
struct Crew {
    /// A single thread has none: it is the one that asks.
    pool: Option<Arc<Pool>>,
    pace: Pace,
    /// Of its threads, where it is known.
    waits: Option<CoreWaits>,
    idle: IdleCores,
}

impl Crew {
    fn new(pool: Option<Arc<Pool>>, n_threads: u32) -> Crew {
        Crew { pool, pace: Pace::new(n_threads), waits: None, idle: IdleCores::default() }
    }

    /// For the half of so many threads, and on the thread that will ask. Without the threads that it
    /// would have, one is enough.
    fn half_of(n_threads: u32) -> Crew {
        let n_half = n_threads / 2;
        let pool = (n_half > 1).then(|| Pool::new(n_half)).and_then(Result::ok);
        let n_threads = if pool.is_some() { n_half } else { 1 };
        // SAFETY: it changes nothing but the kernel's idea of this thread, which making the pool took back.
        unsafe { ffi::ta_thread_computes(true) }
        let mut crew = Crew::new(pool, n_threads);
        crew.watch_waits();
        crew
    }

    fn pool(&self) -> *mut ShimPool {
        self.pool.as_ref().map_or(std::ptr::null_mut(), |pool| pool.as_ptr())
    }

    /// To be called on the thread that will ask.
    fn watch_waits(&mut self) {
        self.waits = self.pool.as_ref().and_then(|pool| CoreWaits::of(pool.workers()));
    }

    /// For the step that is about to begin.
    fn threads(&mut self) -> u32 {
        self.pace.threads(Instant::now(), || self.idle.since_last())
    }

    fn waited(&self) -> Option<Duration> {
        self.waits.as_ref().and_then(CoreWaits::total)
    }
}

pub struct LlamaRunner {
    context: *mut ShimContext,
    limits: Limits,
    end_tokens: Vec<i32>,
    budget: Budget,
    /// The pool and the number of threads that llama.cpp was told last.
    told: (*mut ShimPool, u32),
    has_bf16_keys: bool,
    /// Whether it computes on the threads that it shares with other contexts.
    takes_turns: bool,
    /// How many of the last tokens some layers see; 0 where all layers see all of them.
    window: i32,
    /// A copy between streams waits for the next decode.
    is_copying: bool,
    was_shared: bool,
    // The context points to these; they go after it.
    all: Crew,
    /// Made when the first turn with half of the threads comes.
    half: Option<Crew>,
    interrupt: Interrupt,
    model: Arc<Model>,
}

// SAFETY: made on one thread and moved to its owner thread; never shared.
unsafe impl Send for LlamaRunner {}

impl LlamaRunner {
    pub fn new(
        model: Arc<Model>,
        config: &ContextConfig,
        n_seq_max: u32,
        n_threads: u32,
        interrupt: Interrupt,
    ) -> Result<LlamaRunner> {
        let n_ctx_all =
            config.n_ctx.next_multiple_of(N_CTX_STEP).checked_mul(n_seq_max).ok_or_else(|| {
                let allowed = format!("small enough for {n_seq_max} sequences");
                Error::invalid("n_ctx", config.n_ctx, &allowed)
            })?;
        // What runs on a GPU only needs threads for odds and ends, and nobody should wait for it.
        let takes_turns = n_threads > 1 && model.gpu_layers() <= model.layer_count();
        let pool = match n_threads {
            1 => None,
            n if takes_turns => Some(Pool::shared(n)?),
            n => Some(Pool::new(n)?),
        };
        let all = Crew::new(pool, n_threads);
        let rows_at_once = match model.gpu_layers() {
            0 => config.flash_attn.rows_at_once(n_seq_max),
            _ => FlashAttention::On.rows_at_once(n_seq_max),
        };
        let n_ubatch = config.n_batch.min(rows_at_once);
        // A step that cannot be interrupted should not take longer than it has to.
        let n_batch = if can_be_interrupted(&model) { config.n_batch } else { n_ubatch };
        let params = ContextParams {
            n_ctx: n_ctx_all,
            n_batch,
            n_ubatch,
            n_seq_max,
            n_outputs_max: n_seq_max,
            n_threads: n_threads as i32,
            flash_attn: match config.flash_attn {
                FlashAttention::Auto => -1,
                FlashAttention::Off => 0,
                FlashAttention::On => 1,
            },
            kv_type: config.kv_type.ggml_type(),
            pool: all.pool(),
            kv_unified: false,
            offload_kqv: config.offload_kqv,
            abort: Some(wants_an_end),
            abort_data: Arc::as_ptr(&interrupt.0).cast_mut().cast(),
        };
        let mut context = std::ptr::null_mut();
        let one_at_a_time = model.creating();
        let (made, errors) = log::listen(|| {
            // SAFETY: the model is alive, and the interrupt outlives the context.
            ffi::call(|error| unsafe {
                ffi::ta_context_new(model.as_ptr(), &params, &mut context, error)
            })
        });
        drop(one_at_a_time);
        made.map_err(|error| {
            let reason = errors.first().cloned().unwrap_or_else(|| error.to_string());
            Error::ContextCreation { n_ctx: config.n_ctx, reason }
        })?;
        // SAFETY: it was just made.
        let limits = unsafe {
            Limits {
                n_ctx: (ffi::ta_context_n_ctx_seq(context) as usize).min(config.n_ctx as usize),
                n_batch: ffi::ta_context_n_batch(context) as usize,
                n_slots: ffi::ta_context_n_seq_max(context) as usize,
                can_shift: ffi::ta_can_shift(context),
            }
        };
        let end_tokens = model.vocabulary().end_tokens();
        Ok(LlamaRunner {
            context,
            limits,
            end_tokens,
            budget: Budget::new(limits.n_batch),
            told: (all.pool(), n_threads),
            has_bf16_keys: config.kv_type == KvType::Bf16,
            takes_turns,
            // SAFETY: the model is alive.
            window: unsafe { llama_cpp_sys_2::llama_model_n_swa(model.as_ptr()) },
            is_copying: false,
            was_shared: false,
            all,
            half: None,
            interrupt,
            model,
        })
    }

    /// What llama.cpp allocated for the context and for the weights.
    pub fn memory(&self) -> Result<Vec<MemoryUse>> {
        // SAFETY: the context is alive, and nobody else uses it.
        unsafe { ffi::memory(self.context) }
    }

    /// The first decode allocates and touches what later ones reuse. One thread goes first: how long
    /// it takes alone says when several are being disturbed.
    pub fn warm_up(&mut self) -> Result<()> {
        let most = self.all.pace.most();
        let row = [Row { token: 0, position: 0, slot: 0, wants_logits: true }];
        for threads in [1, 1, most] {
            let turn = self.takes_turns.then(|| Turn::take(false));
            let outcome = self.run_on(false, threads, &row);
            drop(turn);
            self.forget_all();
            match outcome {
                Outcome::Done | Outcome::Aborted => {}
                Outcome::Exhausted => return Err(Error::StepMemory { device: self.device() }),
                other => {
                    return Err(Error::internal(format!("the first decode failed: {other:?}")));
                }
            }
        }
        Ok(())
    }

    fn crew(&mut self, is_half: bool) -> &mut Crew {
        if is_half {
            let all = self.all.pace.most();
            self.half.get_or_insert_with(|| Crew::half_of(all))
        } else {
            &mut self.all
        }
    }

    fn run_on(&mut self, is_half: bool, threads: u32, batch: &[Row]) -> Outcome {
        let can_be_interrupted = self.can_be_interrupted();
        let crew = self.crew(is_half);
        let limit = crew.pace.limit(batch.len(), threads).filter(|_| can_be_interrupted);
        let waited_before = crew.waited();
        let computes = (crew.pool(), threads);
        if computes != self.told {
            // SAFETY: context and pool are alive, the pool has at least so many threads, and this turn is ours.
            unsafe { ffi::ta_context_set_threads(self.context, computes.0, threads as i32) };
            self.told = computes;
        }
        let begun = Instant::now();
        self.interrupt.set_deadline(limit.map(|limit| begun + limit));
        // An interrupted decode is nothing to complain about.
        let is_news = |outcome: &Outcome| *outcome != Outcome::Aborted;
        let outcome = log::unless_expected(|| self.decode(batch), is_news);
        self.is_copying = false;
        let now = Instant::now();
        let was_too_slow = outcome == Outcome::Aborted && !self.interrupt.is_set();
        let crew = self.crew(is_half);
        if was_too_slow {
            crew.pace.gave_up(now);
        } else if outcome == Outcome::Done {
            let waited = crew.waited();
            let waited = waited.zip(waited_before).map(|(now, then)| now.saturating_sub(then));
            crew.pace.took(batch.len(), threads, now - begun, waited, now);
            if !is_half {
                let generating = count_generating(batch);
                self.budget.took(generating, batch.len() - generating, now - begun);
            }
        }
        outcome
    }

    fn decode(&mut self, batch: &[Row]) -> Outcome {
        // SAFETY: the scheduler keeps to n_batch rows, known tokens and its own slots.
        let status = unsafe {
            ffi::ta_batch_clear(self.context);
            for row in batch {
                let (position, slot) = (row.position as i32, row.slot as i32);
                ffi::ta_batch_add(self.context, row.token, position, slot, row.wants_logits);
            }
            ffi::call(|error| ffi::ta_decode(self.context, error))
        };
        match status {
            Ok(0) => Outcome::Done,
            Ok(ffi::DECODE_NO_ROOM) => Outcome::NoRoom,
            Ok(ffi::DECODE_ABORTED) => Outcome::Aborted,
            Ok(ffi::DECODE_EXHAUSTED) => Outcome::Exhausted,
            Ok(ffi::DECODE_REFUSED) => Outcome::Refused(self.misfits(batch)),
            Ok(status) => Outcome::Failed(format!("llama_decode gave {status}")),
            Err(Error::Exhausted { .. }) => Outcome::Exhausted, // it threw
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }
}

impl LlamaRunner {
    /// Where the batch does not go on from what llama.cpp holds.
    fn misfits(&self, batch: &[Row]) -> String {
        let mut found = vec!["llama.cpp refused a batch".to_owned()];
        for rows in batch.chunk_by(|a, b| a.slot == b.slot) {
            let Row { slot, position, .. } = rows[0];
            // SAFETY: one of the context's own sequences.
            let held = unsafe { ffi::ta_sequence_last(self.context, slot as i32) } + 1;
            if held != position as i32 {
                found.push(format!(
                    "slot {slot} holds {held} tokens and was to go on at {position}"
                ));
            }
        }
        found.join("; ")
    }
}

impl Runner for LlamaRunner {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn device(&self) -> &'static str {
        if self.model.gpu_layers() > 0 { "gpu" } else { "cpu" }
    }

    fn begin(&mut self) {
        self.all.watch_waits();
        // SAFETY: it changes nothing but the kernel's idea of this thread.
        unsafe { ffi::ta_thread_computes(true) }
    }

    fn run(&mut self, batch: &[Row]) -> Outcome {
        // Who only generates is as well off with half of the threads as with all in turns.
        let can_share = count_generating(batch) == batch.len();
        let turn = self.takes_turns.then(|| Turn::take(can_share));
        self.was_shared = turn.as_ref().is_some_and(Turn::is_half);
        let threads = self.crew(self.was_shared).threads();
        self.run_on(self.was_shared, threads, batch)
    }

    fn was_shared(&self) -> bool {
        self.was_shared
    }

    fn can_be_interrupted(&self) -> bool {
        can_be_interrupted(&self.model)
    }

    fn logits(&self, row: usize) -> Result<&[f32]> {
        let mut logits = std::ptr::null();
        // SAFETY: a row of the last batch; llama.cpp checks it and gives NULL otherwise.
        ffi::call(|error| unsafe { ffi::ta_logits(self.context, row as i32, &mut logits, error) })?;
        if logits.is_null() {
            return Err(Error::internal(format!("row {row} has no logits")));
        }
        // SAFETY: llama.cpp gives as many numbers as the vocabulary has tokens, until the next run.
        Ok(unsafe { std::slice::from_raw_parts(logits, self.model.vocab_size() as usize) })
    }

    fn forget(&mut self, slot: usize, from: usize) -> bool {
        // Of what was saved with a window, there are no tokens before the window to go back to.
        if self.window > 0 && from > 0 {
            // SAFETY: one of the context's own sequences.
            let first = unsafe { ffi::ta_sequence_first(self.context, slot as i32) };
            if first > 0 && first > from as i32 - self.window {
                return false;
            }
        }
        // SAFETY: one of the context's own sequences.
        unsafe { ffi::ta_sequence_remove(self.context, slot as i32, from as i32, -1) }
    }

    fn forget_all(&mut self) {
        // SAFETY: the context is alive.
        unsafe { ffi::ta_memory_clear(self.context) }
    }

    fn can_copy(&self) -> bool {
        !self.model.description().is_recurrent
    }

    /// Through main memory: llama.cpp's own copy between streams moves all cells, also the empty ones,
    /// and only with the next decode. But of a window's cache what is saved is only the window.
    fn copy(&mut self, from: usize, to: usize) -> bool {
        if self.window == 0 {
            return self.save(from).is_some_and(|state| self.restore(to, &state));
        }
        self.is_copying = true;
        // SAFETY: two of the context's own sequences.
        unsafe { ffi::ta_sequence_copy(self.context, from as i32, to as i32) }
    }

    fn can_cut_states(&self) -> bool {
        self.window == 0 && !self.model.description().is_recurrent
    }

    fn state_size(&self, slot: usize) -> usize {
        // SAFETY: one of the context's own sequences.
        unsafe { ffi::ta_sequence_state_size(self.context, slot as i32) }
    }

    fn save(&mut self, slot: usize) -> Option<Vec<u8>> {
        if self.is_copying {
            return None; // what is copied arrives with the next decode
        }
        let size = self.state_size(slot);
        let mut state = Vec::new();
        state.try_reserve_exact(size).ok()?; // where there is no memory, it is computed again
        // SAFETY: one of the context's own sequences, and a place as large as was asked for, which was
        // filled as far as llama.cpp says.
        unsafe {
            let place = state.as_mut_ptr();
            let written = ffi::ta_sequence_state_get(self.context, slot as i32, place, size);
            state.set_len(written.min(size));
        }
        (size > 0 && state.len() == size).then_some(state)
    }

    fn restore(&mut self, slot: usize, state: &[u8]) -> bool {
        if self.is_copying {
            return false; // somebody may still be copied from here
        }
        self.forget(slot, 0); // an empty state would leave what is there
        // SAFETY: one of the context's own sequences, and bytes that `save` wrote.
        let read = unsafe {
            ffi::ta_sequence_state_set(self.context, slot as i32, state.as_ptr(), state.len())
        };
        if read == 0 {
            self.forget(slot, 0);
        }
        read > 0
    }

    fn shift(&mut self, slot: usize, keep: usize, drop: usize) -> bool {
        // To move keys they are rotated, and ggml answers the rotation of bf16 with an abort.
        // SAFETY: one of the context's own sequences; the shim asks whether it can.
        !self.has_bf16_keys
            && unsafe {
                ffi::ta_sequence_shift(self.context, slot as i32, keep as i32, drop as i32)
            }
    }

    fn prompt_rows(&self, num_tokens: usize, num_generating: usize, num_prompts: usize) -> usize {
        // Another context that waits for its turn is a neighbour like any other.
        match num_generating.max(usize::from(self.takes_turns && Turn::is_contended())) {
            0 => self.budget.rows_undisturbed(),
            n => self.budget.rows(num_tokens, n, num_prompts),
        }
    }

    fn piece(&self, token: i32, out: &mut Vec<u8>) -> Result<()> {
        self.model.vocabulary().piece(token, false, out)
    }

    fn name(&self, token: i32, out: &mut Vec<u8>) -> Result<()> {
        self.model.vocabulary().piece(token, true, out)
    }

    fn end_tokens(&self) -> Vec<i32> {
        self.end_tokens.clone()
    }
}

impl Drop for LlamaRunner {
    fn drop(&mut self) {
        let _one_at_a_time = self.model.creating();
        // SAFETY: nobody else has it.
        unsafe { ffi::ta_context_free(self.context) }
    }
}

/// Rows that are all of their slot in the batch; it is sorted by slots.
fn count_generating(batch: &[Row]) -> usize {
    batch.chunk_by(|a, b| a.slot == b.slot).filter(|rows| rows.len() == 1).count()
}

/// llama.cpp writes down which states a step moves and clears before it does so. After a step that was
/// cut short, a new sequence would begin with the state of a forgotten one.
fn can_be_interrupted(model: &Model) -> bool {
    !model.description().is_recurrent
}

unsafe extern "C" fn wants_an_end(interrupt: *mut c_void) -> bool {
    // SAFETY: the runner keeps the interrupt alive as long as its context.
    unsafe { &*interrupt.cast::<InterruptState>() }.wants_an_end()
}
