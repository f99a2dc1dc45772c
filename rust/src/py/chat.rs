//! ChatPrompt and ChatParser: a rendered conversation and the answer to it, as Python sees them.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};

use super::convert::{self, guarded};
use crate::chat::Chat;
use crate::chat::answer::{AnswerParser, Delta, Message};
use crate::chat::prompt::{Grammar, Prompt, Trigger};
use crate::error::{Error, Result};

#[pyclass(frozen, module = "tabagent_model._core")]
pub struct ChatPrompt {
    prompt: Prompt,
    /// A prompt that somebody keeps must not keep the model's memory.
    chat: Weak<Chat>,
}

impl ChatPrompt {
    pub(super) fn new(prompt: Prompt, chat: &Arc<Chat>) -> ChatPrompt {
        ChatPrompt { prompt, chat: Arc::downgrade(chat) }
    }

    pub(super) fn answer_parser(&self, patience: u32) -> AnswerParser {
        self.prompt.parser(patience)
    }

    fn chat(&self) -> Result<Arc<Chat>> {
        self.chat.upgrade().ok_or(Error::ModelUnloaded)
    }
}

#[pymethods]
impl ChatPrompt {
    #[getter]
    fn text(&self) -> &str {
        &self.prompt.text
    }

    #[getter]
    fn stops(&self) -> Vec<String> {
        self.prompt.stops.clone()
    }

    #[getter]
    fn preserved_tokens(&self) -> Vec<i32> {
        self.prompt.preserved_tokens.clone()
    }

    /// What keeps tool calls in their form, as the engine takes it.
    #[getter]
    fn constraint<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.prompt.grammar.as_ref().map(|grammar| constraint(py, grammar)).transpose()
    }

    #[getter]
    fn thinking(&self) -> Option<(String, String)> {
        self.prompt.thinking.clone()
    }

    #[getter]
    fn is_thinking(&self) -> bool {
        self.prompt.is_thinking
    }

    /// Its answers are content and nothing else, and need no parser.
    #[getter]
    fn is_plain(&self) -> bool {
        self.prompt.is_plain()
    }

    #[pyo3(signature = (patience=50))]
    fn parser(&self, patience: u32) -> ChatParser {
        ChatParser { parser: Mutex::new(self.answer_parser(patience)) }
    }

    /// The ids of what follows after a beginning; None if it begins otherwise.
    #[pyo3(signature = (after=None, limit=None))]
    fn tokens(
        &self,
        py: Python<'_>,
        after: Option<&Bound<'_, PyString>>,
        limit: Option<u32>,
    ) -> PyResult<Option<Vec<i32>>> {
        let from = match after {
            Some(beginning) => {
                let beginning = convert::text(beginning)?;
                if !self.prompt.text.starts_with(beginning) {
                    return Ok(None);
                }
                beginning.len()
            }
            None => 0,
        };
        guarded(py, || self.chat()?.tokens(&self.prompt, from, limit).map(Some))
    }
}

#[pyclass(frozen, module = "tabagent_model._core")]
pub struct ChatParser {
    parser: Mutex<AnswerParser>,
}

#[pymethods]
impl ChatParser {
    fn feed<'py>(&self, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyList>> {
        let py = text.py();
        let text = convert::text(text)?;
        let deltas = guarded(py, || Ok(self.with(|parser| parser.feed(text))))?;
        python_deltas(py, &deltas)
    }

    #[pyo3(signature = (is_complete=true))]
    fn finish<'py>(
        &self,
        py: Python<'py>,
        is_complete: bool,
    ) -> PyResult<(Bound<'py, PyList>, Bound<'py, PyDict>)> {
        let (deltas, message) = guarded(py, || Ok(self.with(|parser| parser.finish(is_complete))))?;
        Ok((python_deltas(py, &deltas)?, python_message(py, &message)?))
    }
}

impl ChatParser {
    fn with<T>(&self, work: impl FnOnce(&mut AnswerParser) -> T) -> T {
        work(&mut self.parser.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn constraint<'py>(py: Python<'py>, grammar: &Grammar) -> PyResult<Bound<'py, PyDict>> {
    let triggers = PyList::empty(py);
    for trigger in &grammar.triggers {
        let (kind, value, token) = match trigger {
            Trigger::Word(value) => ("word", value, None),
            Trigger::Token(token, value) => ("token", value, Some(*token)),
            Trigger::Pattern(value) => ("pattern", value, None),
            Trigger::PatternFull(value) => ("pattern_full", value, None),
        };
        let entry = PyDict::new(py);
        entry.set_item("type", kind)?;
        entry.set_item("value", value)?;
        if let Some(token) = token {
            entry.set_item("token", token)?;
        }
        triggers.append(entry)?;
    }
    let constraint = PyDict::new(py);
    constraint.set_item("syntax", "gbnf")?;
    constraint.set_item("text", &grammar.text)?;
    constraint.set_item("lazy", grammar.is_lazy)?;
    constraint.set_item("triggers", triggers)?;
    if !grammar.prefix.is_empty() {
        constraint.set_item("prefix", &grammar.prefix)?;
    }
    Ok(constraint)
}

pub(super) fn python_deltas<'py>(
    py: Python<'py>,
    deltas: &[Delta],
) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for delta in deltas {
        match delta {
            Delta::Content(text) => list.append(("content", text))?,
            Delta::Reasoning(text) => list.append(("reasoning", text))?,
            Delta::ToolCall { index, begun, arguments } => {
                let (id, name) = begun.as_ref().map(|(id, name)| (id, name)).unzip();
                list.append(("tool_call", index, id, name, arguments))?;
            }
        }
    }
    Ok(list)
}

pub(super) fn python_message<'py>(
    py: Python<'py>,
    message: &Message,
) -> PyResult<Bound<'py, PyDict>> {
    let calls = PyList::empty(py);
    for call in &message.tool_calls {
        let entry = PyDict::new(py);
        entry.set_item("id", &call.id)?;
        entry.set_item("name", &call.name)?;
        entry.set_item("arguments", &call.arguments)?;
        calls.append(entry)?;
    }
    let whole = PyDict::new(py);
    whole.set_item("content", &message.content)?;
    whole.set_item("reasoning", &message.reasoning)?;
    whole.set_item("tool_calls", calls)?;
    whole.set_item("error", message.error.as_deref())?;
    Ok(whole)
}
