//! Looks at a model file before llama.cpp does, and says what is in it or what is wrong with it.
//!
//! llama.cpp ends the process on many a damaged file: its asserts cannot be caught. So everything that
//! an assert, a division or an index in the loader depends on is read here first, with checked
//! arithmetic and without touching the weights. What llama.cpp itself refuses politely is left to it,
//! except where we can say it better.
//!
//! ```text
//! reader    bytes, never past the end of the file
//! foreign   what a file is that is no GGUF
//! header    keys and tensor infos, as ggml/src/gguf.cpp demands them   (types: the tensor types)
//! keys      typed access to the keys
//! hyper     sizes of the model: <architecture>.*                       (arch: the architectures)
//! tokenizer vocabulary, special tokens, pre-tokenizer
//! weights   names, shapes and types of the tensors
//! shards    the other files of a split model
//! parts     how much of the weights belongs to which layer
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::Result;

mod arch;
mod fault;
mod foreign;
mod header;
mod hyper;
mod keys;
mod parts;
mod reader;
mod shards;
mod tokenizer;
mod types;
mod weights;

pub use tokenizer::is_stack_safe as check_tokenizer_is_stack_safe;
pub use types::weight_types;

use arch::Architecture;
use fault::{Check, Fault};
use header::Header;

/// What a model file says about itself; nothing of it needs the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    pub path: PathBuf,
    /// All files of the model, the first one first.
    pub shards: Vec<PathBuf>,
    /// Of all shards together.
    pub size_bytes: u64,
    /// Of the GGUF format.
    pub version: u32,
    pub architecture: String,
    pub name: Option<String>,
    pub n_params: u64,
    /// What `general.file_type` says, else the tensor type that most bytes are in.
    pub quantization: String,
    pub n_ctx_train: u32,
    pub n_layers: u32,
    pub n_embd: u32,
    /// Of the first layer that has attention; 0 for models without.
    pub n_head: u32,
    pub n_head_kv: u32,
    pub head_dim_k: u32,
    pub head_dim_v: u32,
    pub n_vocab: u32,
    /// `tokenizer.ggml.model`: llama, gpt2, bert, t5, rwkv, plamo2, none, …
    pub tokenizer: String,
    /// `tokenizer.ggml.pre`: how a gpt2 tokenizer cuts text into words.
    pub pre: Option<String>,
    /// False: tokenizing a long word without spaces needs a large stack (engine.md, section 4.2).
    pub tokenizer_is_stack_safe: bool,
    pub has_chat_template: bool,
    pub chat_template: Option<String>,
    /// Made for embeddings: pools its output, or does not look forward only.
    pub is_embedding: bool,
    /// Has no attention cache at all (mamba, rwkv), or a state beside it (jamba, lfm2, …).
    pub is_recurrent: bool,
    pub n_experts: u32,
    /// Numbers between the two halves of the widest feed-forward part, for one token.
    pub n_ff: u32,
    pub n_merges: u32,
    /// Attention scores are capped before softmax.
    pub caps_scores: bool,
    /// Keys plus values of one token over all layers, in numbers, not bytes.
    pub kv_values_per_token: u64,
    /// What recurrent layers keep of a sequence, however long it is.
    pub state_bytes_per_sequence: u64,
    pub parts: Parts,
}

/// What a model consists of, by where llama.cpp puts it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parts {
    /// The embedding of tokens; it always stays in main memory.
    pub input: Part,
    pub layers: Vec<Part>,
    /// What follows the last layer, and goes to a GPU first.
    pub output: Part,
    /// Of the output, those bytes that are the embedding's once more: in the file they are one, and in
    /// memory, too, while both are on the CPU in the file's layout.
    pub shared_bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Part {
    pub bytes: u64,
    /// Of them, those in matrices that can be laid out anew for a CPU, by the type of their numbers.
    pub matrices: BTreeMap<&'static str, u64>,
    /// Keys plus values of one token, in numbers.
    pub kv_values: u64,
}

impl Description {
    /// Memory that one token takes in an f16 cache. Layers with a sliding window need less.
    pub fn kv_bytes_per_token(&self) -> u64 {
        self.kv_values_per_token.saturating_mul(2)
    }
}

