//! Every way the engine can fail, each variant beside its hint; no Python, no HTTP.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("there is no model file at `{}`", path.display())]
    ModelNotFound { path: PathBuf },

    #[error("`{}` cannot be read: {reason}", path.display())]
    UnreadableModel { path: PathBuf, reason: String },

    /// The file is something else than a GGUF model.
    #[error("`{}` is not a GGUF model: {what}", path.display())]
    InvalidFormat { path: PathBuf, what: String },

    /// The file is a GGUF model, but one that contradicts itself or ends too early.
    #[error("`{}` is damaged: {what}", path.display())]
    ModelCorrupted { path: PathBuf, what: String },

    #[error("`{}` cannot be run here: {what}", path.display())]
    UnsupportedModel { path: PathBuf, what: String },

    #[error("loading `{}` was cancelled at {percent} %", path.display())]
    LoadCancelled { path: PathBuf, percent: u32 },

    #[error("no usable llama.cpp backend in `{}`: {found}", folder.display())]
    NoBackend { folder: PathBuf, found: String },

    #[error("{what} needs {}, but {} is free", mib(*needed), mib(*free))]
    OutOfMemory { what: String, needed: u64, free: u64 },

    /// Threads, or memory in a place where nobody knows how much it would have taken.
    #[error("the system refuses {what}")]
    Exhausted { what: String },

    #[error("there is no memory for a step on the {device}")]
    StepMemory { device: &'static str },

    #[error("llama.cpp could not create a context of {n_ctx} tokens: {reason}")]
    ContextCreation { n_ctx: u32, reason: String },

    #[error("`{name}` must be {allowed}, got {value}")]
    InvalidRequest { name: String, value: String, allowed: String },

    #[error("the prompt needs {required} tokens of context, but `n_ctx` is {max}")]
    ContextLimitExceeded { max: u32, required: u64 },

    #[error("the text cannot be tokenized: {what}")]
    Tokenization { what: String },

    #[error("the chat template cannot be applied: {what}")]
    Template { what: String },

    /// A constraint: what is wrong with it, in which line and column of its text; or why nothing can
    /// keep it.
    #[error("`{syntax}`{}: {what}", place(*position))]
    Grammar { syntax: &'static str, what: String, position: Option<(usize, usize)> },

    #[error("sampling failed: {what}")]
    Sampling { what: String },

    /// `cause` is what the caller's function raised, for those who know its kind.
    #[error("the logits hook failed: {what}")]
    LogitsHook { what: String, cause: Option<Arc<dyn Any + Send + Sync>> },

    #[error("{what} cannot be called from a logits hook of the same model")]
    ModelBusy { what: &'static str },

    #[error("the request did not end within {seconds} s ({generated} tokens were generated)")]
    GenerationTimeout { seconds: f64, generated: u64 },

    #[error("the request found no place within {seconds} s")]
    QueueTimeout { seconds: f64 },

    #[error("{waiting} requests are waiting already, which is the limit")]
    QueueFull { waiting: usize },

    #[error("{what} is not loaded")]
    ModelNotLoaded { what: String },

    #[error("the model was unloaded")]
    ModelUnloaded,

    #[error("the model was loaded by process {owner}; this is its forked child {child}")]
    ForkedProcess { owner: u32, child: u32 },

    #[error("{what}")]
    Hardware { what: String },

    #[error("found none of {}", tried.iter().map(|p| format!("`{}`", p.display())).collect::<Vec<_>>().join(", "))]
    BinaryNotFound { tried: Vec<PathBuf> },

    /// A fault of ours or of llama.cpp, caught at the border.
    #[error("internal error: {what}")]
    Internal { what: String },
}

impl Error {
    /// What to type or do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::InvalidFormat { .. } => {
                Some("give the path of a `.gguf` file, downloaded in full".into())
            }
            Error::ModelCorrupted { .. } => Some("download or convert the file again".into()),
            Error::OutOfMemory { .. } | Error::StepMemory { .. } => {
                Some("lower `n_ctx` or `max_parallel`".into())
            }
            Error::Exhausted { .. } => {
                Some("close what is not needed, or raise the limit that `ulimit -a` shows".into())
            }
            Error::ContextCreation { .. } => Some("try `n_ctx=2048` or less".into()),
            Error::ContextLimitExceeded { required, .. } => {
                Some(format!("load the model with `n_ctx={required}` or more"))
            }
            Error::Template { .. } => {
                Some("give another one as `template=`, or a prompt to `generate`".into())
            }
            Error::QueueFull { .. } => {
                Some("try again later, or load the model with a larger `queue_size`".into())
            }
            Error::ModelBusy { .. } => {
                Some("ask another model, or ask this one when the hook has returned".into())
            }
            Error::ModelNotLoaded { .. } => Some("call `load()` first".into()),
            Error::ModelUnloaded => Some("load it again".into()),
            Error::ForkedProcess { .. } => {
                Some("load the model in the child, or start it with the `spawn` method".into())
            }
            Error::Internal { .. } => {
                Some("this is a bug; please report it with the log of `tabagent_model`".into())
            }
            _ => None,
        }
    }

    pub fn invalid(name: &str, value: impl std::fmt::Display, allowed: &str) -> Error {
        Error::InvalidRequest {
            name: name.into(),
            value: value.to_string(),
            allowed: allowed.into(),
        }
    }

    pub fn grammar(
        syntax: &'static str,
        what: impl Into<String>,
        position: Option<(usize, usize)>,
    ) -> Error {
        Error::Grammar { syntax, what: what.into(), position }
    }

    pub fn exhausted(what: impl Into<String>) -> Error {
        Error::Exhausted { what: what.into() }
    }

    pub fn internal(what: impl Into<String>) -> Error {
        Error::Internal { what: what.into() }
    }
}

fn place(position: Option<(usize, usize)>) -> String {
    position.map_or(String::new(), |(line, column)| format!(" in line {line}, column {column}"))
}

fn mib(bytes: u64) -> String {
    match bytes {
        0..1_073_741_824 => format!("{:.0} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}
