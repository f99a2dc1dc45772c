//! PyContext: short methods around `Context`; and the events as Python sees them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyAny, PyBytes, PyDict, PyList, PyMapping, PyString};

use super::chat::{ChatPrompt, python_deltas, python_message};
use super::convert::{self, guarded};
use super::error::exception;
#[cfg(unix)]
use super::wire::PyWire;
use crate::chat::answer::{AnswerParser, Delta, Message};
use crate::context::Context;
use crate::context::message::{Event, FinishReason, Logprob};

#[pyclass(frozen, weakref, module = "tabagent_model._core")]
pub struct PyContext {
    context: Arc<Context>,
    /// What reads the answers of chats that are under way, by their requests.
    parsers: Arc<Mutex<Parsers>>,
}

type Parsers = HashMap<u64, Arc<Mutex<AnswerParser>>>;

impl PyContext {
    pub(super) fn new(context: Arc<Context>) -> PyContext {
        PyContext { context, parsers: Arc::default() }
    }

    fn parsers(&self) -> MutexGuard<'_, Parsers> {
        lock(&self.parsers)
    }

    /// Reads what is new of a chat's answer, here, where nobody else has to wait for that.
    fn read(&self, event: Event) -> PyEvent {
        // It stays in the list meanwhile: that keeps the request's next events from overtaking this one.
        let Some(parser) = self.parsers().get(&event.id).cloned() else {
            return PyEvent(event, None);
        };
        let mut parser = parser.lock().unwrap_or_else(PoisonError::into_inner);
        let mut deltas = parser.feed(&event.text);
        let reason = event.end.as_ref().map(|end| end.reason);
        if reason.is_some() {
            self.parsers().remove(&event.id);
        }
        let message = reason.filter(|reason| *reason != FinishReason::Error).map(|reason| {
            let (rest, message) = parser.finish(reason == FinishReason::Stop);
            deltas.extend(rest);
            message
        });
        PyEvent(event, Some((deltas, message)))
    }
}

fn lock(parsers: &Mutex<Parsers>) -> MutexGuard<'_, Parsers> {
    parsers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Its thread may be waiting for Python, in a logits hook; so nobody may wait for it with Python.
impl Drop for PyContext {
    fn drop(&mut self) {
        Python::attach(|py| py.detach(|| self.context.close()));
    }
}

#[pymethods]
impl PyContext {
    /// The answer to a `chat` is read as its template means it, in pieces with that `patience`.
    #[pyo3(signature = (request_id, prompt, params, chat=None, patience=50))]
    fn submit(
        &self,
        request_id: u64,
        prompt: &Bound<'_, PyAny>,
        params: &Bound<'_, PyMapping>,
        chat: Option<&ChatPrompt>,
        patience: u32,
    ) -> PyResult<()> {
        let config = convert::generation_config(params)?;
        let (py, prompt) = (prompt.py(), convert::prompt(prompt)?);
        guarded(py, || {
            if let Some(chat) = chat {
                let parser = || Arc::new(Mutex::new(chat.answer_parser(patience)));
                self.parsers().entry(request_id).or_insert_with(parser); // before there is an event
            }
            self.context.submit(request_id, prompt, config).inspect_err(|_| {
                if !self.context.has(request_id) {
                    self.parsers().remove(&request_id);
                }
            })
        })
    }

    fn abort(&self, py: Python<'_>, request_id: u64) -> PyResult<()> {
        guarded(py, || {
            self.context.abort(request_id);
            Ok(())
        })
    }

    /// Sleeps until a step has produced something. An empty list means the context is closed.
    fn next_events(&self, py: Python<'_>) -> PyResult<Vec<PyEvent>> {
        guarded(py, || {
            self.context.check_thread("waiting")?;
            Ok(self.context.next_events().into_iter().map(|event| self.read(event)).collect())
        })
    }

    /// From now on, events that are text and tokens only go through `wire`, and not to `next_events`.
    #[cfg(unix)]
    fn tell_through(&self, wire: &PyWire) {
        let (wire, parsers) = (wire.0.clone(), self.parsers.clone());
        self.context.tap(Box::new(move |events| {
            let is_plain = |event: &Event| {
                let is_chat = lock(&parsers).contains_key(&event.id);
                event.end.is_none() && event.logprobs.is_empty() && !is_chat
            };
            let (plain, rest): (Vec<_>, Vec<_>) = events.into_iter().partition(is_plain);
            if !plain.is_empty() {
                let _ = wire.tell(&plain); // who hears knows when there is nobody left to tell
            }
            rest
        }));
    }

    /// Refuses the thread that everybody here waits for: a logits hook's.
    fn check_thread(&self, py: Python<'_>) -> PyResult<()> {
        guarded(py, || self.context.check_thread("waiting"))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guarded(py, || {
            self.context.check_thread("closing")?;
            self.context.close();
            Ok(())
        })
    }

    #[getter]
    fn is_closed(&self) -> bool {
        self.context.is_closed()
    }

    #[getter]
    fn n_ctx(&self) -> usize {
        self.context.limits().n_ctx
    }

    #[getter]
    fn n_batch(&self) -> usize {
        self.context.limits().n_batch
    }

    #[getter]
    fn n_seq_max(&self) -> usize {
        self.context.limits().n_slots
    }

    #[getter]
    fn n_threads(&self) -> u32 {
        self.context.n_threads()
    }

