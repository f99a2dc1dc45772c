//! One match: `Error` → the class in `tabagent_model.errors`.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::Error;

/// The exception for an error, with its message, its hint and its facts.
pub(super) fn exception(error: &Error) -> PyErr {
    Python::attach(|py| build(py, error).unwrap_or_else(|failed| failed))
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let facts = PyDict::new(py);
    facts.set_item("hint", error.hint())?;
    let class = match error {
        Error::ModelNotFound { .. } => "ModelNotFoundError",
        Error::UnreadableModel { .. } => "UnreadableModelError",
        Error::InvalidFormat { .. } => "InvalidFormatError",
        Error::ModelCorrupted { .. } => "ModelCorruptedError",
        Error::UnsupportedModel { .. } => "UnsupportedModelError",
        Error::LoadCancelled { .. } => "LoadCancelledError",
        Error::NoBackend { .. } => "BackendError",
        Error::OutOfMemory { needed, free, .. } => {
            facts.set_item("needed", needed)?;
            facts.set_item("free", free)?;
            "OutOfMemoryError"
        }
        Error::Exhausted { .. } => "OutOfMemoryError",
        Error::StepMemory { device } => {
            facts.set_item("device", device)?;
            "OutOfMemoryError"
        }
        Error::ContextCreation { .. } => "ContextTooSmallError",
        Error::InvalidRequest { name, .. } => {
            facts.set_item("name", name)?;
            "InvalidRequestError"
        }
        Error::ContextLimitExceeded { max, required } => {
            facts.set_item("name", "prompt")?;
            facts.set_item("max", max)?;
            facts.set_item("required", required)?;
            "ContextLimitExceededError"
        }
        Error::Tokenization { .. } => "TokenizationError",
        Error::Template { .. } => "TemplateError",
        Error::Grammar { syntax, position, .. } => {
            facts.set_item("name", syntax)?;
            facts.set_item("position", *position)?;
            "GrammarError"
        }
        Error::Sampling { .. } => "SamplingError",
        Error::LogitsHook { cause, .. } => {
            // What the caller's own function raised is what the caller gets.
            let raised = cause.as_ref().and_then(|cause| cause.downcast_ref::<PyErr>());
            if let Some(raised) = raised {
                return Ok(raised.clone_ref(py));
            }
            "SamplingError"
        }
        Error::ModelBusy { .. } => "ModelBusyError",
        Error::GenerationTimeout { .. } => "GenerationTimeoutError",
        Error::QueueTimeout { .. } => "QueueTimeoutError",
        Error::QueueFull { .. } => "QueueFullError",
        Error::ModelNotLoaded { .. } | Error::ModelUnloaded => "ModelNotLoadedError",
        Error::ForkedProcess { .. } => "ForkedProcessError",
        Error::Hardware { .. } => "HardwareError",
        Error::BinaryNotFound { .. } => "BinaryNotFoundError",
        Error::Internal { .. } => "InternalError",
    };
    let class = py.import("tabagent_model.errors")?.getattr(class)?;
    Ok(PyErr::from_value(class.call((error.to_string(),), Some(&facts))?))
}
