//! What was asked for, checked once when it comes in and trusted afterwards.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};

#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub path: PathBuf,
    /// -1 means all of them.
    pub gpu_layers: i32,
    pub main_gpu: i32,
    pub split_mode: SplitMode,
    /// How much of the model each GPU gets, in any unit; empty means by their free memory.
    pub tensor_split: Vec<f32>,
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
            tensor_split: Vec::new(),
            mmap: true,
            mlock: false,
            vocab_only: false,
            repack: None,
            context: ContextConfig::default(),
        })
    }

    /// Refuses what llama.cpp would divide by or read past.
    pub fn validate(&self) -> Result<()> {
        check("gpu_layers", self.gpu_layers, -1, i32::MAX)?;
        check("main_gpu", self.main_gpu, 0, 255)?;
        check("the number of `tensor_split` entries", self.tensor_split.len(), 0, MOST_GPUS)?;
        for (gpu, share) in self.tensor_split.iter().enumerate() {
            check(&format!("tensor_split[{gpu}]"), *share, 0.0, f32::MAX)?;
        }
        if !self.tensor_split.is_empty() && self.tensor_split.iter().all(|&share| share == 0.0) {
            return Err(Error::invalid("tensor_split", "zeros only", "more than 0 somewhere"));
        }
        self.context.validate()
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

/// The samplers work in the order of `context::sampler`, which is llama.cpp's.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// -1 means until the context is full.
    pub max_tokens: i64,
    /// 0 means the likeliest token that is left.
    pub temperature: f32,
    /// The temperature moves by so much, up where many tokens are likely; 0 means off.
    pub dynatemp_range: f32,
    pub dynatemp_exponent: f32,
    pub top_p: f32,
    /// 0 means off.
    pub top_k: u32,
    pub min_p: f32,
    /// 1 means off.
    pub typical_p: f32,
    /// 0 or less means off.
    pub top_n_sigma: f32,
    pub xtc_probability: f32,
    /// More than 0.5 means off.
    pub xtc_threshold: f32,
    pub repeat_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// How many of the last tokens the penalties look at; -1 means the whole context.
    pub penalty_last_n: i32,
    /// 0 means off.
    pub dry_multiplier: f32,
    pub dry_base: f32,
    pub dry_allowed_length: u32,
    /// -1 means the whole context.
    pub dry_penalty_last_n: i32,
    pub dry_sequence_breakers: Vec<String>,
    /// 0 means off; 1 and 2 take the place of all other samplers but the temperature.
    pub mirostat: u32,
    pub mirostat_tau: f32,
    pub mirostat_eta: f32,
    pub logit_bias: Vec<(i32, f32)>,
    pub banned_tokens: Vec<i32>,
    /// Called before the samplers, on the owner thread: everybody waits for it.
    pub logits_hook: Option<LogitsHook>,
    /// How many of the likeliest tokens are told with each chosen one.
    pub logprobs: Option<u32>,
    pub stop: Vec<String>,
    /// They end the text and are no part of it.
    pub stop_tokens: Vec<i32>,
    /// -1 means a random one.
    /// What the answer has to be.
    pub constraint: Option<Constraint>,
    /// Control tokens that are written out in the answer's text.
    pub preserved_tokens: Vec<i32>,
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

/// What an answer has to be, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Constraint {
    pub syntax: Syntax,
    pub text: String,
    /// It begins when one of the triggers comes, which it hears as well; until then, all may come.
    pub lazy: bool,
    pub triggers: Vec<Trigger>,
    /// It begins behind this text, and its triggers count only there.
    pub after: Option<String>,
    /// What of it stands in the prompt already: it hears this first.
    pub prefix: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syntax {
    JsonSchema,
    Regex,
    Lark,
    /// llama.cpp's grammars.
    Gbnf,
}

impl Syntax {
    /// As the field of a request is called.
    pub fn name(self) -> &'static str {
        match self {
            Syntax::JsonSchema => "json_schema",
            Syntax::Regex => "regex",
            Syntax::Lark => "lark",
            Syntax::Gbnf => "grammar",
        }
    }
}

/// As llama.cpp's: of a pattern, what matters is its first group that is not empty, or all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trigger {
    Word(String),
    Token(i32),
    Pattern(String),
    /// Of the whole answer so far.
    PatternFull(String),
}

impl Constraint {
    pub fn new(syntax: Syntax, text: impl Into<String>) -> Constraint {
        let (triggers, after) = (Vec::new(), None);
        let (text, prefix) = (text.into(), String::new());
        Constraint { syntax, text, lazy: false, triggers, after, prefix }
    }

    fn validate(&self) -> Result<()> {
        check("the number of `triggers`", self.triggers.len(), 0, 64)?;
        if self.lazy && self.triggers.is_empty() {
            return Err(Error::invalid("triggers", "none", "there for a constraint that is lazy"));
        }
        let texts = self.triggers.iter().filter_map(|trigger| match trigger {
            Trigger::Token(_) => None,
            Trigger::Word(text) | Trigger::Pattern(text) | Trigger::PatternFull(text) => Some(text),
        });
        for text in texts.chain(&self.after) {
            check("the bytes of what a constraint waits for", text.len(), 1, 4096)?;
        }
        check("the bytes of a constraint's `prefix`", self.prefix.len(), 0, 1 << 20)?;
        Ok(())
    }
}

/// A function of the caller's that may change the logits: it gets the tokens so far and the row.
#[derive(Clone)]
pub struct LogitsHook(pub Arc<HookFunction>);

pub type HookFunction = dyn Fn(&[i32], &mut [f32]) -> Result<()> + Send + Sync;

