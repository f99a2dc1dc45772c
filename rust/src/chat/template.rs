//! A chat template that has been parsed, and tried by llama.cpp on what it can do.

use std::collections::HashSet;
use std::ffi::{c_char, c_int};
use std::ops::Range;
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex};

use super::answer::Reader;
use super::lock;
use super::prompt::{Grammar, Prompt, Trigger};
use crate::error::{Error, Result};
use crate::ffi::{self, ShimChat, ShimChatOptions, ShimPrompt};
use crate::model::{Model, Vocabulary};

const LONGEST_TEMPLATE: usize = 256 << 10;
/// The engine walks trees by recursion. Pages that are not touched cost nothing.
const STACK: usize = 256 << 20;

/// llama.cpp's engine asks `std::localtime` for the date, which has one place for all threads.
static RENDERING: Mutex<()> = Mutex::new(());

pub(super) struct Template {
    shim: *mut ShimChat,
    pub(super) source: String,
    /// Texts of added tokens with which this template marks turns; there they are control text.
    pub(super) added: HashSet<Vec<u8>>,
}

// SAFETY: llama.cpp does not change it after it was made.
unsafe impl Send for Template {}
// SAFETY: the same.
unsafe impl Sync for Template {}

impl Template {
    pub(super) fn new(model: &Model, source: &str, added: HashSet<Vec<u8>>) -> Result<Template> {
        if source.len() > LONGEST_TEMPLATE {
            let what = format!("it has {} bytes, allowed are {LONGEST_TEMPLATE}", source.len());
            return Err(Error::Template { what });
        }
        render(|| {
            let mut template = Template { shim: null_mut(), source: source.to_owned(), added };
            let (text, shim) = (source.as_ptr().cast(), &mut template.shim);
            // SAFETY: the model is alive, and text and length belong together.
            call(|error| unsafe {
                ffi::ta_chat_new(model.as_ptr(), text, source.len(), shim, error)
            })?;
            Ok(template)
        })
    }

    pub(super) fn apply(
        self: &Arc<Template>,
        vocabulary: &Vocabulary,
        messages: &str,
        options: &Options,
        add_generation_prompt: bool,
    ) -> Result<Prompt> {
        let written = render(|| {
            let mut written = Written(null_mut());
            // SAFETY: a template and options that were made, and text and length belong together.
            call(|error| unsafe {
                let (text, length) = (messages.as_ptr().cast(), messages.len());
                let (chat, options, out) = (self.shim, options.0, &mut written.0);
                ffi::ta_chat_apply(chat, options, text, length, add_generation_prompt, out, error)
            })?;
            Ok(written)
        })?;
        let (text, inputs) = written.pieces()?;
        let preserved = written.texts(ffi::PROMPT_PRESERVED);
        let tokens = preserved.iter().filter_map(|text| control_token(vocabulary, text));
        let thinking = written.texts(ffi::PROMPT_THINKING);
        let [start, end] = <[String; 2]>::try_from(thinking).unwrap_or_default();
        Ok(Prompt {
            text,
            inputs,
            stops: written.texts(ffi::PROMPT_STOP),
            preserved_tokens: tokens.collect(),
            grammar: written.grammar(vocabulary),
            thinking: (!end.is_empty()).then_some((start, end)),
            is_thinking: written.is_thinking(),
            reader: written.take_reader().map(Arc::new),
            template: self.clone(),
        })
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        // SAFETY: made by `ta_chat_new`, or null.
        unsafe { ffi::ta_chat_free(self.shim) }
    }
}

/// How a conversation is to be written out, checked.
pub(super) struct Options(*mut ShimChatOptions);

// SAFETY: nobody changes them after they were made.
unsafe impl Sync for Options {}

impl Options {
    pub(super) fn read(json: &str) -> Result<Options> {
        let mut options = Options(null_mut());
        let (text, out) = (json.as_ptr().cast(), &mut options.0);
        let refused =
            |what: String| Error::invalid("options", what, "what a chat can be asked with");
        // SAFETY: text and length belong together.
        ffi::call_or(refused, |error| unsafe {
            ffi::ta_chat_options_new(text, json.len(), out, error)
        })?;
        Ok(options)
    }

    pub(super) fn has_tools(&self) -> bool {
        // SAFETY: made by `ta_chat_options_new`.
        unsafe { ffi::ta_chat_options_have_tools(self.0) }
    }
}

impl Drop for Options {
    fn drop(&mut self) {
        // SAFETY: made by `ta_chat_options_new`, or null.
        unsafe { ffi::ta_chat_options_free(self.0) }
    }
}

