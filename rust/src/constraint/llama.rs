//! llama.cpp's own grammars, for the tests that compare ours with them.

use std::ffi::CStr;

use crate::error::Result;
use crate::ffi;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Of the grammar.
    Refused,
    NoMatch,
    /// Something has to follow.
    Begins,
    Matches,
}

pub fn llama_grammar(grammar: &CStr, text: &CStr) -> Result<Verdict> {
    let mut verdict = 0;
    // SAFETY: both end with a zero.
    ffi::call(|error| unsafe {
        ffi::ta_grammar_try(grammar.as_ptr(), text.as_ptr(), &mut verdict, error)
    })?;
    Ok(match verdict {
        0 => Verdict::Refused,
        1 => Verdict::NoMatch,
        2 => Verdict::Begins,
        _ => Verdict::Matches,
    })
}
