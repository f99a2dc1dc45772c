//! A conversation as the model reads it, and what has to be known to read its answer.

use std::ops::Range;
use std::sync::Arc;

use super::answer::{AnswerParser, Reader};
use super::template::Template;

pub struct Prompt {
    pub text: String,
    /// Strings that end an answer besides the model's end tokens.
    pub stops: Vec<String>,
    /// Control tokens that are part of an answer's text.
    pub preserved_tokens: Vec<i32>,
    /// What keeps tool calls in their form.
    pub grammar: Option<Grammar>,
    /// The tags around what the model thinks.
    pub thinking: Option<(String, String)>,
    /// The prompt ends between these tags.
    pub is_thinking: bool,
    pub(super) reader: Option<Arc<Reader>>,
    /// What came from messages, in order.
    pub(super) inputs: Vec<Range<usize>>,
    pub(super) template: Arc<Template>,
}

impl Prompt {
    /// For one answer. It reads again when `patience` times as long has passed as the last time took.
    pub fn parser(&self, patience: u32) -> AnswerParser {
        AnswerParser::new(self.reader.clone(), patience)
    }

    /// An answer is content and nothing else.
    pub fn is_plain(&self) -> bool {
        self.reader.is_none()
    }

    pub(super) fn has_input_in(&self, range: Range<usize>) -> bool {
        let first = self.inputs.partition_point(|input| input.end <= range.start);
        self.inputs.get(first).is_some_and(|input| input.start < range.end)
    }
}

/// A GBNF grammar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grammar {
    pub text: String,
    /// What of its text stands in the prompt already.
    pub prefix: String,
    /// It begins at one of its triggers.
    pub is_lazy: bool,
    pub triggers: Vec<Trigger>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trigger {
    Word(String),
    Token(i32, String),
    Pattern(String),
    PatternFull(String),
}
