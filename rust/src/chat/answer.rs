//! Answer → content, reasoning and tool calls, while it is being written.
//!
//! llama.cpp's parser begins at the front each time, so it is asked only when enough time has passed
//! since the last time. What it finds in an unfinished answer it may still take back; so the
//! parts of such an answer that could change are held back, and what was told once stays:
//!
//! ```text
//! feed(text) ─▶ read all of it ─▶ hold back ─▶ what goes on behind what was told ─▶ deltas
//! ```
//!
//! All deltas together are the message that `finish` gives, whatever the parser says.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::template::{bytes, on_a_large_stack};
use crate::error::{Error, Result};
use crate::ffi::{self, ShimAnswer, ShimReader};

/// Longer answers are delivered as they are.
const LONGEST: usize = 4 << 20;
/// Brackets that may be open at once: on any stack, and on a large one.
const DEPTH_ON_ANY_STACK: usize = 12;
const DEEPEST: usize = 4096;
/// All answers that are being read take so much of a core's time at most, however many they are.
const SHARE_OF_ALL: f64 = 0.2;
static UNDER_WAY: AtomicU32 = AtomicU32::new(0);
/// A character that no tag of a template begins with, and that is not for the exchange of texts.
const NO_TAG: char = '\u{10FFFD}';
/// Letters and digits in the id of a call: Mistral's templates want as many.
const LENGTH_OF_ID: usize = 9;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    pub content: String,
    pub reasoning: String,
    pub tool_calls: Vec<ToolCall>,
    /// Why the parts are not what the model meant, if they are not.
    pub error: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToolCall {
    pub id: String,
    pub name: String,
    /// JSON text, as the model wrote it.
    pub arguments: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    Content(String),
    Reasoning(String),
    /// More of a call's arguments; with the first of them its id and its name.
    ToolCall {
        index: usize,
        begun: Option<(String, String)>,
        arguments: String,
    },
}

/// Reads one answer.
pub struct AnswerParser {
    /// None: an answer is content and nothing else.
    reader: Option<Arc<Reader>>,
    text: String,
    told: Message,
    patience: u32,
    not_before: Option<Instant>,
}

impl AnswerParser {
    pub(super) fn new(reader: Option<Arc<Reader>>, patience: u32) -> AnswerParser {
        UNDER_WAY.fetch_add(1, Ordering::Relaxed);
        AnswerParser {
            reader,
            text: String::new(),
            told: Message::default(),
            patience,
            not_before: None,
        }
    }

    pub fn feed(&mut self, text: &str) -> Vec<Delta> {
        self.text.push_str(text);
        let Some(reader) = self.reader.clone() else { return self.tell_text(text) };
        let begun = Instant::now();
        let is_early = self.not_before.is_some_and(|moment| begun < moment);
        if is_early || self.text.len() > LONGEST {
            return Vec::new();
        }
        let read = reader.read(&self.text, true);
        self.not_before =
            begun.elapsed().checked_mul(self.rest()).and_then(|rest| begun.checked_add(rest));
        read.map_or_else(|_| Vec::new(), |answer| self.tell(&held_back(answer.message)))
    }

    /// The rest of the deltas, and all of it. A complete answer is one that the model ended itself.
    pub fn finish(&mut self, is_complete: bool) -> (Vec<Delta>, Message) {
        let Some(reader) = self.reader.clone() else { return (Vec::new(), self.told.clone()) };
        let (deltas, error) = match whole(&reader, &self.text) {
            Ok(answer) => {
                let deltas = self.tell(&answer.message);
                let fault = self.fault(&answer, is_complete);
                (deltas, fault)
            }
            Err(error) => {
                let rest = self.untold();
                (self.tell_text(&rest), Some(said(error)))
            }
        };
        (deltas, Message { error, ..self.told.clone() })
    }

    /// How many times as long as it took to read.
    fn rest(&self) -> u32 {
        let crowd = f64::from(UNDER_WAY.load(Ordering::Relaxed)) / SHARE_OF_ALL;
        if self.patience == 0 { 0 } else { self.patience.max(crowd as u32) }
    }

