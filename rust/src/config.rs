//! What was asked for, checked once when it comes in and trusted afterwards.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};

#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub path: PathBuf,
    /// -1 means all of them.
    pub gpu_layers: i32,
    pub main_gpu: i32,
    pub split_mode: SplitMode,
    pub mmap: bool,
    pub mlock: bool,
    pub vocab_only: bool,
    /// Lay weights out anew for the CPU: `None` does it where it pays.
    pub repack: Option<bool>,
    /// For contexts made with [`Model::create_context`](crate::model::Model::create_context).
    pub context: ContextConfig,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitMode {
    None,
    Layer,
    Row,
}

impl ModelConfig {
    /// Refuses a path where nothing is; whether it is a model shows when it is loaded.
    pub fn new(path: impl AsRef<Path>) -> Result<ModelConfig> {
        let path = path.as_ref();
        // What cannot be looked at is there all the same; reading it will say why.
        if matches!(path.try_exists(), Ok(false)) {
            return Err(Error::ModelNotFound { path: path.to_path_buf() });
        }
        Ok(ModelConfig {
            path: path.to_path_buf(),
            gpu_layers: -1,
            main_gpu: 0,
            split_mode: SplitMode::Layer,
            mmap: true,
            mlock: false,
            vocab_only: false,
            repack: None,
            context: ContextConfig::default(),
        })
    }

    pub fn with_gpu_layers(self, gpu_layers: i32) -> ModelConfig {
        ModelConfig { gpu_layers, ..self }
    }

    pub fn with_context_size(mut self, n_ctx: u32) -> ModelConfig {
        self.context.n_ctx = n_ctx;
        self
    }

