//! Messages → prompt, through the shim. The parsing of answers belongs here, too.
//!
//! A prompt remembers what of it came from messages, so that the template's own control text becomes
//! control tokens and the same text written by a user does not.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashSet};
use std::ffi::c_char;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{Error, Result};
use crate::ffi::{self, ShimChat, ShimPrompt};
use crate::log;
use crate::model::{Model, Vocabulary};

/// What llama.cpp takes for models without a template of their own.
const CHATML: &str = "{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

const LONGEST_TEMPLATE: usize = 256 << 10;
const MOST_BYTES: usize = 16 << 20;
/// The engine walks trees by recursion. Pages that are not touched cost nothing.
const STACK: usize = 256 << 20;
/// Templates that were given instead of the model's own, and are kept for the next time.
const MOST_KEPT: usize = 4;

/// llama.cpp's engine asks `std::localtime` for the date, which has one place for all threads.
static RENDERING: Mutex<()> = Mutex::new(());

/// The chat side of a model: its template, and those that took its place lately.
pub struct Chat {
    model: Arc<Model>,
    own: OnceLock<Result<Arc<Template>>>,
    given: Mutex<Vec<Arc<Template>>>,
    marks: OnceLock<Marks>,
}

impl Chat {
    pub fn new(model: Arc<Model>) -> Chat {
        Chat { model, own: OnceLock::new(), given: Mutex::default(), marks: OnceLock::new() }
    }

    /// `messages` is the JSON text of a list of messages as OpenAI has them.
    pub fn render(
        &self,
        messages: &str,
        add_generation_prompt: bool,
        template: Option<&str>,
    ) -> Result<Prompt> {
        self.model.check_process()?;
        if messages.len() > MOST_BYTES {
            let allowed = format!("at most {MOST_BYTES} bytes of JSON");
            return Err(Error::invalid("messages", messages.len(), &allowed));
        }
        let template = match template {
            Some(source) => self.given(source)?,
            None => self.own.get_or_init(|| self.load_own()).clone()?,
        };
        template.apply(messages, add_generation_prompt)
    }

    /// The ids of a prompt from a byte on; the beginning of text comes before the first one only.
    /// What cannot have fewer than `limit` of them is refused before it takes time.
    pub fn tokens(&self, prompt: &Prompt, from: usize, limit: Option<u32>) -> Result<Vec<i32>> {
        self.model.check_process()?;
        let vocabulary = self.model.vocabulary();
        let marks = self.marks.get_or_init(|| Marks::of(vocabulary));
        let (text, add_bos) = (&prompt.text[from..], from == 0);
        let required = vocabulary.fewest_tokens(text.len()) as u64 + 1;
        if let Some(max) = limit.filter(|&max| required > u64::from(max)) {
            return Err(Error::ContextLimitExceeded { max, required });
        }
        let (written, own): (Vec<_>, Vec<_>) = marks
            .find(text, &prompt.template.added)
            .into_iter()
            .partition(|mark| prompt.has_input_in(mark.place.start + from..mark.place.end + from));
        if written.is_empty() {
            return vocabulary.tokenize(text, add_bos, true); // as everybody else does
        }
        let mut tokens = Vec::new();
        for (index, (range, special)) in segments(text, &written, own).into_iter().enumerate() {
            let add_bos = add_bos && index == 0;
            tokens.extend(vocabulary.tokenize(&text[range], add_bos, special)?);
        }
        Ok(tokens)
    }

    fn load_own(&self) -> Result<Arc<Template>> {
        let source = self.model.chat_template().unwrap_or_else(|| {
            log::note(log::Level::Warning, "the model has no chat template; ChatML is used");
            CHATML
        });
        self.load(source)
    }

    fn given(&self, source: &str) -> Result<Arc<Template>> {
        let known = |kept: &[Arc<Template>]| kept.iter().find(|t| t.source == source).cloned();
        if let Some(template) = known(&lock(&self.given)) {
            return Ok(template);
        }
        let template = self.load(source)?;
        let mut kept = lock(&self.given);
        kept.insert(0, template.clone());
        kept.truncate(MOST_KEPT);
        Ok(template)
    }

