//! A Python function that changes logits, as the core calls it: on the thread that everybody waits
//! for, and with Python's lock.

use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyList, PyMemoryView};

use super::convert::shown;
use super::error::exception;
use crate::config::LogitsHook;
use crate::error::{Error, Result};

pub(super) fn of(value: &Bound<'_, PyAny>) -> PyResult<LogitsHook> {
    if !value.is_callable() {
        let allowed = "a function of the tokens and the logits";
        return Err(exception(&Error::invalid("logits_hook", shown(value), allowed)));
    }
    let function = value.clone().unbind();
    Ok(LogitsHook(Arc::new(move |tokens, logits| call(&function, tokens, logits))))
}

fn call(function: &Py<PyAny>, tokens: &[i32], logits: &mut [f32]) -> Result<()> {
    let called = Python::try_attach(|py| {
        apply(function.bind(py), tokens, logits).map_err(|error| Error::LogitsHook {
            what: error.to_string(),
            cause: Some(Arc::new(error)),
        })
    });
    let exiting = || Error::LogitsHook { what: "Python is shutting down".into(), cause: None };
    called.unwrap_or_else(|| Err(exiting()))
}

/// The function gets memory that belongs to Python: whoever keeps it reads old numbers, but not ours.
fn apply(function: &Bound<'_, PyAny>, tokens: &[i32], logits: &mut [f32]) -> PyResult<()> {
    let py = function.py();
    let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_ne_bytes()).collect();
    let memory = PyByteArray::new(py, &bytes);
    let view = PyMemoryView::from(memory.as_any())?;
    let floats = view.call_method1("cast", ("f",))?;
    let answer = function.call1((PyList::new(py, tokens)?, &floats));
    for view in [&floats, view.as_any()] {
        let _ = view.call_method0("release"); // refused while an array is made of it
    }
    if !answer?.is_none() {
        let message = "a logits hook changes the logits in place, and returns nothing";
        return Err(PyTypeError::new_err(message));
    }
    let changed = memory.to_vec();
    if changed.len() != bytes.len() {
        return Err(PyTypeError::new_err("a logits hook cannot change how many logits there are"));
    }
    for (logit, bytes) in logits.iter_mut().zip(changed.as_chunks().0) {
        *logit = f32::from_ne_bytes(*bytes);
    }
    Ok(())
}
