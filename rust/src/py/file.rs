//! ModelFile: what a model file's header says, and what a context of the model would come to.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::convert::{self, guarded};
use super::model::context_config;
use crate::config::ContextConfig;
use crate::context::{Heads, Options, Plan, threads_of, trained};
use crate::gguf::{self, Description, Part};

#[pyclass(frozen, module = "tabagent_model._core")]
pub struct ModelFile {
    pub(super) description: Description,
}

#[pymethods]
impl ModelFile {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<ModelFile> {
        Ok(ModelFile { description: guarded(py, || gguf::inspect(&path))? })
    }

    fn description<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        convert::description(py, &self.description)
    }

    /// What its memory is made of.
    fn sizes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let found = &self.description;
        let part = |part: &Part| {
            let facts = PyDict::new(py);
            facts.set_item("bytes", part.bytes)?;
            facts.set_item("matrices", part.matrices.clone())?;
            facts.set_item("kv_values", part.kv_values)?;
            PyResult::Ok(facts)
        };
        let facts = PyDict::new(py);
        facts.set_item("input", part(&found.parts.input)?)?;
        facts.set_item(
            "layers",
            found.parts.layers.iter().map(part).collect::<PyResult<Vec<_>>>()?,
        )?;
        facts.set_item("output", part(&found.parts.output)?)?;
        facts.set_item("shared_bytes", found.parts.shared_bytes)?;
        facts.set_item("n_ff", found.n_ff)?;
        facts.set_item("n_merges", found.n_merges)?;
        facts.set_item("head_dim_k", found.head_dim_k)?;
        facts.set_item("head_dim_v", found.head_dim_v)?;
        facts.set_item("state_bytes_per_sequence", found.state_bytes_per_sequence)?;
        Ok(facts)
    }

    /// `n_ctx` as the model allows it, and `n_threads`; and what is open about attention, as what it
    /// depends on, the choices, and the one to take without a measurement; or None.
    #[allow(clippy::type_complexity)]
    fn attention(
        &self,
        py: Python<'_>,
        settings: &Bound<'_, PyDict>,
        gpu_layers: u32,
        free: Option<u64>,
    ) -> PyResult<Option<((u32, u32, u32, u32, u32), Vec<Choice>, Choice)>> {
        let config = context_config(settings)?;
        let found = guarded(py, || Ok(Options::of(&self.description, &config, gpu_layers, free)))?;
        Ok(found.map(|options| {
            let Heads { dim, count, count_kv } = options.heads;
            let choices = options.choices.iter().copied().map(convert::attention).collect();
            let work = (dim, count, count_kv, options.n_ctx, options.n_threads);
            (work, choices, convert::attention(options.built_in()))
        }))
    }

    /// The sequences, their bytes, and those of the prompt cache at most.
    fn plan(&self, settings: &Bound<'_, PyDict>, free: Option<u64>) -> PyResult<(u32, u64, usize)> {
        let config = self.fitted(context_config(settings)?);
        let plan = Plan::of(&self.description, &config, free);
        Ok((plan.n_seq_max, plan.kv_bytes, plan.prompt_cache_bytes))
    }

    /// Tokens of a sequence, and threads, as a context would have them.
    fn fit(&self, settings: &Bound<'_, PyDict>) -> PyResult<(u32, u32)> {
        let config = self.fitted(context_config(settings)?);
        Ok((config.n_ctx, threads_of(&config)))
    }
}

impl ModelFile {
    fn fitted(&self, config: ContextConfig) -> ContextConfig {
        ContextConfig { n_ctx: trained(&self.description, config.n_ctx), ..config }
    }
}

type Choice = (&'static str, &'static str);
