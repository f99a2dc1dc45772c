//! Model: open weights and vocabulary, shared by reference.

mod load;
mod start;
mod tokenizer;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use llama_cpp_2::model::LlamaModel;

use crate::config::{ContextConfig, ModelConfig};
use crate::constraint::Constraints;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::gguf::Description;

pub use load::{k_quants_stay, relaid_types};
pub use start::{Device, backend_devices, load_gpu_backend, probe, probe_gpu_backend, start};
pub use tokenizer::Vocabulary;

pub struct Model {
    // Fields drop in this order; the vocabulary points into the weights.
    vocabulary: Vocabulary,
    weights: LlamaModel,
    config: ModelConfig,
    description: Description,
    gpu_layers: u32,
    is_repacked: bool,
    load_time: Duration,
    /// A forked child has the memory but none of the threads.
    process: u32,
    /// llama.cpp writes to the model while a context of it is created.
    creating: Mutex<()>,
    constraints: Constraints,
    contexts: Mutex<Vec<Weak<Context>>>,
}

impl Model {
    pub fn load(config: ModelConfig) -> Result<Arc<Model>> {
        Model::load_with(config, |_| true)
    }

    /// `progress` hears numbers from 0 to 1 and stops the load by saying false.
    pub fn load_with(
        config: ModelConfig,
        progress: impl FnMut(f32) -> bool + 'static,
    ) -> Result<Arc<Model>> {
        load::load(config, None, progress)
    }

    /// The same of a file whose header was just read: with a large vocabulary that takes a while.
    pub fn load_inspected(
        config: ModelConfig,
        inspected: Description,
        progress: impl FnMut(f32) -> bool + 'static,
    ) -> Result<Arc<Model>> {
        load::load(
            ModelConfig { path: inspected.path.clone(), ..config },
            Some(inspected),
            progress,
        )
    }

    /// A context with the settings of the model's own configuration.
    pub fn create_context(self: &Arc<Model>) -> Result<Arc<Context>> {
        self.create_context_with(&self.config.context)
    }

    pub fn create_context_with(self: &Arc<Model>, config: &ContextConfig) -> Result<Arc<Context>> {
        if self.config.vocab_only {
            return Err(Error::ModelNotLoaded {
                what: "the weights (`vocab_only` was set)".into(),
            });
        }
        let context = Arc::new(Context::open(self.clone(), config)?);
        let mut contexts = lock(&self.contexts);
        contexts.retain(|context| context.strong_count() > 0);
        contexts.push(Arc::downgrade(&context));
        Ok(context)
    }

    /// Ends every request and frees every context. The weights go with the last reference.
    pub fn close_contexts(&self) {
        let contexts = std::mem::take(&mut *lock(&self.contexts));
        for context in contexts.iter().filter_map(Weak::upgrade) {
            context.close();
        }
    }

    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// What was found out about its tokens for constraints.
    pub fn constraints(&self) -> &Constraints {
        &self.constraints
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn description(&self) -> &Description {
        &self.description
    }

    pub fn vocab_size(&self) -> u32 {
        self.vocabulary.size()
    }

    pub fn context_train_size(&self) -> u32 {
        self.description.n_ctx_train
    }

    pub fn embedding_dim(&self) -> u32 {
        self.weights.n_embd().max(0) as u32
    }

    pub fn layer_count(&self) -> u32 {
        self.weights.n_layer()
    }

    pub fn size_bytes(&self) -> u64 {
        self.weights.size()
    }

    pub fn n_params(&self) -> u64 {
        self.weights.n_params()
    }

    /// How many layers really lie on a GPU.
    pub fn gpu_layers(&self) -> u32 {
        self.gpu_layers
    }

    /// Whether weights may lie in another layout than the file's, where the CPU has one for them.
    pub fn is_repacked(&self) -> bool {
        self.is_repacked
    }

    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    pub fn metadata(&self) -> Vec<(String, String)> {
        let one = |index| {
            let key = self.weights.meta_key_by_index(index).ok()?;
            Some((key, self.weights.meta_val_str_by_index(index).ok()?))
        };
        (0..self.weights.meta_count()).filter_map(one).collect()
    }

    pub fn chat_template(&self) -> Option<&str> {
        self.description.chat_template.as_deref()
    }

    /// Some models have several templates, for tools (`tool_use`) or for documents.
    pub fn named_chat_template(&self, name: &str) -> Option<String> {
        let is_name = !name.is_empty()
            && name.len() <= 64
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
        let key = is_name.then(|| format!("tokenizer.chat_template.{name}"))?;
        self.weights.meta_val_str(&key).ok()
    }

    /// Refuses to serve the forked child of the process that loaded it.
    pub fn check_process(&self) -> Result<()> {
        let child = std::process::id();
        if child == self.process {
            return Ok(());
        }
        Err(Error::ForkedProcess { owner: self.process, child })
    }

    /// Held while llama.cpp creates or frees a context of this model.
    pub(crate) fn creating(&self) -> MutexGuard<'_, ()> {
        lock(&self.creating)
    }

    pub(crate) fn as_ptr(&self) -> *mut llama_cpp_sys_2::llama_model {
        load::pointer(&self.weights)
    }
}

/// Frees nothing by itself: tells the allocator to return what it keeps for later.
pub fn return_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> std::ffi::c_int;
        }
        // SAFETY: it has no preconditions.
        unsafe { malloc_trim(0) };
    }
}

/// What a backend must have been built from to be loaded into this: rust/build.rs.
pub const ENGINE: &str = env!("TABAGENT_ENGINE");

/// The llama.cpp that this was built with.
pub fn llama_version() -> String {
    // SAFETY: a static string.
    let version = unsafe { std::ffi::CStr::from_ptr(llama_cpp_sys_2::llama_version()) };
    version.to_string_lossy().into_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