    fn load(&self, source: &str) -> Result<Arc<Template>> {
        if !self.model.vocabulary().has_text() {
            let what = "the model has no tokenizer; it takes token ids only".into();
            return Err(Error::Template { what });
        }
        let marks = self.marks.get_or_init(|| Marks::of(self.model.vocabulary()));
        let is_used = |text: &&Vec<u8>| {
            std::str::from_utf8(text).is_ok_and(|text| text.len() > 2 && source.contains(text))
        };
        let added = marks.added.iter().filter(is_used).cloned().collect();
        Ok(Arc::new(Template::new(&self.model, source, added)?))
    }
}

/// A conversation as the model wants to read it.
pub struct Prompt {
    pub text: String,
    /// Strings that end an answer besides the model's end tokens.
    pub stops: Vec<String>,
    /// What came from messages, in order.
    inputs: Vec<Range<usize>>,
    template: Arc<Template>,
}

impl Prompt {
    fn has_input_in(&self, range: Range<usize>) -> bool {
        let first = self.inputs.partition_point(|input| input.end <= range.start);
        self.inputs.get(first).is_some_and(|input| input.start < range.end)
    }
}

/// A template that has been parsed, and tried by llama.cpp on what it can do.
struct Template {
    shim: *mut ShimChat,
    source: String,
    /// Texts of added tokens with which this template marks turns; there they are control text.
    added: HashSet<Vec<u8>>,
}

// SAFETY: llama.cpp does not change it after it was made.
unsafe impl Send for Template {}
// SAFETY: the same.
unsafe impl Sync for Template {}

impl Template {
    fn new(model: &Model, source: &str, added: HashSet<Vec<u8>>) -> Result<Template> {
        if source.len() > LONGEST_TEMPLATE {
            let what = format!("it has {} bytes, allowed are {LONGEST_TEMPLATE}", source.len());
            return Err(Error::Template { what });
        }
        on_a_large_stack(|| {
            let mut template = Template { shim: null_mut(), source: source.to_owned(), added };
            let (text, shim) = (source.as_ptr().cast(), &mut template.shim);
            // SAFETY: the model is alive, and text and length belong together.
            call(|error| unsafe {
                ffi::ta_chat_new(model.as_ptr(), text, source.len(), shim, error)
            })?;
            Ok(template)
        })
    }

    fn apply(self: &Arc<Template>, messages: &str, add_generation_prompt: bool) -> Result<Prompt> {
        on_a_large_stack(|| {
            let (text, length) = (messages.as_ptr().cast(), messages.len());
            let mut shim = null_mut();
            // SAFETY: a template that `new` made, and text and length belong together.
            call(|error| unsafe {
                ffi::ta_chat_apply(self.shim, text, length, add_generation_prompt, &mut shim, error)
            })?;
            let prompt = self.read(shim);
            // SAFETY: nobody else has it.
            unsafe { ffi::ta_prompt_free(shim) };
            prompt
        })
    }

    fn read(self: &Arc<Template>, shim: *const ShimPrompt) -> Result<Prompt> {
        let (mut text, mut inputs, mut stops) =
            (Vec::new(), Vec::<Range<usize>>::new(), Vec::new());
        let (mut start, mut length, mut is_input): (*const c_char, _, _) =
            (std::ptr::null(), 0, false);
        // SAFETY: the shim's text lives as long as its prompt; here and below it is copied at once.
        let bytes = |start: *const c_char, length| unsafe {
            std::slice::from_raw_parts(start.cast::<u8>(), length)
        };
        // SAFETY: a prompt that `apply` holds, and places to write to.
        while unsafe {
            ffi::ta_prompt_piece(shim, inputs.len(), &mut start, &mut length, &mut is_input)
        } {
            let from = text.len();
            text.extend_from_slice(bytes(start, length));
            inputs.push(if is_input { from..text.len() } else { from..from });
        }
        inputs.retain(|input| !input.is_empty());
        // SAFETY: as above.
        while unsafe { ffi::ta_prompt_stop(shim, stops.len(), &mut start, &mut length) } {
            stops.push(String::from_utf8_lossy(bytes(start, length)).into_owned());
        }
        // A template can cut characters in two: llama.cpp's engine counts bytes.
        let text = String::from_utf8(text).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            Error::Template { what: format!("it cuts a character in two, at byte {at}") }
        })?;
        Ok(Prompt { text, stops, inputs, template: self.clone() })
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        // SAFETY: made by `ta_chat_new`, or null.
        unsafe { ffi::ta_chat_free(self.shim) }
    }
}

