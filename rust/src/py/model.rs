//! PyModel: weights and vocabulary; short methods around `Model`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyDeprecationWarning;
use pyo3::prelude::*;
use pyo3::types::{PyAny, PyDict, PyString};

use super::chat::ChatPrompt;
use super::context::PyContext;
use super::convert::{self, guarded};
use super::error::exception;
use super::file::ModelFile;
use crate::chat::Chat;
use crate::config::{ContextConfig, FlashAttention, KvType, ModelConfig, SplitMode};
use crate::context::{Attention, Heads, Options};
use crate::error::{Error, Result};
use crate::hardware::memory;
use crate::model::{Model, backend_devices, return_free_memory};

#[pyclass(frozen, weakref, module = "tabagent_model._core")]
#[derive(Default)]
pub struct PyModel {
    model: Mutex<Option<Arc<Model>>>,
    chat: Mutex<Option<Arc<Chat>>>,
    /// The context of the seeds' `model.generate`, made when first asked for.
    own_context: Mutex<Option<Py<PyContext>>>,
}

#[pymethods]
impl PyModel {
    #[new]
    fn new() -> PyModel {
        PyModel::default()
    }

    #[pyo3(signature = (model_path=None, *, dll_path=None, gpu_layers=0, mlock=false, mmap=true,
        main_gpu=0, vocab_only=false, split_mode="layer", progress=None, library_path=None,
        n_gpu_layers=None, use_mlock=None, repack=None, tensor_split=None, file=None))]
    #[allow(clippy::too_many_arguments)] // the seed's signature
    fn load(
        &self,
        py: Python<'_>,
        model_path: Option<PathBuf>,
        dll_path: Option<&Bound<'_, PyAny>>,
        gpu_layers: i32,
        mlock: bool,
        mmap: bool,
        main_gpu: i32,
        vocab_only: bool,
        split_mode: &str,
        progress: Option<Py<PyAny>>,
        library_path: Option<&Bound<'_, PyAny>>,
        n_gpu_layers: Option<i32>,
        use_mlock: Option<bool>,
        repack: Option<bool>,
        tensor_split: Option<Vec<f32>>,
        file: Option<&Bound<'_, ModelFile>>,
    ) -> PyResult<()> {
        if dll_path.is_some() || library_path.is_some() {
            let message =
                c"`dll_path` and `library_path` are ignored: the package brings its own llama.cpp";
            PyErr::warn(py, &py.get_type::<PyDeprecationWarning>(), message, 1)?;
        }
        py.import("tabagent_model._native")?.call_method0("start")?;
        let config = ModelConfig {
            gpu_layers: n_gpu_layers.unwrap_or(gpu_layers),
            main_gpu,
            mmap,
            mlock: use_mlock.unwrap_or(mlock),
            vocab_only,
            split_mode: self::split_mode(split_mode)?,
            tensor_split: tensor_split.unwrap_or_default(),
            repack,
            ..guarded(py, move || ModelConfig::new(model_path_of(model_path)?))?
        };
        config.validate().map_err(|error| exception(&error))?;
        self.drop_model(py); // the old one's memory is free before the new one needs its own
        let raised: Arc<Mutex<Option<PyErr>>> = Arc::default();
        let slot = raised.clone();
        let tell = move |fraction| match said_go_on(progress.as_ref(), fraction) {
            Ok(go_on) => go_on,
            Err(error) => {
                *lock(&slot) = Some(error);
                false
            }
        };
        let inspected = file.map(|file| file.get().description.clone());
        let loaded = guarded(py, || match inspected {
            Some(inspected) => Model::load_inspected(config, inspected, tell),
            None => Model::load_with(config, tell),
        });
        if let Some(error) = lock(&raised).take() {
            return Err(error);
        }
        let model = loaded?;
        *lock(&self.chat) = Some(Arc::new(Chat::new(model.clone())));
        *lock(&self.model) = Some(model);
        Ok(())
    }

    #[pyo3(signature = (timeout=5.0))]
    fn unload<'py>(&self, py: Python<'py>, timeout: f64) -> PyResult<Bound<'py, PyDict>> {
        let _ = timeout; // requests end within one step, so there is nothing to wait out
        let before = memory::resident_bytes();
        let was_loaded = self.drop_model(py);
        let after = memory::resident_bytes();
        let freed = before.zip(after).map(|(b, a)| convert::mib(b) - convert::mib(a));
        let report = PyDict::new(py);
        report.set_item("was_loaded", was_loaded)?;
        report.set_item("rss_before_mb", before.map(convert::mib))?;
        report.set_item("rss_after_mb", after.map(convert::mib))?;
        report.set_item("freed_mb", freed)?;
        Ok(report)
    }

    #[getter]
    fn is_loaded(&self) -> bool {
        lock(&self.model).is_some()
    }

    #[getter]
    fn path(&self) -> PyResult<String> {
        Ok(self.model()?.config().path.to_string_lossy().into_owned())
    }

    #[getter]
    fn gpu_layers(&self) -> PyResult<u32> {
        Ok(self.model()?.gpu_layers())
    }

    /// Where the weights lie: `cpu`, or the name of the GPU.
    #[getter]
    fn device(&self) -> PyResult<String> {
        let model = self.model()?;
        // With several they are shared among all, of which the first stands for the rest.
        let first = match model.config().split_mode {
            SplitMode::None => model.config().main_gpu as usize,
            SplitMode::Layer | SplitMode::Row => 0,
        };
        let on_gpu = model.gpu_layers() > 0;
        let gpu = backend_devices().into_iter().filter(|device| on_gpu && device.is_gpu).nth(first);
        Ok(gpu.map_or_else(|| "cpu".into(), |device| device.name))
    }

    #[getter]
    fn is_repacked(&self) -> PyResult<bool> {
        Ok(self.model()?.is_repacked())
    }

    #[getter]
    fn load_time_ms(&self) -> PyResult<f64> {
        Ok(self.model()?.load_time().as_secs_f64() * 1e3)
    }

    #[getter]
    fn size_bytes(&self) -> PyResult<u64> {
        Ok(self.model()?.size_bytes())
    }

    #[getter]
    fn n_params(&self) -> PyResult<u64> {
        Ok(self.model()?.n_params())
    }

    fn vocab_size(&self) -> PyResult<u32> {
        Ok(self.model()?.vocab_size())
    }

    fn context_train_size(&self) -> PyResult<u32> {
        Ok(self.model()?.context_train_size())
    }

    fn embedding_dim(&self) -> PyResult<u32> {
        Ok(self.model()?.embedding_dim())
    }

    fn layer_count(&self) -> PyResult<u32> {
        Ok(self.model()?.layer_count())
    }

    fn token_bos(&self) -> PyResult<i32> {
        Ok(self.model()?.vocabulary().bos())
    }

    fn token_eos(&self) -> PyResult<i32> {
        Ok(self.model()?.vocabulary().eos())
    }

    fn token_nl(&self) -> PyResult<i32> {
        Ok(self.model()?.vocabulary().newline())
    }

    fn is_eog(&self, token: i32) -> PyResult<bool> {
        Ok(self.model()?.vocabulary().ends_generation(token))
    }

    /// What the file says of itself, as `inspect_gguf` gives it.
    fn model_info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        convert::description(py, self.model()?.description())
    }

    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let model = self.model()?;
        let values = PyDict::new(py);
        for (key, value) in model.metadata() {
            values.set_item(key, value)?;
        }
        Ok(values)
    }

    fn chat_template(&self) -> PyResult<Option<String>> {
        Ok(self.model()?.chat_template().map(str::to_owned))
    }

    #[pyo3(signature = (messages, add_generation_prompt=true, template=None, options_json=None))]
    fn render_chat(
        &self,
        messages: &Bound<'_, PyString>,
        add_generation_prompt: bool,
        template: Option<&Bound<'_, PyString>>,
        options_json: Option<&Bound<'_, PyString>>,
    ) -> PyResult<ChatPrompt> {
        self.model()?;
        let chat = lock(&self.chat).clone();
        let gone = || exception(&Error::ModelNotLoaded { what: "the model".into() });
        let (py, chat) = (messages.py(), chat.ok_or_else(gone)?);
        let messages = convert::text(messages)?;
        let template = template.map(convert::text).transpose()?;
        let options = options_json.map(convert::text).transpose()?;
        let prompt =
            guarded(py, || chat.render(messages, add_generation_prompt, template, options))?;
        Ok(ChatPrompt::new(prompt, &chat))
    }

    #[pyo3(signature = (text, add_bos=true, special=false))]
    fn tokenize(
        &self,
        text: &Bound<'_, PyString>,
        add_bos: bool,
        special: bool,
    ) -> PyResult<Vec<i32>> {
        let (model, py) = (self.model()?, text.py());
        let text = convert::text(text)?;
        guarded(py, || model.vocabulary().tokenize(text, add_bos, special))
    }

    #[pyo3(signature = (tokens, special=false))]
    fn detokenize(&self, tokens: &Bound<'_, PyAny>, special: bool) -> PyResult<String> {
        let (model, py) = (self.model()?, tokens.py());
        let tokens = convert::tokens(tokens)?;
        guarded(py, || model.vocabulary().detokenize(&tokens, special))
    }

    #[pyo3(signature = (token, special=false))]
    fn token_to_bytes(&self, py: Python<'_>, token: i32, special: bool) -> PyResult<Vec<u8>> {
        let model = self.model()?;
        guarded(py, || {
            let mut bytes = Vec::new();
            model.vocabulary().piece(token, special, &mut bytes)?;
            Ok(bytes)
        })
    }

    #[pyo3(signature = (n_ctx=4096, n_batch=512, n_threads=0, *, n_seq_max=0, queue_size=1024,
        prompt_cache_mb=-1, flash_attn="auto", kv_type="auto", offload_kqv=true, warmup=true))]
    #[allow(clippy::too_many_arguments)] // a keyword each
    fn create_context(
        &self,
        py: Python<'_>,
        n_ctx: i64,
        n_batch: i64,
        n_threads: i64,
        n_seq_max: i64,
        queue_size: i64,
        prompt_cache_mb: i64,
        flash_attn: &str,
        kv_type: &str,
        offload_kqv: bool,
        warmup: bool,
    ) -> PyResult<PyContext> {
        let config = ContextConfig {
            n_ctx: convert::fitted("n_ctx", n_ctx)?,
            n_batch: convert::fitted("n_batch", n_batch)?,
            n_threads: convert::fitted("n_threads", n_threads)?,
            n_seq_max: convert::fitted("n_seq_max", n_seq_max)?,
            queue_size: convert::fitted("queue_size", queue_size)?,
            prompt_cache_mb,
            flash_attn: self::flash_attn(flash_attn)?,
            kv_type: self::kv_type(kv_type)?,
            offload_kqv,
            warmup,
        };
        let model = self.model()?;
        let config = tuned(py, &model, config)?;
        let context = guarded(py, || model.create_context_with(&config))?;
        Ok(PyContext::new(context))
    }

    #[pyo3(signature = (prompt, max_tokens=100, **sampling))]
    fn generate(
        &self,
        prompt: &Bound<'_, PyAny>,
        max_tokens: i64,
        sampling: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<String> {
        let py = prompt.py();
        let context = self.own_context(py)?;
        context.get().generate(prompt, max_tokens, None, sampling)
    }

    fn __enter__(this: Py<PyModel>) -> Py<PyModel> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.drop_model(py);
    }
}

