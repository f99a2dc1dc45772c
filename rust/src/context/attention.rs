//! Which attention a context computes with: flash attention or the plain one, over which type of cache.
//!
//! No choice is best everywhere: it depends on the processor, its module, the shape of the heads and
//! the depth, and the slowest takes several times as long as the fastest. So it is measured. What was
//! measured is remembered, and compared, in Python (`_attention.py`); without it there is a built-in
//! rule.

use std::time::Duration;

use super::plan::Plan;
use super::pool::Turn;
use super::runner::N_CTX_STEP;
use super::stopwatch::least_in_calm;
use super::{threads_of, trained};
use crate::config::{ContextConfig, FlashAttention, KvType};
use crate::error::{Error, Result};
use crate::ffi::{self, AttentionCase, AttentionShape};
use crate::gguf::Description;
use crate::hardware::modules;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    pub flash_attn: FlashAttention,
    pub kv_type: KvType,
}

/// All that keep the quality of llama.cpp's own choice, which is the first.
///
/// Flash attention comes with f16 only: for it, llama.cpp turns an f32 cache into f16 at every step,
/// and computes a bf16 one without its fast paths, three to six times slower in prompts wherever we
/// looked.
pub const ALL: [Attention; 4] = [
    Attention { flash_attn: FlashAttention::On, kv_type: KvType::F16 },
    Attention { flash_attn: FlashAttention::Off, kv_type: KvType::F16 },
    PLAIN_BF16,
    Attention { flash_attn: FlashAttention::Off, kv_type: KvType::F32 },
];
const PLAIN_BF16: Attention = Attention { flash_attn: FlashAttention::Off, kv_type: KvType::Bf16 };

/// The heads that rust/kernels/attention.cpp is written for.
const KERNEL_DIMS: [u32; 6] = [32, 64, 80, 96, 128, 256];

/// The scores of a step without flash attention take at most this share of the free memory.
const SHARE_OF_FREE_MEMORY: u64 = 8;

/// What a context leaves open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub heads: Heads,
    /// The depth that is measured for: a power of two.
    pub n_ctx: u32,
    pub n_threads: u32,
    /// Those to choose from, llama.cpp's own choice first.
    pub choices: Vec<Attention>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    pub dim: u32,
    pub count: u32,
    pub count_kv: u32,
}

impl Options {
    /// None: nothing is open, or it is llama.cpp's to choose: on a GPU, or where attention is of a
    /// kind that is not measured here.
    pub fn of(
        description: &Description,
        config: &ContextConfig,
        gpu_layers: u32,
        free: Option<u64>,
    ) -> Option<Options> {
        let is_open = config.flash_attn == FlashAttention::Auto || config.kv_type == KvType::Auto;
        if !is_open || gpu_layers > 0 {
            return None;
        }
        let heads = Heads::of(description)?;
        let n_ctx = trained(description, config.n_ctx);
        let config = ContextConfig { n_ctx, ..config.clone() };
        let choices = ALL.into_iter().filter(|choice| {
            choice.agrees_with(&config) && choice.fits(description, &config, heads, free)
        });
        let choices: Vec<Attention> = choices.collect();
        let n_threads = threads_of(&config);
        (!choices.is_empty()).then(|| Options { heads, n_ctx: depth(n_ctx), n_threads, choices })
    }

    /// Without a measurement: llama.cpp's own choice, which is what our kernels compute; without them,
    /// another one if the CPU module multiplies bf16 natively. On both processors that were looked at
    /// and do, plain attention over a cache of bf16 then decoded 1.4 to 2.6 times as fast at depth, and
    /// read prompts a few percent slower.
    pub fn built_in(&self) -> Attention {
        let has_kernel = modules::has_kernels() && KERNEL_DIMS.contains(&self.heads.dim);
        let has_bf16 = ffi::cpu_has(c"AVX512_BF16") && !has_kernel;
        match self.choices.contains(&PLAIN_BF16) && has_bf16 {
            true => PLAIN_BF16,
            false => self.choices[0],
        }
    }
}

impl Heads {
    pub fn of(description: &Description) -> Option<Heads> {
        let is_usual = description.n_head > 0
            && description.n_head_kv > 0
            && description.head_dim_k == description.head_dim_v
            && description.architecture != "grok"
            && !description.caps_scores;
        is_usual.then_some(Heads {
            dim: description.head_dim_k,
            count: description.n_head,
            count_kv: description.n_head_kv,
        })
    }

    /// Refuses what ggml would answer with an abort.
    fn check(self) -> Result<Heads> {
        let Heads { dim, count, count_kv } = self;
        let is_sound =
            [dim, count, count_kv].iter().all(|n| (1..=4096).contains(n)) && count % count_kv == 0;
        let allowed = "1 to 4096 each, the second a multiple of the third";
        let shown = || format!("{dim}, {count}, {count_kv}");
        is_sound.then_some(self).ok_or_else(|| Error::invalid("heads", shown(), allowed))
    }
}

impl Attention {
    fn agrees_with(self, config: &ContextConfig) -> bool {
        let Attention { flash_attn, kv_type } = self;
        (config.flash_attn == FlashAttention::Auto || config.flash_attn == flash_attn)
            && (config.kv_type == KvType::Auto || config.kv_type == kv_type)
    }

