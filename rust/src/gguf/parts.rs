//! How much of the weights belongs to which layer, and what of it can be laid out anew.

use super::header::{Header, Tensor};
use super::hyper::Hyper;
use super::{Part, Parts};

pub(super) fn of(header: &Header, hyper: &Hyper) -> Parts {
    let mut parts = Parts { layers: layers(hyper), ..Parts::default() };
    for tensor in &header.tensors {
        let part = match layer_of(&tensor.name) {
            Some(layer) => parts.layers.get_mut(layer),
            None if is_input(&tensor.name) => Some(&mut parts.input),
            None => Some(&mut parts.output),
        };
        if let Some(part) = part {
            part.add(tensor, &tensor.name);
        }
    }
    // Where the model has no output matrix of its own, llama.cpp multiplies with the embedding.
    let has_output = header.tensors.iter().any(|tensor| tensor.name == "output.weight");
    let embedding = header.tensors.iter().find(|tensor| tensor.name == "token_embd.weight");
    if let (false, Some(embedding)) = (has_output, embedding) {
        parts.output.add(embedding, "output.weight");
        parts.shared_bytes = embedding.bytes;
    }
    parts
}

fn layers(hyper: &Hyper) -> Vec<Part> {
    let part = |kv_values| Part { kv_values, ..Part::default() };
    hyper.kv_values().map(part).collect()
}

impl Part {
    fn add(&mut self, tensor: &Tensor, name: &str) {
        self.bytes += tensor.bytes;
        if is_multiplied(name) && tensor.shape[1].is_multiple_of(ROWS_TOGETHER) {
            *self.matrices.entry(tensor.kind.name).or_default() += tensor.bytes;
        }
    }
}

/// Layouts for a CPU take the rows of a matrix in groups of so many.
const ROWS_TOGETHER: u64 = 8;

/// Embeddings are looked up, and norms, biases and small factors are added or scaled with.
fn is_multiplied(name: &str) -> bool {
    name.ends_with(".weight") && !name.contains("norm") && !is_input(name)
}

fn is_input(name: &str) -> bool {
    const TABLES: [&str; 4] =
        ["token_embd", "position_embd", "token_types", "per_layer_token_embd"];
    TABLES.iter().any(|table| name.starts_with(table))
}

fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}