impl PyModel {
    fn model(&self) -> PyResult<Arc<Model>> {
        let model = lock(&self.model).clone();
        let model = model.ok_or_else(|| Error::ModelNotLoaded { what: "the model".into() });
        model.and_then(|model| model.check_process().map(|()| model)).map_err(|e| exception(&e))
    }

    /// Ends what runs, frees contexts first and then weights. False: nothing was loaded.
    fn drop_model(&self, py: Python<'_>) -> bool {
        drop(lock(&self.own_context).take());
        drop(lock(&self.chat).take());
        let Some(model) = lock(&self.model).take() else { return false };
        py.detach(|| {
            model.close_contexts();
            drop(model);
            return_free_memory();
        });
        true
    }

    fn own_context(&self, py: Python<'_>) -> PyResult<Py<PyContext>> {
        if let Some(context) = &*lock(&self.own_context) {
            return Ok(context.clone_ref(py));
        }
        let model = self.model()?;
        let config = ContextConfig { n_seq_max: 1, ..ContextConfig::default() };
        let config = tuned(py, &model, config)?;
        let context = guarded(py, || model.create_context_with(&config))?;
        let context = Py::new(py, PyContext::new(context))?;
        *lock(&self.own_context) = Some(context.clone_ref(py));
        Ok(context)
    }
}