    /// Nobody gets fewer sequences, or runs out of memory, for the sake of a choice of ours.
    fn fits(
        self,
        description: &Description,
        config: &ContextConfig,
        heads: Heads,
        free: Option<u64>,
    ) -> bool {
        let sequences = |kv_type| {
            let config = ContextConfig { kv_type, ..config.clone() };
            let plan = Plan::of(description, &config, free);
            plan.check(&config, free).ok().map(|()| plan.n_seq_max)
        };
        let same_sequences =
            self.kv_type == config.kv_type || sequences(self.kv_type) == sequences(KvType::F16);
        let rows = u64::from(config.n_batch.min(self.flash_attn.rows_at_once(config.n_seq_max)));
        let cells = u64::from(config.n_ctx.next_multiple_of(N_CTX_STEP));
        let scores = rows * cells * u64::from(heads.count) * 4;
        let has_room = config.flash_attn == self.flash_attn
            || self.flash_attn == FlashAttention::On
            || free.is_none_or(|free| scores <= free / SHARE_OF_FREE_MEMORY);
        same_sequences && has_room
    }
}

/// Beyond the largest of them everything grows evenly, and measuring would only take longer.
fn depth(n_ctx: u32) -> u32 {
    n_ctx.clamp(512, 4096).next_power_of_two()
}

/// How long the attention of one layer takes: of one token of a prompt, and of one of the answer.
///
/// Both grow with the depth, and evenly enough that one look in the middle of a typical use is
/// enough: a prompt of half the context, then an answer of a quarter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    pub attention: Attention,
    pub prompt_token: Duration,
    pub answer_token: Duration,
}

/// Rows of a prompt that are computed together. Plain attention computes all of them up to the depth of
/// the last, so the more they are the more of it is for nothing; with fewer, the weights are read more
/// often than the products take.
const FLASH_ROWS: u32 = 512;
const PLAIN_ROWS: u32 = 128;

impl FlashAttention {
    pub fn rows_at_once(self, n_seq_max: u32) -> u32 {
        if self == FlashAttention::Off { PLAIN_ROWS.max(n_seq_max) } else { FLASH_ROWS }
    }
}

const BUDGET: Duration = Duration::from_millis(900);

/// Times every attention on the CPU, in about a second at most. None: the machine was busy.
pub fn measure(heads: Heads, n_ctx: u32, n_threads: u32) -> Result<Option<Vec<Timing>>> {
    let n_threads = n_threads.clamp(1, 512);
    let mut stopwatch = Stopwatch::new(heads.check()?, depth(n_ctx), n_threads)?;
    let least = least_in_calm(n_threads, BUDGET, ALL.map(Timing::unknown), |least| {
        least.iter_mut().try_for_each(|timing| stopwatch.time(timing))
    })?;
    Ok(least.map(Vec::from))
}

impl Timing {
    fn unknown(attention: Attention) -> Timing {
        Timing { attention, prompt_token: Duration::MAX, answer_token: Duration::MAX }
    }
}

struct Stopwatch {
    attention: *mut ffi::ShimAttention,
    n_ctx: u32,
}

impl Stopwatch {
    fn new(heads: Heads, n_ctx: u32, n_threads: u32) -> Result<Stopwatch> {
        let shape = AttentionShape {
            head_dim: heads.dim as i32,
            n_head: heads.count as i32,
            n_head_kv: heads.count_kv as i32,
            n_ctx: n_ctx as i32,
        };
        let mut attention = std::ptr::null_mut();
        // SAFETY: plain values in, and a pointer of ours for what is made.
        ffi::call(|error| unsafe {
            ffi::ta_attention_new(&shape, n_threads as i32, &mut attention, error)
        })?;
        Ok(Stopwatch { attention, n_ctx })
    }

    /// Keeps the least of what was seen before and now.
    fn time(&mut self, timing: &mut Timing) -> Result<()> {
        let rows = timing.attention.flash_attn.rows_at_once(1).min(self.n_ctx / 2);
        let prompt = self.look(timing.attention, rows, self.n_ctx / 4 + rows / 2)? / rows;
        let answer = self.look(timing.attention, 1, self.n_ctx / 8 * 5)?;
        timing.prompt_token = timing.prompt_token.min(prompt);
        timing.answer_token = timing.answer_token.min(answer);
        Ok(())
    }

    fn look(&mut self, attention: Attention, rows: u32, depth: u32) -> Result<Duration> {
        let case = AttentionCase {
            flash_attn: attention.flash_attn == FlashAttention::On,
            kv_type: attention.kv_type.ggml_type(),
            rows: rows as i32,
            n_kv: depth.next_multiple_of(N_CTX_STEP) as i32,
        };
        let mut seconds = 0.0;
        let _turn = Turn::take(false); // contexts that compute meanwhile are no disturbance
        // SAFETY: the stopwatch is alive, and the cells that are looked at are among its own.
        ffi::call(|error| unsafe {
            ffi::ta_attention_time(self.attention, &case, &mut seconds, error)
        })?;
        Ok(Duration::from_secs_f64(seconds))
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        unsafe { ffi::ta_attention_free(self.attention) }
    }
}
