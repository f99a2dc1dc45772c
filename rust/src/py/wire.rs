//! The worker's wire, for what Python sends and for what the engine tells itself.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::wire::Wire;

#[pyclass(frozen, name = "Wire", module = "tabagent_model._core")]
pub struct PyWire(pub(super) Arc<Wire>);

#[pymethods]
impl PyWire {
    #[new]
    fn new(socket: i32) -> PyResult<PyWire> {
        Ok(PyWire(Arc::new(Wire::over(socket)?)))
    }

    fn send(&self, py: Python<'_>, parts: Vec<Bound<'_, PyBytes>>) -> PyResult<()> {
        let parts: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
        Ok(py.detach(|| self.0.send(parts))?)
    }
}