    #[getter]
    fn flash_attn(&self) -> &'static str {
        self.context.attention().flash_attn.name()
    }

    #[getter]
    fn kv_type(&self) -> &'static str {
        self.context.attention().kv_type.name()
    }

    #[pyo3(signature = (text, add_bos=true, special=false))]
    fn tokenize(
        &self,
        text: &Bound<'_, PyString>,
        add_bos: bool,
        special: bool,
    ) -> PyResult<Vec<i32>> {
        let py = text.py();
        let text = convert::text(text)?;
        guarded(py, || self.context.model()?.vocabulary().tokenize(text, add_bos, special))
    }

    #[pyo3(signature = (tokens, special=false))]
    fn detokenize(&self, tokens: &Bound<'_, PyAny>, special: bool) -> PyResult<String> {
        let py = tokens.py();
        let tokens = convert::tokens(tokens)?;
        guarded(py, || self.context.model()?.vocabulary().detokenize(&tokens, special))
    }

    fn token_to_text(&self, py: Python<'_>, token: i32) -> PyResult<String> {
        guarded(py, || self.context.model()?.vocabulary().detokenize(&[token], true))
    }

    #[pyo3(signature = (prompt, max_tokens=512, *, callback=None, **sampling))]
    pub(super) fn generate(
        &self,
        prompt: &Bound<'_, PyAny>,
        max_tokens: i64,
        callback: Option<Py<PyAny>>,
        sampling: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<String> {
        let py = prompt.py();
        let mut config = match sampling {
            Some(sampling) => convert::generation_config(sampling.as_mapping())?,
            None => Default::default(),
        };
        config.max_tokens = max_tokens;
        let prompt = convert::prompt(prompt)?;
        // The first exception, of the callback or of a signal, ends the request and is raised.
        let raised: Mutex<Option<PyErr>> = Mutex::new(None);
        let keep = |result: PyResult<bool>| {
            result.unwrap_or_else(|error| {
                raised.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                false
            })
        };
        let on_text = |text: &str| match &callback {
            Some(callback) => keep(Python::attach(|py| {
                let answer = callback.bind(py).call1((text,))?;
                Ok(answer.is_none() || answer.is_truthy()?)
            })),
            None => true,
        };
        let idle = || keep(Python::attach(|py| py.check_signals().map(|()| true)));
        let text = guarded(py, || self.context.generate(prompt, config, on_text, idle));
        match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => text,
        }
    }

    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        convert::metrics(py, &self.context.metrics())
    }

    /// One dictionary for each kind of memory.
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        self.context.memory().iter().map(|found| convert::memory(py, found)).collect()
    }

    /// One dictionary for each slot.
    fn slots<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        self.context.slots().iter().map(|slot| convert::slot(py, slot)).collect()
    }

    fn unpin(&self, request_id: u64) {
        self.context.unpin(request_id);
    }

    fn export_state<'py>(
        &self,
        tokens: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let (py, ids) = (tokens.py(), convert::tokens(tokens)?);
        let state = guarded(py, || self.context.export_state(ids))?;
        Ok(state.map(|bytes| PyBytes::new(py, &bytes)))
    }

    fn import_state(
        &self,
        data: &Bound<'_, PyBytes>,
        tokens: &Bound<'_, PyAny>,
    ) -> PyResult<usize> {
        let (py, ids) = (tokens.py(), convert::tokens(tokens)?);
        let bytes = data.as_bytes();
        guarded(py, || self.context.import_state(bytes, &ids))
    }

    /// Grows as long as the engine gets on; and whether it has anything to do.
    fn pulse(&self) -> (u64, bool) {
        self.context.pulse()
    }

    /// For tests: the next step panics.
    fn _inject_panic(&self) {
        self.context.inject_panic();
    }

    /// For tests: the next step never ends.
    fn _inject_hang(&self) {
        self.context.inject_hang();
    }
}

type Read<'py> = (Bound<'py, PyList>, Option<Bound<'py, PyDict>>);

/// Token, text, logprob.
type OneLogprob = (i32, String, f32);

#[pyclass(frozen, name = "Event", module = "tabagent_model._core")]
pub struct PyEvent(Event, Option<(Vec<Delta>, Option<Message>)>);

#[pymethods]
impl PyEvent {
    #[getter]
    fn request_id(&self) -> u64 {
        self.0.id
    }

    #[getter]
    fn text(&self) -> &str {
        &self.0.text
    }

    #[getter]
    fn tokens(&self) -> Vec<i32> {
        self.0.tokens.clone()
    }

    #[getter]
    fn is_last(&self) -> bool {
        self.0.end.is_some()
    }

    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        self.0.end.as_ref().map(|end| end.reason.name())
    }

    #[getter]
    fn stop(&self) -> Option<&str> {
        self.0.end.as_ref()?.stop.as_deref()
    }

    #[getter]
    fn error(&self) -> Option<PyErr> {
        self.0.end.as_ref()?.error.as_ref().map(exception)
    }

    #[getter]
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.0.end.as_ref().map(|end| convert::stats(py, &end.stats)).transpose()
    }

    /// What was read of a chat's answer, and with the last event all of it.
    #[getter]
    fn read<'py>(&self, py: Python<'py>) -> PyResult<Option<Read<'py>>> {
        let Some((deltas, message)) = &self.1 else { return Ok(None) };
        let message = message.as_ref().map(|message| python_message(py, message)).transpose()?;
        Ok(Some((python_deltas(py, deltas)?, message)))
    }

    #[getter]
    fn logprobs(&self) -> Vec<(OneLogprob, Vec<OneLogprob>)> {
        let of = |one: &Logprob| (one.token, one.text.clone(), one.logprob);
        let all = self.0.logprobs.iter();
        all.map(|each| (of(&each.chosen), each.top.iter().map(of).collect())).collect()
    }
}
