//! The tensor types of ggml (ggml/include/ggml.h), and the names of whole quantizations.

use std::collections::HashMap;

use super::fault::{Check, Fault};
use super::header::Header;

#[derive(Debug, PartialEq)]
pub(super) struct TensorType {
    pub number: u32,
    pub name: &'static str,
    /// How many numbers lie in a block, and how many bytes the block has.
    pub block: u64,
    pub bytes: u64,
    /// Can be multiplied with: integers and the types of intermediate results cannot.
    pub is_weight: bool,
}

const fn of(
    number: u32,
    name: &'static str,
    block: u64,
    bytes: u64,
    is_weight: bool,
) -> TensorType {
    TensorType { number, name, block, bytes, is_weight }
}

pub(super) const F32: u32 = 0;

#[rustfmt::skip]
static TYPES: [TensorType; 35] = [
    of(0, "F32", 1, 4, true),
    of(1, "F16", 1, 2, true),
    of(2, "Q4_0", 32, 18, true),
    of(3, "Q4_1", 32, 20, true),
    of(6, "Q5_0", 32, 22, true),
    of(7, "Q5_1", 32, 24, true),
    of(8, "Q8_0", 32, 34, true),
    of(9, "Q8_1", 32, 36, false),
    of(10, "Q2_K", 256, 84, true),
    of(11, "Q3_K", 256, 110, true),
    of(12, "Q4_K", 256, 144, true),
    of(13, "Q5_K", 256, 176, true),
    of(14, "Q6_K", 256, 210, true),
    of(15, "Q8_K", 256, 292, false),
    of(16, "IQ2_XXS", 256, 66, true),
    of(17, "IQ2_XS", 256, 74, true),
    of(18, "IQ3_XXS", 256, 98, true),
    of(19, "IQ1_S", 256, 50, true),
    of(20, "IQ4_NL", 32, 18, true),
    of(21, "IQ3_S", 256, 110, true),
    of(22, "IQ2_S", 256, 82, true),
    of(23, "IQ4_XS", 256, 136, true),
    of(24, "I8", 1, 1, false),
    of(25, "I16", 1, 2, false),
    of(26, "I32", 1, 4, false),
    of(27, "I64", 1, 8, false),
    of(28, "F64", 1, 8, false),
    of(29, "IQ1_M", 256, 56, true),
    of(30, "BF16", 1, 2, true),
    of(34, "TQ1_0", 256, 54, true),
    of(35, "TQ2_0", 256, 66, true),
    of(39, "MXFP4", 32, 17, true),
    of(40, "NVFP4", 64, 36, true),
    of(41, "Q1_0", 128, 18, true),
    of(42, "Q2_0", 64, 18, true),
];

/// Types that llama.cpp once had.
const REMOVED: [(u32, &str); 8] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
];

/// Numbers and names of the types that can be multiplied with.
pub fn weight_types() -> impl Iterator<Item = (u32, &'static str)> {
    TYPES.iter().filter(|kind| kind.is_weight).map(|kind| (kind.number, kind.name))
}

pub(super) fn tensor_type(number: u32, tensor: &str) -> Check<&'static TensorType> {
    if let Some(kind) = TYPES.iter().find(|kind| kind.number == number) {
        return Ok(kind);
    }
    Err(Fault::damaged(match REMOVED.iter().find(|removed| removed.0 == number) {
        Some((_, name)) => format!(
            "the tensor `{tensor}` has the type {number} ({name}), which llama.cpp has removed"
        ),
        None => {
            format!("the tensor `{tensor}` has the type {number}, which llama.cpp does not know")
        }
    }))
}

/// `llama_ftype` of include/llama.h.
#[rustfmt::skip]
const FILE_TYPES: [(u32, &str); 36] = [
    (0, "F32"), (1, "F16"), (2, "Q4_0"), (3, "Q4_1"), (7, "Q8_0"), (8, "Q5_0"), (9, "Q5_1"), (10, "Q2_K"),
    (11, "Q3_K_S"), (12, "Q3_K_M"), (13, "Q3_K_L"), (14, "Q4_K_S"), (15, "Q4_K_M"), (16, "Q5_K_S"),
    (17, "Q5_K_M"), (18, "Q6_K"), (19, "IQ2_XXS"), (20, "IQ2_XS"), (21, "Q2_K_S"), (22, "IQ3_XS"),
    (23, "IQ3_XXS"), (24, "IQ1_S"), (25, "IQ4_NL"), (26, "IQ3_S"), (27, "IQ3_M"), (28, "IQ2_S"), (29, "IQ2_M"),
    (30, "IQ4_XS"), (31, "IQ1_M"), (32, "BF16"), (36, "TQ1_0"), (37, "TQ2_0"), (38, "MXFP4"), (39, "NVFP4"),
    (40, "Q1_0"), (41, "Q2_0"),
];

pub(super) fn quantization(header: &Header) -> Check<String> {
    let file_type = header.keys.u32("general.file_type")?;
    if let Some((_, name)) = FILE_TYPES.iter().find(|(number, _)| Some(*number) == file_type) {
        return Ok((*name).into());
    }
    let mut bytes: HashMap<u32, (u64, &str)> = HashMap::new();
    for tensor in &header.tensors {
        bytes.entry(tensor.kind.number).or_insert((0, tensor.kind.name)).0 += tensor.bytes;
    }
    let largest = bytes.values().max().expect("a model has tensors");
    Ok(largest.1.into())
}