    pub fn with_mlock(self, mlock: bool) -> ModelConfig {
        ModelConfig { mlock, ..self }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct ContextConfig {
    /// Tokens that one sequence can hold; capped to what the model was trained with.
    pub n_ctx: u32,
    /// Tokens of one step, all sequences together.
    pub n_batch: u32,
    /// 0 means the physical cores that this process may use, at most 8.
    pub n_threads: u32,
    /// 0 means as many as the memory suggests.
    pub n_seq_max: u32,
    pub queue_size: usize,
    /// Megabytes of main memory for what slots held and lost; -1 means as much as the slots take, at
    /// most a sixteenth of the free memory.
    pub prompt_cache_mb: i64,
    pub flash_attn: FlashAttention,
    pub kv_type: KvType,
    pub offload_kqv: bool,
    /// Decode a token before the first request does, so that it need not wait for what that sets up.
    pub warmup: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlashAttention {
    Auto,
    Off,
    On,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    Auto,
    F32,
    F16,
    Bf16,
    Q8_0,
}

impl FlashAttention {
    pub const ALL: [FlashAttention; 3] =
        [FlashAttention::Auto, FlashAttention::On, FlashAttention::Off];

    pub fn name(self) -> &'static str {
        match self {
            FlashAttention::Auto => "auto",
            FlashAttention::On => "on",
            FlashAttention::Off => "off",
        }
    }
}

impl KvType {
    pub const ALL: [KvType; 5] =
        [KvType::Auto, KvType::F16, KvType::Bf16, KvType::F32, KvType::Q8_0];

    pub fn name(self) -> &'static str {
        match self {
            KvType::Auto => "auto",
            KvType::F16 => "f16",
            KvType::Bf16 => "bf16",
            KvType::F32 => "f32",
            KvType::Q8_0 => "q8_0",
        }
    }

    /// Bytes of `elements` values, which are a multiple of the block size.
    pub fn bytes(self, elements: u64) -> u64 {
        match self {
            KvType::F32 => elements * 4,
            KvType::Auto | KvType::F16 | KvType::Bf16 => elements * 2,
            KvType::Q8_0 => elements / 32 * 34,
        }
    }

    /// Its number in ggml. What is still open is f16, as in llama.cpp.
    pub(crate) fn ggml_type(self) -> i32 {
        let number = match self {
            KvType::F32 => llama_cpp_sys_2::GGML_TYPE_F32,
            KvType::Auto | KvType::F16 => llama_cpp_sys_2::GGML_TYPE_F16,
            KvType::Bf16 => llama_cpp_sys_2::GGML_TYPE_BF16,
            KvType::Q8_0 => llama_cpp_sys_2::GGML_TYPE_Q8_0,
        };
        number as i32
    }
}

impl Default for ContextConfig {
    fn default() -> ContextConfig {
        ContextConfig {
            n_ctx: 4096,
            n_batch: 512,
            n_threads: 0,
            n_seq_max: 0,
            queue_size: 1024,
            prompt_cache_mb: -1,
            flash_attn: FlashAttention::Auto,
            kv_type: KvType::Auto,
            offload_kqv: true,
            warmup: true,
        }
    }
}

impl ContextConfig {
    pub fn validate(&self) -> Result<()> {
        check("n_ctx", self.n_ctx, 8, 1 << 24)?;
        check("n_batch", self.n_batch, 1, 1 << 16)?;
        check("n_threads", self.n_threads, 0, 512)?;
        check("n_seq_max", self.n_seq_max, 0, 256)?;
        check("queue_size", self.queue_size, 1, 1_000_000)?;
        check("prompt_cache_mb", self.prompt_cache_mb, -1, 1 << 24)?;
        // llama.cpp asserts on more sequences than a batch has rows.
        if self.n_seq_max > self.n_batch {
            let allowed = format!("at most `n_batch` ({})", self.n_batch);
            return Err(Error::invalid("n_seq_max", self.n_seq_max, &allowed));
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// -1 means until the context is full.
    pub max_tokens: i64,
    /// 0 means greedy.
    pub temperature: f32,
    pub top_p: f32,
    /// 0 means off.
    pub top_k: u32,
    pub min_p: f32,
    pub repeat_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// How many of the last tokens the penalties look at; -1 means the whole context.
    pub penalty_last_n: i32,
    pub stop: Vec<String>,
    /// -1 means a random one.
    pub seed: i64,
    pub ignore_eos: bool,
    pub min_tokens: u32,
    pub timeout: Option<Duration>,
    /// The longest time to wait for a slot.
    pub max_queue_wait: Option<Duration>,
    pub priority: Priority,
    pub overflow: Overflow,
    /// How many tokens of the beginning a shift keeps; -1 means the prompt, at most half the context.
    pub n_keep: i64,
    /// Nothing is generated; the prompt is computed and stays in the prompt cache.
    pub pin: bool,
    pub add_bos: bool,
    /// Control tokens written in a text prompt become control tokens.
    pub special: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    High,
    Normal,
    Low,
}

/// What happens when the context is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// A prompt that does not fit is refused, an answer ends there.
    Error,
    /// The older half of what may go is dropped, and the rest moves up.
    Shift,
}

impl Default for GenerationConfig {
    fn default() -> GenerationConfig {
        GenerationConfig {
            max_tokens: 512,
            temperature: 0.7,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.0,
            repeat_penalty: 1.1,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_last_n: 64,
            stop: Vec::new(),
            seed: -1,
            ignore_eos: false,
            min_tokens: 0,
            timeout: None,
            max_queue_wait: None,
            priority: Priority::Normal,
            overflow: Overflow::Error,
            n_keep: -1,
            pin: false,
            add_bos: true,
            special: false,
        }
    }
}

impl GenerationConfig {
    pub fn validate(&self) -> Result<()> {
        check("max_tokens", self.max_tokens, -1, i64::from(i32::MAX))?;
        check("temperature", self.temperature, 0.0, 100.0)?;
        check("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        check("top_k", self.top_k, 0, i32::MAX as u32)?;
        check("min_p", self.min_p, 0.0, 1.0 - f32::EPSILON)?;
        check("repeat_penalty", self.repeat_penalty, f32::MIN_POSITIVE, 10.0)?;
        check("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        check("penalty_last_n", self.penalty_last_n, -1, 1 << 24)?;
        check("seed", self.seed, -1, i64::MAX)?;
        check("n_keep", self.n_keep, -1, 1 << 24)?;
        check("the number of `stop` strings", self.stop.len(), 0, 64)?;
        for stop in &self.stop {
            check("the bytes of each `stop` string", stop.len(), 1, 4096)?;
        }
        Ok(())
    }

    /// How many tokens of the beginning stay when the context overflows.
    pub fn kept_tokens(&self, num_prompt: usize, n_ctx: usize) -> usize {
        usize::try_from(self.n_keep).unwrap_or(num_prompt).min(num_prompt).min(n_ctx / 2)
    }
}

/// NaN is in no range, so it is refused with the rest.
fn check<T: PartialOrd + std::fmt::Display>(name: &str, value: T, low: T, high: T) -> Result<()> {
    if value >= low && value <= high {
        return Ok(());
    }
    Err(Error::invalid(name, value, &format!("from {low} to {high}")))
}