impl Drop for PyModel {
    fn drop(&mut self) {
        Python::attach(|py| self.drop_model(py));
    }
}

/// Asks the caller's function, and lets Ctrl-C through while llama.cpp reads.
fn said_go_on(progress: Option<&Py<PyAny>>, fraction: f32) -> PyResult<bool> {
    Python::attach(|py| {
        py.check_signals()?;
        let Some(progress) = progress else { return Ok(true) };
        let answer = progress.bind(py).call1((fraction,))?;
        Ok(answer.is_none() || answer.is_truthy()?)
    })
}

/// Settles what the config leaves open about attention, from what was measured on this machine.
fn tuned(py: Python<'_>, model: &Arc<Model>, config: ContextConfig) -> PyResult<ContextConfig> {
    config.validate().map_err(|error| exception(&error))?;
    let Some(options) = guarded(py, || Ok(options(model, &config)))? else {
        return Ok(config);
    };
    let names = |choice: Attention| (choice.flash_attn.name(), choice.kv_type.name());
    let choices: Vec<_> = options.choices.iter().copied().map(names).collect();
    let Heads { dim, count, count_kv } = options.heads;
    let work = (dim, count, count_kv, options.n_ctx, options.n_threads);
    let chosen = py
        .import("tabagent_model._attention")?
        .call_method1("choose", (work, choices, names(options.built_in())))?;
    let (flash_attn, kv_type): (String, String) = chosen.extract()?;
    Ok(ContextConfig {
        flash_attn: self::flash_attn(&flash_attn)?,
        kv_type: self::kv_type(&kv_type)?,
        ..config
    })
}

