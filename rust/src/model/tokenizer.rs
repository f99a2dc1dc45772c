//! Text to ids and back, through the shim; and what is known of each token.

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2::llama_vocab;

use super::load;
use crate::error::{Error, Result};
use crate::ffi;
use crate::gguf::Description;

/// llama.cpp's splitter for some vocabularies is `std::regex`, which recurses once per character of
/// a run. Texts up to this size are safe on any thread.
const SAFE_ON_ANY_STACK: usize = 2048;
/// Seen: about 322 bytes of stack per character. Pages that are not touched cost nothing.
const STACK_PER_BYTE: usize = 512;
const LONGEST_ON_REGEX: usize = 1 << 20;

/// The vocabulary of a loaded model; it must not outlive the model.
pub struct Vocabulary {
    pointer: *const llama_vocab,
    /// False for models that know ids only; llama.cpp asserts when asked for their text.
    has_text: bool,
    is_stack_safe: bool,
    ends_generation: Vec<bool>,
    longest_piece: usize,
    bos: i32,
    eos: i32,
    newline: i32,
}

// SAFETY: llama.cpp never changes a vocabulary after loading.
unsafe impl Send for Vocabulary {}
// SAFETY: the same.
unsafe impl Sync for Vocabulary {}

impl Vocabulary {
    pub(super) fn of(weights: &LlamaModel, description: &Description) -> Result<Vocabulary> {
        // SAFETY: the model is alive.
        let pointer = unsafe { llama_cpp_sys_2::llama_model_get_vocab(load::pointer(weights)) };
        let vocab = weights.vocab();
        let size = vocab.n_tokens();
        let mut flags = vec![0u8; size.max(0) as usize];
        let mut longest_piece = 1;
        let has_text = !matches!(description.tokenizer.as_str(), "none" | "no_vocab");
        if has_text {
            ffi::call(|error| {
                // SAFETY: `flags` has `size` places.
                unsafe {
                    ffi::ta_vocab_scan(pointer, flags.as_mut_ptr(), size, &mut longest_piece, error)
                }
            })?;
        }
        Ok(Vocabulary {
            pointer,
            has_text,
            is_stack_safe: description.tokenizer_is_stack_safe,
            ends_generation: flags.into_iter().map(|flag| flag != 0).collect(),
            longest_piece: longest_piece.max(1) as usize,
            bos: id(vocab.bos()),
            eos: id(vocab.eos()),
            newline: id(vocab.nl()),
        })
    }

    pub(crate) fn as_ptr(&self) -> *const llama_vocab {
        self.pointer
    }

    pub fn size(&self) -> u32 {
        self.ends_generation.len() as u32
    }

    /// -1 if there is none; so for the other two.
    pub fn bos(&self) -> i32 {
        self.bos
    }

    pub fn eos(&self) -> i32 {
        self.eos
    }

    pub fn newline(&self) -> i32 {
        self.newline
    }

    pub fn ends_generation(&self, token: i32) -> bool {
        usize::try_from(token).is_ok_and(|id| self.ends_generation.get(id) == Some(&true))
    }

    pub(crate) fn end_tokens(&self) -> Vec<i32> {
        let ids = self.ends_generation.iter().enumerate();
        ids.filter_map(|(id, ends)| ends.then_some(id as i32)).collect()
    }

    /// What the model's file says must never be generated.
    pub(crate) fn suppressed(&self) -> &[i32] {
        let mut count = 0;
        // SAFETY: the vocabulary lives as long as this, and never changes.
        unsafe {
            match llama_cpp_sys_2::llama_vocab_get_suppress_tokens(self.pointer, &mut count) {
                first if count > 0 => std::slice::from_raw_parts(first, count as usize),
                _ => &[],
            }
        }
    }

    /// False for models that take token ids only.
    pub(crate) fn has_text(&self) -> bool {
        self.has_text
    }

    /// No text of this many bytes has fewer tokens.
    pub(crate) fn fewest_tokens(&self, bytes: usize) -> usize {
        bytes / self.longest_piece
    }

    /// Control tokens written in the text stay plain text unless `special`.
    pub fn tokenize(&self, text: &str, add_bos: bool, special: bool) -> Result<Vec<i32>> {
        if !self.has_text {
            let what = "the model has no tokenizer; give it token ids".into();
            return Err(Error::Tokenization { what });
        }
        if self.is_stack_safe || text.len() <= SAFE_ON_ANY_STACK {
            return self.tokenize_here(text, add_bos, special);
        }
        if text.len() > LONGEST_ON_REGEX {
            let what = format!(
                "this vocabulary's splitter takes at most {LONGEST_ON_REGEX} bytes at once, got {}",
                text.len()
            );
            return Err(Error::Tokenization { what });
        }
        let stack = (1 << 20) + text.len() * STACK_PER_BYTE;
        std::thread::scope(|scope| {
            let worker = std::thread::Builder::new()
                .stack_size(stack)
                .spawn_scoped(scope, || self.tokenize_here(text, add_bos, special))
                .map_err(|error| Error::exhausted(format!("a thread to tokenize on: {error}")))?;
            worker.join().unwrap_or_else(|_| Err(Error::internal("the tokenizer panicked")))
        })
    }

