//! The tensors against the sizes: names, shapes, and types that can be computed with.
//!
//! llama.cpp compares most shapes itself and refuses politely. It asks its backends whether they support
//! a tensor first, though, and that can assert; and a norm in f16 is met only in the first decode.

use std::collections::HashMap;

use super::arch::Architecture;
use super::fault::{Check, Fault};
use super::header::{Header, Tensor};
use super::hyper::Hyper;
use super::tokenizer::Tokenizer;
use super::types::F32;

pub(super) fn check(
    architecture: &Architecture,
    header: &Header,
    hyper: &Hyper,
    tokenizer: &Tokenizer,
) -> Check<()> {
    let by_name: HashMap<&str, &Tensor> =
        header.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    for tensor in &header.tensors {
        check_layer_number(architecture, tensor, hyper)?;
        check_dimensions(tensor)?;
        check_type(tensor)?;
    }
    let weights = Weights { by_name, hyper };
    if let Some(embedding) = weights.by_name.get("token_embd.weight") {
        weights.check_row(
            "token_embd.weight",
            embedding.shape[0],
            &architecture.key("embedding_length"),
        )?;
        weights.check_vocabulary(architecture, embedding, tokenizer)?;
    }
    weights.check_output_length(architecture)?;
    if architecture.is_one_of(PLAIN) {
        weights.check_plain(architecture)?;
    }
    if architecture.is_one_of(TRUSTS_ATTENTION) {
        weights.check_attention()?;
    }
    Ok(())
}

pub(super) fn n_vocab(header: &Header, tokenizer: &Tokenizer) -> u32 {
    let rows = header
        .tensors
        .iter()
        .find(|tensor| tensor.name == "token_embd.weight")
        .map(|tensor| tensor.shape[1]);
    match (tokenizer.n_tokens, rows) {
        (0, Some(rows)) => u32::try_from(rows).unwrap_or(u32::MAX),
        (n_tokens, _) => n_tokens,
    }
}

/// Transformers of one kind of layer, whose tensors and shapes we know by heart.
const PLAIN: &[&str] = &["llama", "qwen2", "qwen3"];

/// One token embedding row per token of the vocabulary.
#[rustfmt::skip]
const ONE_ROW_PER_TOKEN: &[&str] = &[
    "llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "mistral3", "phi2", "phi3", "gemma", "gemma2", "gemma3", "gpt2",
    "smollm3", "granite", "stablelm", "starcoder2", "falcon", "olmo", "olmo2", "bert", "nomic-bert",
];

/// They count the layers in the file otherwise than those in the names.
const LOOPED: &[&str] = &["nanbeige", "hrm_text", "graniteswitch"];

/// They load without attention weights, and then use them.
const TRUSTS_ATTENTION: &[&str] = &["phi3", "qwen35", "qwen35moe"];

struct Weights<'a> {
    by_name: HashMap<&'a str, &'a Tensor>,
    hyper: &'a Hyper,
}

impl Weights<'_> {
    fn check_row(&self, name: &str, length: u64, key: &str) -> Check<()> {
        match length == u64::from(self.hyper.n_embd) {
            true => Ok(()),
            false => Err(Fault::damaged(format!(
                "the rows of tensor `{name}` have {length} numbers, and `{key}` is {}",
                self.hyper.n_embd
            ))),
        }
    }

    fn check_vocabulary(
        &self,
        architecture: &Architecture,
        embedding: &Tensor,
        tokenizer: &Tokenizer,
    ) -> Check<()> {
        let rows = embedding.shape[1];
        if rows == u64::from(tokenizer.n_tokens) || !architecture.is_one_of(ONE_ROW_PER_TOKEN) {
            return Ok(());
        }
        let source = match tokenizer.is_none() {
            true => format!("`{}` says", architecture.key("vocab_size")),
            false => "the vocabulary has".into(),
        };
        Err(Fault::damaged(format!(
            "the tensor `token_embd.weight` has {rows} rows, and {source} {} tokens",
            tokenizer.n_tokens
        )))
    }

    /// llama.cpp reads embeddings of that length, whether something makes them so long or not.
    fn check_output_length(&self, architecture: &Architecture) -> Check<()> {
        let Some(length) = self.hyper.n_embd_out else { return Ok(()) };
        let is_projection = |tensor: &&Tensor| {
            !tensor.name.starts_with("blk.") && tensor.shape[1] == u64::from(length)
        };
        let is_made = self.by_name.values().any(is_projection);
        match length <= self.hyper.n_embd || is_made {
            true => Ok(()),
            false => Err(Fault::damaged(format!(
                "`{}` is {length}, but no tensor makes embeddings longer than {}",
                architecture.key("embedding_length_out"),
                self.hyper.n_embd
            ))),
        }
    }

    fn check_plain(&self, architecture: &Architecture) -> Check<()> {
        let n_embd = u64::from(self.hyper.n_embd);
        self.expect("output_norm.weight", &[n_embd])?;
        if self.by_name.contains_key("output.weight") {
            let rows = self.by_name.get("token_embd.weight").map_or(1, |tensor| tensor.shape[1]);
            self.expect("output.weight", &[n_embd, rows])?;
        }
        self.expect_any("token_embd.weight")?;
        for layer in 0..self.hyper.n_layers - self.hyper.n_layers_nextn {
            self.check_plain_layer(architecture, layer)?;
        }
        Ok(())
    }

    fn check_plain_layer(&self, architecture: &Architecture, layer: u32) -> Check<()> {
        let hyper = self.hyper;
        let n_embd = u64::from(hyper.n_embd);
        let width = |heads: &[u32], dim: u32| u64::from(heads[layer as usize]) * u64::from(dim);
        let query = width(&hyper.heads, hyper.head_dim_k);
        let (key, value) =
            (width(&hyper.heads_kv, hyper.head_dim_k), width(&hyper.heads_kv, hyper.head_dim_v));
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        self.expect(&name("attn_norm"), &[n_embd])?;
        if self.by_name.contains_key(name("attn_qkv").as_str()) {
            self.expect(&name("attn_qkv"), &[n_embd, query + key + value])?;
        } else {
            self.expect(&name("attn_q"), &[n_embd, query])?;
            self.expect(&name("attn_k"), &[n_embd, key])?;
            self.expect(&name("attn_v"), &[n_embd, value])?;
        }
        if architecture.name == "qwen3" {
            self.expect(&name("attn_q_norm"), &[hyper.head_dim_k.into()])?;
            self.expect(&name("attn_k_norm"), &[hyper.head_dim_k.into()])?;
        }
        self.expect(&name("attn_output"), &[query, n_embd])?;
        self.expect(&name("ffn_norm"), &[n_embd])?;
        if hyper.n_experts == 0 {
            let ff = u64::from(hyper.ff[layer as usize]);
            self.expect(&name("ffn_gate"), &[n_embd, ff])?;
            self.expect(&name("ffn_up"), &[n_embd, ff])?;
            self.expect(&name("ffn_down"), &[ff, n_embd])?;
        }
        Ok(())
    }

    fn check_attention(&self) -> Check<()> {
        for layer in 0..self.hyper.n_layers - self.hyper.n_layers_nextn {
            let fused = format!("blk.{layer}.attn_qkv.weight");
            if !self.by_name.contains_key(fused.as_str()) {
                for part in ["q", "k", "v"] {
                    self.expect_any(&format!("blk.{layer}.attn_{part}.weight"))?;
                }
            }
        }
        Ok(())
    }

    fn expect_any(&self, name: &str) -> Check<&Tensor> {
        let tensor = self.by_name.get(name);
        tensor.copied().ok_or_else(|| Fault::damaged(format!("the tensor `{name}` is missing")))
    }

    fn expect(&self, name: &str, shape: &[u64]) -> Check<()> {
        let found = self.expect_any(name)?.shape;
        let (same, rest) = found.split_at(shape.len());
        match same == shape && rest.iter().all(|&length| length == 1) {
            true => Ok(()),
            false => Err(Fault::damaged(format!(
                "the tensor `{name}` has the shape {}, and must have {} by the sizes in the header",
                by(&found),
                by(shape)
            ))),
        }
    }
}