/// Settings of a context by the names of `create_context`.
pub(super) fn context_config(settings: &Bound<'_, PyDict>) -> PyResult<ContextConfig> {
    let mut config = ContextConfig::default();
    for (name, value) in settings.iter() {
        let name: String = name.extract()?;
        match name.as_str() {
            "n_ctx" => config.n_ctx = convert::fitted(&name, value.extract()?)?,
            "n_batch" => config.n_batch = convert::fitted(&name, value.extract()?)?,
            "n_threads" => config.n_threads = convert::fitted(&name, value.extract()?)?,
            "n_seq_max" => config.n_seq_max = convert::fitted(&name, value.extract()?)?,
            "prompt_cache_mb" => config.prompt_cache_mb = value.extract()?,
            "flash_attn" => config.flash_attn = flash_attn(&value.extract::<String>()?)?,
            "kv_type" => config.kv_type = kv_type(&value.extract::<String>()?)?,
            _ => {
                let known = "a setting of `create_context`";
                return Err(exception(&Error::invalid("settings", name, known)));
            }
        }
    }
    config.validate().map_err(|error| exception(&error))?;
    Ok(config)
}

fn options(model: &Model, config: &ContextConfig) -> Option<Options> {
    let free = memory::available_bytes();
    Options::of(model.description(), config, model.gpu_layers(), free)
}

fn model_path_of(path: Option<PathBuf>) -> Result<PathBuf> {
    path.ok_or_else(|| Error::invalid("model_path", "nothing", "the path of a GGUF file"))
}

fn split_mode(name: &str) -> PyResult<SplitMode> {
    match name {
        "none" => Ok(SplitMode::None),
        "layer" => Ok(SplitMode::Layer),
        "row" => Ok(SplitMode::Row),
        _ => Err(exception(&Error::invalid("split_mode", name, "`none`, `layer` or `row`"))),
    }
}

fn flash_attn(name: &str) -> PyResult<FlashAttention> {
    FlashAttention::ALL
        .into_iter()
        .find(|known| known.name() == name)
        .ok_or_else(|| exception(&Error::invalid("flash_attn", name, "`auto`, `on` or `off`")))
}

fn kv_type(name: &str) -> PyResult<KvType> {
    KvType::ALL.into_iter().find(|known| known.name() == name).ok_or_else(|| {
        let allowed = "`auto`, `f16`, `bf16`, `f32` or `q8_0`";
        exception(&Error::invalid("kv_type", name, allowed))
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
