//! ChatPrompt: a rendered conversation as Python sees it.

use std::sync::{Arc, Weak};

use pyo3::prelude::*;
use pyo3::types::PyString;

use super::convert::{self, guarded};
use crate::chat::{Chat, Prompt};
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

    fn chat(&self) -> Result<Arc<Chat>> {
        let gone = || Error::ModelNotLoaded { what: "the model of this prompt".into() };
        self.chat.upgrade().ok_or_else(gone)
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