impl PartialEq for LogitsHook {
    fn eq(&self, other: &LogitsHook) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.0), Arc::as_ptr(&other.0))
    }
}

impl std::fmt::Debug for LogitsHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LogitsHook({:p})", Arc::as_ptr(&self.0))
    }
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
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.0,
            typical_p: 1.0,
            top_n_sigma: 0.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            repeat_penalty: 1.1,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_last_n: 64,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: 64,
            dry_sequence_breakers: ["\n", ":", "\"", "*"].map(String::from).into(),
            mirostat: 0,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            logit_bias: Vec::new(),
            banned_tokens: Vec::new(),
            logits_hook: None,
            logprobs: None,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            constraint: None,
            preserved_tokens: Vec::new(),
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
        check("dynatemp_range", self.dynatemp_range, 0.0, 100.0)?;
        check("dynatemp_exponent", self.dynatemp_exponent, 0.0, 100.0)?;
        check("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        check("top_k", self.top_k, 0, i32::MAX as u32)?;
        check("min_p", self.min_p, 0.0, 1.0 - f32::EPSILON)?;
        check("typical_p", self.typical_p, f32::MIN_POSITIVE, 1.0)?;
        check("top_n_sigma", self.top_n_sigma, -1.0, 100.0)?;
        check("xtc_probability", self.xtc_probability, 0.0, 1.0)?;
        check("xtc_threshold", self.xtc_threshold, 0.0, 1.0)?;
        check("repeat_penalty", self.repeat_penalty, f32::MIN_POSITIVE, 10.0)?;
        check("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        check("penalty_last_n", self.penalty_last_n, -1, LONGEST)?;
        check("dry_multiplier", self.dry_multiplier, 0.0, 100.0)?;
        check("dry_base", self.dry_base, 1.0, 100.0)?;
        check("dry_allowed_length", self.dry_allowed_length, 0, LONGEST as u32)?;
        check("dry_penalty_last_n", self.dry_penalty_last_n, -1, LONGEST)?;
        check_strings("dry_sequence_breakers", &self.dry_sequence_breakers, 64)?;
        check("mirostat", self.mirostat, 0, 2)?;
        check("mirostat_tau", self.mirostat_tau, 0.0, 100.0)?;
        check("mirostat_eta", self.mirostat_eta, 0.0, 10.0)?;
        check("the number of `logit_bias` entries", self.logit_bias.len(), 0, MOST_IDS)?;
        for (token, bias) in &self.logit_bias {
            check(&format!("logit_bias[{token}]"), *bias, f32::MIN, f32::MAX)?;
        }
        check("the number of `banned_tokens`", self.banned_tokens.len(), 0, MOST_IDS)?;
        check("the number of `stop_tokens`", self.stop_tokens.len(), 0, 1024)?;
        check("the number of `preserved_tokens`", self.preserved_tokens.len(), 0, 1024)?;
        self.constraint.iter().try_for_each(Constraint::validate)?;
        self.check_tokens(i32::MAX as u32)?;
        check("logprobs", self.logprobs.unwrap_or(0), 0, 20)?;
        check_strings("stop", &self.stop, 4096)?;
        check("n_keep", self.n_keep, -1, 1 << 24)?;
        check("seed", self.seed, -1, i64::MAX)
    }

    /// How many tokens of the beginning stay when the context overflows.
    pub fn kept_tokens(&self, num_prompt: usize, n_ctx: usize) -> usize {
        usize::try_from(self.n_keep).unwrap_or(num_prompt).min(num_prompt).min(n_ctx / 2)
    }

    /// Whether all ids are of a vocabulary of this size.
    pub fn check_tokens(&self, n_vocab: u32) -> Result<()> {
        let check_all = |name: &str, tokens: &mut dyn Iterator<Item = &i32>| {
            tokens.enumerate().try_for_each(|(index, token)| match u32::try_from(*token) {
                Ok(id) if id < n_vocab => Ok(()),
                _ => {
                    let allowed = format!("a token id from 0 to {}", i64::from(n_vocab) - 1);
                    Err(Error::invalid(&format!("{name}[{index}]"), token, &allowed))
                }
            })
        };
        check_all("logit_bias", &mut self.logit_bias.iter().map(|(token, _)| token))?;
        check_all("banned_tokens", &mut self.banned_tokens.iter())?;
        check_all("stop_tokens", &mut self.stop_tokens.iter())?;
        check_all("preserved_tokens", &mut self.preserved_tokens.iter())?;
        let triggers = self.constraint.iter().flat_map(|constraint| &constraint.triggers);
        let mut tokens = triggers.filter_map(|trigger| match trigger {
            Trigger::Token(token) => Some(token),
            _ => None,
        });
        check_all("triggers", &mut tokens)
    }
}

/// llama.cpp's own limit (`llama_max_devices`).
const MOST_GPUS: usize = 16;
/// Of tokens to look back.
const LONGEST: i32 = 1 << 24;
/// More than any vocabulary has.
const MOST_IDS: usize = 1 << 20;

fn check_strings(name: &str, strings: &[String], most_bytes: usize) -> Result<()> {
    check(&format!("the number of `{name}` strings"), strings.len(), 0, 64)?;
    let what = format!("the bytes of each `{name}` string");
    strings.iter().try_for_each(|string| check(&what, string.len(), 1, most_bytes))
}

/// NaN is in no range, so it is refused with the rest.
fn check<T: PartialOrd + std::fmt::Display>(name: &str, value: T, low: T, high: T) -> Result<()> {
    if value >= low && value <= high {
        return Ok(());
    }
    Err(Error::invalid(name, value, &format!("from {low} to {high}")))
}