fn check_layer_number(architecture: &Architecture, tensor: &Tensor, hyper: &Hyper) -> Check<()> {
    let number = tensor
        .name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.')?.0.parse::<u64>().ok());
    match number {
        Some(number) if number >= u64::from(hyper.n_layers) && !architecture.is_one_of(LOOPED) => {
            Err(Fault::damaged(format!(
                "it has the tensor `{}`, and `{}` is {}",
                tensor.name,
                architecture.key("block_count"),
                hyper.n_layers
            )))
        }
        _ => Ok(()),
    }
}

/// Shapes that assert while llama.cpp asks which device can use the tensor (weight_buft_supported).
fn check_dimensions(tensor: &Tensor) -> Check<()> {
    let name = part_of(&tensor.name);
    let is_expert = name.ends_with("_exps.weight") || name.ends_with("_chexps.weight");
    let limit = match name {
        "token_embd.weight"
        | "position_embd.weight"
        | "token_types.weight"
        | "ssm_a"
        | "shortconv.conv.weight" => 2,
        _ if is_expert => 3,
        _ => 4,
    };
    match tensor.shape[limit..].iter().all(|&length| length == 1) {
        true => Ok(()),
        false => Err(Fault::damaged(format!(
            "the tensor `{}` has the shape {}, and at most {limit} dimensions make sense there",
            tensor.name,
            by(&tensor.shape)
        ))),
    }
}

/// ggml multiplies with floating point and quantized weights, and adds and scales with f32 alone.
fn check_type(tensor: &Tensor) -> Check<()> {
    let name = part_of(&tensor.name);
    // A few tables of token ids are integers, and nothing else is.
    let is_table = name.contains("tid2eid") || name.contains("ordering") || name.contains("d2t");
    if name.ends_with(".weight") && !tensor.kind.is_weight && !is_table {
        return Err(Fault::damaged(format!(
            "the tensor `{}` is of type {}, which cannot be multiplied with",
            tensor.name, tensor.kind.name
        )));
    }
    let is_vector = name.ends_with("norm.weight")
        || name.ends_with(".bias")
        || name.starts_with("rope_f")
        || ["ssm_a", "ssm_d", "ssm_conv1d.weight", "shortconv.conv.weight"].contains(&name);
    if is_vector && tensor.kind.number != F32 {
        return Err(Fault::damaged(format!(
            "the tensor `{}` is of type {}, and must be F32",
            tensor.name, tensor.kind.name
        )));
    }
    Ok(())
}

/// `blk.7.attn_q.weight` → `attn_q.weight`
fn part_of(name: &str) -> &str {
    match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((_, part)) => part,
        None => name,
    }
}

/// `[32, 300, 1, 1]` → `32 × 300`
fn by(shape: &[u64]) -> String {
    let used = shape.iter().rposition(|&length| length != 1).map_or(1, |last| last + 1);
    shape[..used].iter().map(u64::to_string).collect::<Vec<_>>().join(" × ")
}