/// A place where the tokenizer could read a control token, or one that was added to the vocabulary.
struct Mark {
    place: Range<usize>,
    is_added: bool,
}

/// Texts that a tokenizer takes for control tokens, by length.
struct Marks {
    control: Vec<HashSet<Vec<u8>>>,
    first_bytes: [bool; 256],
    added: Vec<Vec<u8>>,
}

impl Marks {
    fn of(vocabulary: &Vocabulary) -> Marks {
        let (texts, added) = vocabulary.marks();
        let mut marks = Marks { control: Vec::new(), first_bytes: [false; 256], added };
        for text in texts.iter().chain(&marks.added) {
            marks.first_bytes[text[0] as usize] = true;
        }
        for text in texts {
            marks.control.resize_with(marks.control.len().max(text.len() + 1), HashSet::new);
            marks.control[text.len()].insert(text);
        }
        marks
    }

    /// Every mark in a text; they may overlap.
    fn find(&self, text: &str, added: &HashSet<Vec<u8>>) -> Vec<Mark> {
        let bytes = text.as_bytes();
        let starts = (0..bytes.len()).filter(|&at| self.first_bytes[bytes[at] as usize]);
        starts
            .flat_map(|at| {
                let rest = &bytes[at..];
                let control = self.control.iter().enumerate().filter(move |(length, texts)| {
                    !texts.is_empty() && *length <= rest.len() && texts.contains(&rest[..*length])
                });
                let added = added.iter().filter(move |text| rest.starts_with(text));
                let control = control.map(|(length, _)| (length, false));
                control
                    .chain(added.map(|text| (text.len(), true)))
                    .map(move |(length, is_added)| Mark { place: at..at + length, is_added })
            })
            .collect()
    }
}

/// The text in segments, and whether control tokens are read in them: the template's own marks, and
/// what lies between two of them, so that words stay whole. An added token is one wherever it is
/// written, so that one is cut behind its first character.
fn segments(text: &str, written: &[Mark], mut own: Vec<Mark>) -> Vec<(Range<usize>, bool)> {
    let cut = |mark: &Mark| {
        let first = text[mark.place.start..].chars().next().map_or(0, char::len_utf8);
        mark.place.start + first
    };
    let cuts: BTreeSet<_> = written.iter().filter(|mark| mark.is_added).map(cut).collect();
    own.sort_by_key(|mark| (mark.place.start, Reverse(mark.place.end)));
    own.push(Mark { place: text.len()..text.len(), is_added: false });
    let (mut segments, mut from) = (Vec::new(), 0);
    for Mark { place, .. } in own.into_iter() {
        if place.start < from {
            continue; // inside a longer one
        }
        for &cut in cuts.range(from + 1..place.start.max(from + 1)) {
            segments.push((from..cut, false));
            from = cut;
        }
        segments.push((from..place.start, false));
        from = place.end;
        segments.push((place, true));
    }
    segments.retain(|(range, _)| !range.is_empty());
    segments
}

/// Runs it where recursion has room.
fn on_a_large_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let _one_at_a_time = lock(&RENDERING);
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new()
            .name("tabagent-template".into())
            .stack_size(STACK)
            .spawn_scoped(scope, work)
            .map_err(|error| Error::internal(format!("no thread to render on: {error}")))?;
        worker.join().unwrap_or_else(|_| Err(Error::internal("rendering panicked")))
    })
}

fn call(function: impl FnOnce(*mut ffi::ShimError) -> std::ffi::c_int) -> Result<()> {
    ffi::call_or(|what| Error::Template { what }, function).map(drop)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