/// A prompt as the shim has it.
struct Written(*mut ShimPrompt);

// SAFETY: one thread has it at a time.
unsafe impl Send for Written {}

impl Written {
    fn pieces(&self) -> Result<(String, Vec<Range<usize>>)> {
        let (mut text, mut inputs) = (Vec::new(), Vec::<Range<usize>>::new());
        let (mut start, mut length, mut is_input) = (null(), 0, false);
        // SAFETY: a prompt, and places to write to.
        while unsafe {
            ffi::ta_prompt_piece(self.0, inputs.len(), &mut start, &mut length, &mut is_input)
        } {
            let from = text.len();
            // SAFETY: the shim's text lives as long as its prompt.
            text.extend_from_slice(unsafe { bytes(start, length) });
            inputs.push(if is_input { from..text.len() } else { from..from });
        }
        inputs.retain(|input| !input.is_empty());
        // A template can cut characters in two: llama.cpp's engine counts bytes.
        let text = String::from_utf8(text).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            Error::Template { what: format!("it cuts a character in two, at byte {at}") }
        })?;
        Ok((text, inputs))
    }

    fn texts(&self, what: c_int) -> Vec<String> {
        let (mut texts, mut start, mut length) = (Vec::new(), null(), 0);
        // SAFETY: as above.
        while unsafe { ffi::ta_prompt_text(self.0, what, texts.len(), &mut start, &mut length) } {
            // SAFETY: as above.
            texts.push(String::from_utf8_lossy(unsafe { bytes(start, length) }).into_owned());
        }
        texts
    }

    fn grammar(&self, vocabulary: &Vocabulary) -> Option<Grammar> {
        let text = self.texts(ffi::PROMPT_GRAMMAR).pop()?;
        let word = |word: String| match one_token(vocabulary, &word) {
            Some(token) => Trigger::Token(token, word), // as llama-server does
            None => Trigger::Word(word),
        };
        let words = self.texts(ffi::PROMPT_TRIGGER_WORD).into_iter().map(word);
        let patterns = self.texts(ffi::PROMPT_TRIGGER_PATTERN).into_iter().map(Trigger::Pattern);
        let full = self.texts(ffi::PROMPT_TRIGGER_PATTERN_FULL).into_iter();
        Some(Grammar {
            text,
            prefix: self.texts(ffi::PROMPT_GRAMMAR_PREFIX).pop().unwrap_or_default(),
            // SAFETY: a prompt.
            is_lazy: unsafe { ffi::ta_prompt_grammar_is_lazy(self.0) },
            triggers: words.chain(patterns).chain(full.map(Trigger::PatternFull)).collect(),
        })
    }

    fn is_thinking(&self) -> bool {
        // SAFETY: a prompt.
        unsafe { ffi::ta_prompt_is_thinking(self.0) }
    }

    fn take_reader(&self) -> Option<Reader> {
        // SAFETY: a prompt; the reader is ours from here on.
        unsafe { Reader::from_shim(ffi::ta_prompt_take_reader(self.0)) }
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        // SAFETY: made by `ta_chat_apply`, or null.
        unsafe { ffi::ta_prompt_free(self.0) }
    }
}

/// # Safety
/// `length` bytes at `start` have to live as long as what comes back.
pub(super) unsafe fn bytes<'a>(start: *const c_char, length: usize) -> &'a [u8] {
    // SAFETY: as the caller says.
    unsafe { std::slice::from_raw_parts(start.cast(), length) }
}

fn one_token(vocabulary: &Vocabulary, text: &str) -> Option<i32> {
    match vocabulary.tokenize(text, false, true).as_deref() {
        Ok(&[token]) => Some(token),
        _ => None,
    }
}

fn control_token(vocabulary: &Vocabulary, text: &str) -> Option<i32> {
    let mut plain = Vec::new();
    let token = one_token(vocabulary, text)?;
    vocabulary.piece(token, false, &mut plain).ok()?;
    plain.is_empty().then_some(token)
}

/// Runs it where recursion has room.
pub(super) fn on_a_large_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new()
            .name("tabagent-template".into())
            .stack_size(STACK)
            .spawn_scoped(scope, work)
            .map_err(|error| Error::exhausted(format!("a thread to render on: {error}")))?;
        worker.join().unwrap_or_else(|_| Err(Error::internal("rendering panicked")))
    })
}

fn render<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let _one_at_a_time = lock(&RENDERING);
    on_a_large_stack(work)
}

fn call(function: impl FnOnce(*mut ffi::ShimError) -> c_int) -> Result<()> {
    ffi::call_or(|what| Error::Template { what }, function).map(drop)
}