/// Check the whole header of a model, shards included, and describe it.
pub fn inspect(path: &Path) -> Result<Description> {
    look_at(path, true).map_err(|fault| fault.at(path))
}

/// As [`inspect`], but content with a file that has a vocabulary and no weights.
pub fn inspect_vocabulary(path: &Path) -> Result<Description> {
    look_at(path, false).map_err(|fault| fault.at(path))
}

fn look_at(path: &Path, needs_weights: bool) -> Check<Description> {
    let mut first = Header::read(path)?;
    // Later shards have no keys of their own, so they are told apart first.
    let shards = shards::gather(path, &mut first)?;
    let architecture = Architecture::of(&first.keys)?;
    if first.tensors.is_empty() {
        if needs_weights {
            return Err(Fault::unsupported("it holds no weights (a vocabulary only)"));
        }
        return describe_vocabulary(path, &first, &architecture);
    }
    let hyper = hyper::check(&architecture, &first.keys)?;
    let tokenizer = tokenizer::check(&architecture, &first.keys)?;
    weights::check(&architecture, &first, &hyper, &tokenizer)?;
    let template = first.keys.text("tokenizer.chat_template")?.map(str::to_owned);
    let caps_scores = first.keys.has(&architecture.key("attn_logit_softcapping"));
    Ok(Description {
        path: path.into(),
        size_bytes: shards.size_bytes,
        shards: shards.paths,
        version: first.version,
        architecture: architecture.name,
        name: first.keys.text("general.name")?.map(str::to_owned),
        n_params: first.tensors.iter().map(|tensor| tensor.n_elements()).sum(),
        quantization: types::quantization(&first)?,
        n_ctx_train: hyper.n_ctx_train,
        n_layers: hyper.n_layers,
        n_embd: hyper.n_embd,
        n_head: hyper.heads.iter().copied().find(|&n| n > 0).unwrap_or(0),
        n_head_kv: hyper.heads_kv.iter().copied().find(|&n| n > 0).unwrap_or(0),
        head_dim_k: hyper.head_dim_k,
        head_dim_v: hyper.head_dim_v,
        n_vocab: weights::n_vocab(&first, &tokenizer),
        tokenizer_is_stack_safe: tokenizer.is_stack_safe(),
        tokenizer: tokenizer.model,
        pre: tokenizer.pre,
        has_chat_template: template.is_some(),
        chat_template: template,
        is_embedding: hyper.is_embedding,
        is_recurrent: architecture.is_recurrent || architecture.is_hybrid,
        n_experts: hyper.n_experts,
        n_ff: hyper.widest_ff(),
        n_merges: first.keys.strings("tokenizer.ggml.merges")?.map_or(0, |all| all.len() as u32),
        caps_scores,
        kv_values_per_token: hyper.kv_values_per_token(),
        state_bytes_per_sequence: hyper.state_bytes_per_sequence,
        parts: parts::of(&first, &hyper),
    })
}

fn describe_vocabulary(
    path: &Path,
    header: &Header,
    architecture: &Architecture,
) -> Check<Description> {
    let tokenizer = tokenizer::check(architecture, &header.keys)?;
    let template = header.keys.text("tokenizer.chat_template")?.map(str::to_owned);
    Ok(Description {
        path: path.into(),
        shards: vec![path.into()],
        size_bytes: header.size,
        version: header.version,
        architecture: architecture.name.clone(),
        name: header.keys.text("general.name")?.map(str::to_owned),
        n_params: 0,
        quantization: "none".into(),
        n_ctx_train: 0,
        n_layers: 0,
        n_embd: 0,
        n_head: 0,
        n_head_kv: 0,
        head_dim_k: 0,
        head_dim_v: 0,
        n_vocab: tokenizer.n_tokens,
        tokenizer_is_stack_safe: tokenizer.is_stack_safe(),
        tokenizer: tokenizer.model,
        pre: tokenizer.pre,
        has_chat_template: template.is_some(),
        chat_template: template,
        is_embedding: architecture.is_encoder,
        is_recurrent: false,
        n_experts: 0,
        n_ff: 0,
        n_merges: 0,
        caps_scores: false,
        kv_values_per_token: 0,
        state_bytes_per_sequence: 0,
        parts: Parts::default(),
    })
}