    fn fault(&self, read: &Answer, is_complete: bool) -> Option<String> {
        let same = |(told, read): (&ToolCall, &ToolCall)| {
            (&told.name, &told.arguments) == (&read.name, &read.arguments)
        };
        let (told, message) = (&self.told, &read.message);
        let agrees = (&told.content, &told.reasoning) == (&message.content, &message.reasoning)
            && told.tool_calls.len() == message.tool_calls.len()
            && told.tool_calls.iter().zip(&message.tool_calls).all(same);
        if !agrees {
            return Some(
                "the end of the answer changed the meaning of what was told before".into(),
            );
        }
        let is_open = message.tool_calls.last().is_some_and(|call| !is_closed(&call.arguments));
        let is_cut = is_open || !read.is_whole;
        (is_complete && is_cut).then(|| "the answer ends inside a tool call".into())
    }

    fn tell_text(&mut self, text: &str) -> Vec<Delta> {
        self.told.content.push_str(text);
        if text.is_empty() { Vec::new() } else { vec![Delta::Content(text.into())] }
    }

    /// What goes on behind what was told already.
    fn tell(&mut self, read: &Message) -> Vec<Delta> {
        let mut deltas = Vec::new();
        deltas.extend(grow(&mut self.told.reasoning, &read.reasoning).map(Delta::Reasoning));
        deltas.extend(grow(&mut self.told.content, &read.content).map(Delta::Content));
        for (index, call) in read.tool_calls.iter().enumerate() {
            let begun = index == self.told.tool_calls.len();
            if begun {
                let id = if call.id.is_empty() { new_id() } else { call.id.clone() };
                let name = call.name.clone();
                self.told.tool_calls.push(ToolCall { id, name, arguments: String::new() });
            }
            let told = &mut self.told.tool_calls[index];
            if told.name != call.name {
                break;
            }
            let more = grow(&mut told.arguments, &call.arguments);
            if begun || more.is_some() {
                let begun = begun.then(|| (told.id.clone(), told.name.clone()));
                let arguments = more.unwrap_or_default();
                deltas.push(Delta::ToolCall { index, begun, arguments });
            }
        }
        deltas
    }

    /// Of an answer that cannot be read: what follows after what was told of it.
    fn untold(&self) -> String {
        if !self.told.tool_calls.is_empty() {
            return String::new();
        }
        let end_of = |said: &str, from: usize| {
            self.text[from..].find(said).map_or(from, |found| from + found + said.len())
        };
        let at = end_of(&self.told.content, end_of(&self.told.reasoning, 0));
        self.text[at..].to_owned()
    }
}

impl Drop for AnswerParser {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What reads the answers to one prompt.
pub struct Reader {
    shim: *mut ShimReader,
    /// What the prompt says already of a message that goes on; an answer is what comes after it.
    before: OnceLock<Message>,
}

// SAFETY: the shim guards the one thing in it that changes.
unsafe impl Send for Reader {}
// SAFETY: the same.
unsafe impl Sync for Reader {}

impl Reader {
    /// # Safety
    /// Nobody else may have it.
    pub(super) unsafe fn from_shim(shim: *mut ShimReader) -> Option<Reader> {
        (!shim.is_null()).then(|| Reader { shim, before: OnceLock::new() })
    }

    /// Whatever goes wrong here costs an answer its meaning, and nobody else anything.
    fn read(&self, text: &str, is_partial: bool) -> Result<Answer> {
        catch_unwind(AssertUnwindSafe(|| self.read_behind(text, is_partial)))
            .unwrap_or_else(|_| Err(refused("reading the answer panicked".into())))
    }

    /// Without what the prompt says already.
    fn read_behind(&self, text: &str, is_partial: bool) -> Result<Answer> {
        let mut answer = match open_brackets(text) {
            depth if depth <= DEPTH_ON_ANY_STACK => self.read_here(text, is_partial),
            depth if depth <= DEEPEST => on_a_large_stack(|| self.read_here(text, is_partial)),
            depth => Err(refused(format!("the answer opens {depth} brackets inside each other"))),
        }?;
        let nothing = || self.read_here("", true).map(|answer| answer.message).unwrap_or_default();
        let before = self.before.get_or_init(nothing);
        let Message { content, reasoning, .. } = &mut answer.message;
        for (part, before) in [(content, &before.content), (reasoning, &before.reasoning)] {
            if part.starts_with(before.as_str()) {
                part.drain(..before.len());
            }
        }
        Ok(answer)
    }

