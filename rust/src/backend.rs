//! The seeds' two traits, for Rust programs that load, ask and unload without Python.

use std::path::Path;
use std::sync::Arc;

use crate::config::{GenerationConfig, ModelConfig};
use crate::context::{Context, Prompt};
use crate::error::{Error, Result};
use crate::model::Model;

/// One model at a time: load, ask, unload.
pub trait ModelBackend {
    fn load(&mut self, path: &Path, n_gpu_layers: i32, n_ctx: u32) -> Result<()>;
    fn generate(&mut self, prompt: &str, max_tokens: u32) -> Result<String>;
    /// Unloading with nothing loaded is fine.
    fn unload(&mut self) -> Result<()>;
}

pub trait InferenceBackend {
    fn load_model(&mut self, path: &Path, n_ctx: u32) -> Result<()>;
    fn unload_model(&mut self);
    fn is_loaded(&self) -> bool;
    fn generate(
        &self,
        prompt: &str,
        max_tokens: u32,
        temperature: f32,
        top_p: f32,
    ) -> Result<String>;
    fn tokenize(&self, text: &str) -> Result<Vec<i32>>;
    fn detokenize(&self, tokens: &[i32]) -> Result<String>;
    fn context_size(&self) -> usize;
    fn thread_count(&self) -> usize;
}

#[derive(Default)]
pub struct LlamaCppBackend {
    // The context goes before the weights.
    context: Option<Arc<Context>>,
    model: Option<Arc<Model>>,
}

impl LlamaCppBackend {
    fn open(&mut self, path: &Path, n_gpu_layers: i32, n_ctx: u32, n_seq_max: u32) -> Result<()> {
        self.close(); // the old model's memory is free before the new one needs its own
        let config = ModelConfig::new(path)?.with_gpu_layers(n_gpu_layers);
        let mut config = config.with_context_size(n_ctx);
        config.context.n_seq_max = n_seq_max;
        let model = Model::load(config)?;
        self.context = Some(model.create_context()?);
        self.model = Some(model);
        Ok(())
    }

    fn close(&mut self) {
        if let Some(model) = self.model.take() {
            model.close_contexts();
        }
        self.context = None;
    }

    fn context(&self) -> Result<&Context> {
        self.context.as_deref().ok_or_else(|| Error::ModelNotLoaded { what: "the model".into() })
    }

    fn ask(&self, prompt: &str, config: GenerationConfig) -> Result<String> {
        self.context()?.generate(Prompt::Text(prompt.into()), config, |_| true, || true)
    }
}

/// Samples as the spike did: temperature 0.7, then top-p 0.9, seed 42.
impl ModelBackend for LlamaCppBackend {
    fn load(&mut self, path: &Path, n_gpu_layers: i32, n_ctx: u32) -> Result<()> {
        // Whoever generates has the backend to himself.
        self.open(path, n_gpu_layers, n_ctx, 1)
    }

    fn generate(&mut self, prompt: &str, max_tokens: u32) -> Result<String> {
        let config = GenerationConfig {
            max_tokens: max_tokens.into(),
            top_k: 0,
            repeat_penalty: 1.0,
            seed: 42,
            special: true,
            ..GenerationConfig::default()
        };
        self.ask(prompt, config)
    }

    fn unload(&mut self) -> Result<()> {
        self.close();
        Ok(())
    }
}

impl InferenceBackend for LlamaCppBackend {
    fn load_model(&mut self, path: &Path, n_ctx: u32) -> Result<()> {
        self.open(path, -1, n_ctx, 0)
    }

    fn unload_model(&mut self) {
        self.close();
    }

    fn is_loaded(&self) -> bool {
        self.model.is_some()
    }

    fn generate(
        &self,
        prompt: &str,
        max_tokens: u32,
        temperature: f32,
        top_p: f32,
    ) -> Result<String> {
        let max_tokens = max_tokens.into();
        self.ask(prompt, GenerationConfig { max_tokens, temperature, top_p, ..Default::default() })
    }

    fn tokenize(&self, text: &str) -> Result<Vec<i32>> {
        self.context()?.tokenize(text, true)
    }

    fn detokenize(&self, tokens: &[i32]) -> Result<String> {
        self.context()?.model()?.vocabulary().detokenize(tokens, false)
    }

    fn context_size(&self) -> usize {
        self.context.as_ref().map_or(0, |context| context.limits().n_ctx)
    }

    fn thread_count(&self) -> usize {
        self.context.as_ref().map_or(0, |context| context.n_threads() as usize)
    }
}