    fn tokenize_here(&self, text: &str, add_bos: bool, special: bool) -> Result<Vec<i32>> {
        let too_long = || Error::Tokenization { what: format!("{} bytes at once", text.len()) };
        let length = i32::try_from(text.len()).map_err(|_| too_long())?;
        let mut tokens = vec![0i32; text.len() / 3 + 8];
        loop {
            let capacity = i32::try_from(tokens.len()).map_err(|_| too_long())?;
            let mut count = 0;
            ffi::call(|error| {
                // SAFETY: pointers and lengths of live buffers.
                unsafe {
                    ffi::ta_tokenize(
                        self.pointer,
                        text.as_ptr().cast(),
                        length,
                        tokens.as_mut_ptr(),
                        capacity,
                        add_bos,
                        special,
                        &mut count,
                        error,
                    )
                }
            })
            .map_err(|error| Error::Tokenization { what: error.to_string() })?;
            match count {
                i32::MIN => return Err(too_long()),
                count if count < 0 => tokens.resize(count.unsigned_abs() as usize, 0),
                _ => {
                    tokens.truncate(count as usize);
                    return Ok(tokens);
                }
            }
        }
    }

    /// Adds the bytes of one token; they need not be whole characters.
    pub fn piece(&self, token: i32, special: bool, out: &mut Vec<u8>) -> Result<()> {
        self.check(token, 0)?;
        if !self.has_text {
            return Ok(());
        }
        let start = out.len();
        let mut room = 32;
        loop {
            out.resize(start + room as usize, 0);
            let mut length = 0;
            ffi::call(|error| {
                // SAFETY: `room` bytes are free behind `start`, and the id was checked.
                unsafe {
                    let free = out.as_mut_ptr().add(start).cast();
                    ffi::ta_piece(self.pointer, token, free, room, special, &mut length, error)
                }
            })
            .inspect_err(|_| out.truncate(start))?;
            if length >= 0 {
                out.truncate(start + length as usize);
                return Ok(());
            }
            room = -length;
        }
    }

    /// The texts that stand for control tokens, and those of tokens that somebody added to the
    /// vocabulary: the tokenizer takes the latter for tokens wherever they are written.
    pub(crate) fn marks(&self) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let (mut control, mut added) = (Vec::new(), Vec::new());
        for token in 0..if self.has_text { self.size() as i32 } else { 0 } {
            // SAFETY: the id is one of the vocabulary's, and its text ends with a zero.
            let (attributes, text) = unsafe {
                let text = llama_cpp_sys_2::llama_vocab_get_text(self.pointer, token);
                let attributes = llama_cpp_sys_2::llama_vocab_get_attr(self.pointer, token);
                (attributes, std::ffi::CStr::from_ptr(text).to_bytes())
            };
            let is = |flag: llama_cpp_sys_2::llama_token_attr| attributes & flag != 0;
            if text.is_empty() || std::str::from_utf8(text).is_err() {
                continue; // no text of a prompt has such bytes between two characters
            }
            if is(llama_cpp_sys_2::LLAMA_TOKEN_ATTR_CONTROL)
                || is(llama_cpp_sys_2::LLAMA_TOKEN_ATTR_UNKNOWN)
            {
                control.push(text.to_vec());
            } else if is(llama_cpp_sys_2::LLAMA_TOKEN_ATTR_USER_DEFINED) {
                added.push(text.to_vec());
            }
        }
        (control, added)
    }

    pub fn detokenize(&self, tokens: &[i32], special: bool) -> Result<String> {
        let mut bytes = Vec::with_capacity(tokens.len() * 4);
        self.check_all(tokens)?;
        for &token in tokens {
            self.piece(token, special, &mut bytes)?;
        }
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
    }

    pub fn check_all(&self, tokens: &[i32]) -> Result<()> {
        tokens.iter().enumerate().try_for_each(|(index, &token)| self.check(token, index))
    }

    fn check(&self, token: i32, index: usize) -> Result<()> {
        match token {
            0.. if (token as usize) < self.ends_generation.len() => Ok(()),
            _ => Err(Error::invalid(
                &format!("tokens[{index}]"),
                token,
                &format!("from 0 to {}", self.ends_generation.len() as i64 - 1),
            )),
        }
    }
}

fn id(token: LlamaToken) -> i32 {
    token.0.max(-1)
}