    fn read_here(&self, text: &str, is_partial: bool) -> Result<Answer> {
        let mut shim = null_mut();
        // SAFETY: a reader, and text and length belong together.
        ffi::call_or(refused, |error| unsafe {
            let (text, length) = (text.as_ptr().cast(), text.len());
            ffi::ta_reader_read(self.shim, text, length, is_partial, &mut shim, error)
        })?;
        let answer = Answer::of(shim);
        // SAFETY: made above, and nobody else has it.
        unsafe { ffi::ta_answer_free(shim) };
        Ok(answer)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // SAFETY: made by the shim, and ours.
        unsafe { ffi::ta_reader_free(self.shim) }
    }
}

/// What was read, and whether that is all that the template can have meant.
struct Answer {
    message: Message,
    is_whole: bool,
}

impl Answer {
    fn of(shim: *const ShimAnswer) -> Answer {
        let text = |what: c_int, index: usize| {
            let (mut start, mut length) = (null(), 0);
            // SAFETY: an answer, and places to write to.
            let found = unsafe { ffi::ta_answer_text(shim, what, index, &mut start, &mut length) };
            // SAFETY: the shim's text lives as long as the answer.
            found.then(|| String::from_utf8_lossy(unsafe { bytes(start, length) }).into_owned())
        };
        let call = |index| {
            Some(ToolCall {
                id: text(ffi::ANSWER_CALL_ID, index)?,
                name: text(ffi::ANSWER_CALL_NAME, index)?,
                arguments: text(ffi::ANSWER_CALL_ARGUMENTS, index)?,
            })
        };
        let message = Message {
            content: text(ffi::ANSWER_CONTENT, 0).unwrap_or_default(),
            reasoning: text(ffi::ANSWER_REASONING, 0).unwrap_or_default(),
            tool_calls: (0..).map_while(call).collect(),
            error: None,
        };
        // SAFETY: an answer.
        Answer { message, is_whole: unsafe { ffi::ta_answer_is_whole(shim) } }
    }
}

/// An answer that will not go on. llama.cpp leaves out what could be the beginning of a tag; a
/// character behind it that belongs to no tag shows that it was none.
fn whole(reader: &Reader, text: &str) -> Result<Answer> {
    if text.len() > LONGEST {
        return Err(refused(format!("the answer is too long: {} bytes of {LONGEST}", text.len())));
    }
    let read = reader.read(text, false)?;
    let message = &read.message;
    let last = if message.content.is_empty() { &message.reasoning } else { &message.content };
    let is_whole = read.is_whole || !message.tool_calls.is_empty();
    if is_whole || (!last.is_empty() && text.ends_with(last.as_str())) {
        return Ok(Answer { is_whole: true, ..read });
    }
    let Ok(mut longer) = reader.read(&format!("{text}{NO_TAG}"), false) else { return Ok(read) };
    let found = &mut longer.message;
    let is_shown = found.content.ends_with(NO_TAG) || found.reasoning.ends_with(NO_TAG);
    for part in [&mut found.content, &mut found.reasoning] {
        part.truncate(part.trim_end_matches(NO_TAG).len());
    }
    let goes_on = found.content.starts_with(message.content.as_str())
        && found.reasoning.starts_with(message.reasoning.as_str());
    Ok(if is_shown && goes_on { Answer { is_whole: true, ..longer } } else { read })
}

/// What of an unfinished answer is certain. The parser closes what is still open, and a name may
/// grow until the arguments have begun.
fn held_back(mut message: Message) -> Message {
    if let Some(mut last) = message.tool_calls.pop() {
        let certain = last.arguments.trim_end_matches(['}', ']', '"', ' ', '\n']).len();
        last.arguments.truncate(certain);
        if certain > 1 {
            message.tool_calls.push(last);
        }
    }
    message
}

fn grow(told: &mut String, read: &str) -> Option<String> {
    let more = read.strip_prefix(told.as_str()).filter(|more| !more.is_empty())?.to_owned();
    told.push_str(&more);
    Some(more)
}

fn is_closed(json: &str) -> bool {
    let (mut depth, mut in_string, mut is_escaped) = (0i64, false, false);
    for byte in json.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = in_string,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => depth += 1,
            b']' | b'}' if !in_string => depth -= 1,
            _ => {}
        }
    }
    depth == 0 && !in_string && !json.is_empty()
}

/// As many as could be nested in what a model wrote, whatever of it is JSON.
fn open_brackets(text: &str) -> usize {
    let (mut open, mut most) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => {
                open += 1;
                most = most.max(open);
            }
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
    }
    most
}

fn new_id() -> String {
    std::iter::repeat_with(fastrand::alphanumeric).take(LENGTH_OF_ID).collect()
}

fn refused(what: String) -> Error {
    Error::Template { what }
}

/// What happened, where it is no reason to fail.
fn said(error: Error) -> String {
    match error {
        Error::Template { what } => what,
        error => error.to_string(),
    }
}
