//! PyContext: short methods around `Context`; and the events as Python sees them.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyAny, PyBytes, PyDict, PyMapping, PyString};

use super::convert::{self, guarded};
use super::error::exception;
use crate::context::Context;
use crate::context::message::{Event, Logprob};

#[pyclass(frozen, weakref, module = "tabagent_model._core")]
pub struct PyContext {
    context: Arc<Context>,
}

impl PyContext {
    pub(super) fn new(context: Arc<Context>) -> PyContext {
        PyContext { context }
    }
}

/// Its thread may be waiting for Python, in a logits hook; so nobody may wait for it with Python.
impl Drop for PyContext {
    fn drop(&mut self) {
        Python::attach(|py| py.detach(|| self.context.close()));
    }
}

#[pymethods]
impl PyContext {
    fn submit(
        &self,
        request_id: u64,
        prompt: &Bound<'_, PyAny>,
        params: &Bound<'_, PyMapping>,
    ) -> PyResult<()> {
        let config = convert::generation_config(params)?;
        let (py, prompt) = (prompt.py(), convert::prompt(prompt)?);
        guarded(py, || self.context.submit(request_id, prompt, config))
    }

    fn abort(&self, py: Python<'_>, request_id: u64) -> PyResult<()> {
        guarded(py, || {
            self.context.abort(request_id);
            Ok(())
        })
    }

    /// Sleeps until a step has produced something. An empty list means the context is closed.
    fn next_events(&self, py: Python<'_>) -> PyResult<Vec<PyEvent>> {
        let events = guarded(py, || {
            self.context.check_thread("waiting")?;
            Ok(self.context.next_events())
        })?;
        Ok(events.into_iter().map(PyEvent).collect())
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

/// Token, text, logprob.
type OneLogprob = (i32, String, f32);

#[pyclass(frozen, name = "Event", module = "tabagent_model._core")]
pub struct PyEvent(Event);

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
    /// None where they were not asked for.
    #[getter]
    fn logprobs(&self) -> Option<Vec<(OneLogprob, Vec<OneLogprob>)>> {
        let of = |one: &Logprob| (one.token, one.text.clone(), one.logprob);
        let all = self.0.end.as_ref()?.logprobs.as_ref()?;
        Some(all.iter().map(|each| (of(&each.chosen), each.top.iter().map(of).collect())).collect())
    }
}
