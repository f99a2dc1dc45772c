//! llama.cpp's own samplers, for the tests that compare ours with them.

use std::ffi::{CStr, c_char};

use crate::error::Result;
use crate::ffi::{self, ShimSampler};
use crate::model::Vocabulary;

/// One of them by its name, with its values in their order.
pub struct LlamaSampler<'a> {
    pub name: &'a CStr,
    pub values: [f32; 4],
    pub strings: Vec<&'a CStr>,
}

/// What a chain of them leaves of the last of some rows, each as long as
/// the vocabulary, and with which probabilities. Only `dry` needs a vocabulary.
pub fn llama_samplers(
    vocabulary: Option<&Vocabulary>,
    samplers: &[LlamaSampler<'_>],
    history: &[i32],
    rows: &[Vec<f32>],
) -> Result<Vec<(i32, f64)>> {
    let strings: Vec<Vec<*const c_char>> =
        samplers.iter().map(|of| of.strings.iter().map(|s| s.as_ptr()).collect()).collect();
    let of_shim = samplers.iter().zip(&strings).map(|(of, strings)| ShimSampler {
        name: of.name.as_ptr(),
        values: of.values,
        strings: strings.as_ptr(),
        n_strings: strings.len(),
    });
    let of_shim: Vec<ShimSampler> = of_shim.collect();
    let n_vocab = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == n_vocab), "rows of one length");
    let vocab = vocabulary.map_or(std::ptr::null(), Vocabulary::as_ptr);
    let (mut tokens, mut probabilities) = (vec![0; n_vocab], vec![0.0; n_vocab]);
    let mut n_left = 0;
    let rows: Vec<f32> = rows.concat();
    // SAFETY: all pointers are of live buffers with these lengths.
    ffi::call(|error| unsafe {
        ffi::ta_samplers_apply(
            vocab,
            of_shim.as_ptr(),
            of_shim.len() as i32,
            history.as_ptr(),
            history.len() as i32,
            rows.as_ptr(),
            (rows.len() / n_vocab) as i32,
            n_vocab as i32,
            tokens.as_mut_ptr(),
            probabilities.as_mut_ptr(),
            &mut n_left,
            error,
        )
    })?;
    Ok(tokens.into_iter().zip(probabilities).take(n_left as usize).collect())
}
