//! Python values → what the core takes; what the core gives → Python values. And the guard that
//! every call goes through.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyMapping, PyString};

use super::error::exception;
use super::hook;
use crate::config::{Constraint, GenerationConfig, Overflow, Priority, Syntax, Trigger};
use crate::context::message::Stats;
use crate::context::{Attention, Distribution, MemoryUse, Metrics, Prompt, SlotView};
use crate::error::{Error, Result};
use crate::gguf::Description;
use crate::log::Level;

/// Lets go of Python, does the work, and turns errors and panics into exceptions of ours.
pub(super) fn guarded<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    let done = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    done.unwrap_or_else(|panic| Err(Error::internal(said(&*panic)))).map_err(|e| exception(&e))
}

/// What a panic said; also used where no Python is at hand.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("a panic: {}", text.unwrap_or_else(|| "without a message".into()))
}

/// Text, or a sequence of token ids.
pub(super) fn prompt(value: &Bound<'_, PyAny>) -> PyResult<Prompt> {
    if let Ok(text) = value.cast::<PyString>() {
        return Ok(Prompt::Text(self::text(text)?.to_owned()));
    }
    let not_a_prompt = |_| {
        let kind = value.get_type().to_string();
        exception(&Error::invalid("prompt", kind, "text or a list of token ids"))
    };
    let ids = value.try_iter().map_err(not_a_prompt)?;
    let ids = ids.enumerate().map(|(index, id)| token(&id?, &format!("prompt[{index}]")));
    Ok(Prompt::Tokens(ids.collect::<PyResult<_>>()?))
}

pub(super) fn tokens(values: &Bound<'_, PyAny>) -> PyResult<Vec<i32>> {
    let ids = values.try_iter()?.enumerate();
    ids.map(|(index, id)| token(&id?, &format!("tokens[{index}]"))).collect()
}

fn token(value: &Bound<'_, PyAny>, name: &str) -> PyResult<i32> {
    let refused = || exception(&Error::invalid(name, shown(value), "a token id"));
    if value.is_instance_of::<PyBool>() {
        return Err(refused());
    }
    value.extract::<i32>().map_err(|_| refused())
}

/// Python text that is not Unicode (a lone surrogate) is refused by name.
pub(super) fn text<'a>(value: &'a Bound<'_, PyString>) -> PyResult<&'a str> {
    value.to_str().map_err(|error| {
        exception(&Error::Tokenization { what: error.value(value.py()).to_string() })
    })
}

/// Any mapping with fields of GenerationConfig.
pub(super) fn generation_config(params: &Bound<'_, PyMapping>) -> PyResult<GenerationConfig> {
    let mut config = GenerationConfig::default();
    for pair in params.items()?.iter() {
        let (name, value): (String, Bound<'_, PyAny>) = pair.extract()?;
        set(&mut config, &name, &value)?;
    }
    Ok(config)
}

pub(super) fn set(
    config: &mut GenerationConfig,
    name: &str,
    value: &Bound<'_, PyAny>,
) -> PyResult<()> {
    match name {
        "max_tokens" => config.max_tokens = whole(name, value)?,
        "temperature" => config.temperature = number(name, value)? as f32,
        "dynatemp_range" => config.dynatemp_range = number(name, value)? as f32,
        "dynatemp_exponent" => config.dynatemp_exponent = number(name, value)? as f32,
        "top_p" => config.top_p = number(name, value)? as f32,
        "top_k" => config.top_k = whole(name, value)?,
        "min_p" => config.min_p = number(name, value)? as f32,
        "typical_p" => config.typical_p = number(name, value)? as f32,
        "top_n_sigma" => config.top_n_sigma = number(name, value)? as f32,
        "xtc_probability" => config.xtc_probability = number(name, value)? as f32,
        "xtc_threshold" => config.xtc_threshold = number(name, value)? as f32,
        "repeat_penalty" => config.repeat_penalty = number(name, value)? as f32,
        "presence_penalty" => config.presence_penalty = number(name, value)? as f32,
        "frequency_penalty" => config.frequency_penalty = number(name, value)? as f32,
        "penalty_last_n" => config.penalty_last_n = whole(name, value)?,
        "dry_multiplier" => config.dry_multiplier = number(name, value)? as f32,
        "dry_base" => config.dry_base = number(name, value)? as f32,
        "dry_allowed_length" => config.dry_allowed_length = whole(name, value)?,
        "dry_penalty_last_n" => config.dry_penalty_last_n = whole(name, value)?,
        "dry_sequence_breakers" => config.dry_sequence_breakers = strings(name, value)?,
        "mirostat" => config.mirostat = whole(name, value)?,
        "mirostat_tau" => config.mirostat_tau = number(name, value)? as f32,
        "mirostat_eta" => config.mirostat_eta = number(name, value)? as f32,
        "logit_bias" => config.logit_bias = biases(value)?,
        "banned_tokens" => config.banned_tokens = ids(name, value)?,
        "logits_hook" => config.logits_hook = Some(hook::of(value)?),
        "logprobs" => config.logprobs = Some(whole(name, value)?),
        "stop" => config.stop = strings(name, value)?,
        "stop_tokens" => config.stop_tokens = ids(name, value)?,
        "grammar" | "regex" | "lark" | "json_schema" if value.is_none() => {}
        "constraint" if value.is_none() => {}
        "grammar" | "regex" | "lark" | "json_schema" | "constraint"
            if config.constraint.is_some() =>
        {
            let allowed = "the only one of `grammar`, `regex`, `lark` and `json_schema`";
            return Err(exception(&Error::invalid(name, "another one", allowed)));
        }
        "grammar" => config.constraint = Some(Constraint::new(Syntax::Gbnf, string(name, value)?)),
        "regex" => config.constraint = Some(Constraint::new(Syntax::Regex, string(name, value)?)),
        "lark" => config.constraint = Some(Constraint::new(Syntax::Lark, string(name, value)?)),
        "json_schema" => {
            config.constraint = Some(Constraint::new(Syntax::JsonSchema, string(name, value)?));
        }
        "constraint" => config.constraint = Some(constraint(value)?),
        "preserved_tokens" => config.preserved_tokens = ids(name, value)?,
        "seed" => config.seed = whole(name, value)?,
        "ignore_eos" => config.ignore_eos = value.is_truthy()?,
        "min_tokens" => config.min_tokens = whole(name, value)?,
        "timeout_s" => config.timeout = sooner(config.timeout, seconds(name, value)?),
        "deadline" => config.timeout = sooner(config.timeout, time_until(value)?),
        "max_queue_wait_s" => config.max_queue_wait = seconds(name, value)?,
        "overflow" => config.overflow = overflow(value)?,
        "n_keep" => config.n_keep = whole(name, value)?,
        "pin" => config.pin = value.is_truthy()?,
        "priority" => config.priority = priority(value)?,
        "add_bos" => config.add_bos = value.is_truthy()?,
        "special" => config.special = value.is_truthy()?,
        _ => {
            let known = "a field of GenerationConfig";
            return Err(exception(&Error::invalid("params", format!("`{name}`"), known)));
        }
    }
    Ok(())
}

fn whole<'py, T: for<'a> FromPyObject<'a, 'py>>(
    name: &str,
    value: &Bound<'py, PyAny>,
) -> PyResult<T> {
    let number = if value.is_instance_of::<PyBool>() { None } else { value.extract().ok() };
    number.ok_or_else(|| exception(&Error::invalid(name, shown(value), "a whole number in range")))
}

/// A number of Python's as one of ours; whether it makes sense is checked with the rest.
pub(super) fn fitted<T: TryFrom<i64>>(name: &str, value: i64) -> PyResult<T> {
    T::try_from(value).map_err(|_| {
        exception(&Error::invalid(name, value, "a whole number of 32 bits, not negative"))
    })
}

fn number(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    let refused = || exception(&Error::invalid(name, shown(value), "a number"));
    if value.is_instance_of::<PyBool>() {
        return Err(refused());
    }
    value.extract().map_err(|_| refused())
}

fn strings(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
    if let Ok(one) = value.cast::<PyString>() {
        return Ok(vec![text(one)?.to_owned()]);
    }
    value
        .extract()
        .map_err(|_| exception(&Error::invalid(name, shown(value), "a string or several strings")))
}

fn ids(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<i32>> {
    let refused = |_| exception(&Error::invalid(name, shown(value), "a list of token ids"));
    let ids = value.try_iter().map_err(refused)?.enumerate();
    ids.map(|(index, id)| token(&id?, &format!("{name}[{index}]"))).collect()
}

/// JSON has only strings as keys, so a number written in one is an id, too.
fn biases(value: &Bound<'_, PyAny>) -> PyResult<Vec<(i32, f32)>> {
    let refused = || {
        exception(&Error::invalid("logit_bias", shown(value), "a mapping of token ids to numbers"))
    };
    let pairs = value.cast::<PyMapping>().map_err(|_| refused())?.items()?;
    let bias = |pair: Bound<'_, PyAny>| {
        let (key, bias): (Bound<'_, PyAny>, Bound<'_, PyAny>) = pair.extract()?;
        let written = key.cast::<PyString>().ok().and_then(|key| key.to_str().ok()?.parse().ok());
        let id = written.map_or_else(|| token(&key, "logit_bias"), Ok)?;
        Ok((id, number(&format!("logit_bias[{id}]"), &bias)? as f32))
    };
    pairs.iter().map(bias).collect()
}

/// A mapping of `syntax`, `text`, and maybe `lazy`, `triggers`, `after` and `prefix`.
fn constraint(value: &Bound<'_, PyAny>) -> PyResult<Constraint> {
    let refused = |value: &Bound<'_, PyAny>, allowed| {
        exception(&Error::invalid("constraint", shown(value), allowed))
    };
    let fields = value.cast::<PyMapping>().map_err(|_| refused(value, "a mapping"))?;
    let mut asked = Constraint::new(Syntax::JsonSchema, "");
    let mut syntax = None;
    for pair in fields.items()?.iter() {
        let (name, value): (String, Bound<'_, PyAny>) = pair.extract()?;
        match name.as_str() {
            "syntax" => {
                syntax = match string("syntax", &value)?.as_str() {
                    "json_schema" => Some(Syntax::JsonSchema),
                    "regex" => Some(Syntax::Regex),
                    "lark" => Some(Syntax::Lark),
                    "gbnf" => Some(Syntax::Gbnf),
                    _ => None,
                };
            }
            "text" => asked.text = string("text", &value)?,
            "lazy" => asked.lazy = value.is_truthy()?,
            "triggers" => {
                let triggers =
                    value.try_iter().map_err(|_| refused(&value, "with a list of triggers"))?;
                let triggers = triggers.map(|each| trigger(&each?));
                asked.triggers = triggers.collect::<PyResult<_>>()?;
            }
            "after" if value.is_none() => {}
            "after" => asked.after = Some(string("after", &value)?),
            "prefix" => asked.prefix = string("prefix", &value)?,
            _ => {
                return Err(refused(
                    pair.as_any(),
                    "one of `syntax`, `text`, `lazy`, `triggers`, `after`, `prefix`",
                ));
            }
        }
    }
    let allowed = "of the `syntax` `json_schema`, `regex`, `lark` or `gbnf`";
    asked.syntax = syntax.ok_or_else(|| refused(value, allowed))?;
    Ok(asked)
}

fn trigger(value: &Bound<'_, PyAny>) -> PyResult<Trigger> {
    let part = |name: &str| {
        let allowed = "mappings of `type`, and `value` or `token`";
        value
            .get_item(name)
            .map_err(|_| exception(&Error::invalid("triggers", shown(value), allowed)))
    };
    match string("type", &part("type")?)?.as_str() {
        "token" => Ok(Trigger::Token(token(&part("token")?, "token")?)),
        "word" => Ok(Trigger::Word(string("value", &part("value")?)?)),
        "pattern" => Ok(Trigger::Pattern(string("value", &part("value")?)?)),
        "pattern_full" => Ok(Trigger::PatternFull(string("value", &part("value")?)?)),
        other => {
            let allowed = "`word`, `token`, `pattern` or `pattern_full`";
            Err(exception(&Error::invalid("the type of a trigger", other, allowed)))
        }
    }
}

fn string(name: &str, value: &Bound<'_, PyAny>) -> PyResult<String> {
    match value.cast::<PyString>() {
        Ok(string) => Ok(text(string)?.to_owned()),
        Err(_) => Err(exception(&Error::invalid(name, shown(value), "a string"))),
    }
}

fn seconds(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<Duration>> {
    if value.is_none() {
        return Ok(None);
    }
    let seconds = number(name, value)?;
    if seconds.is_nan() || seconds <= 0.0 {
        return Err(exception(&Error::invalid(name, seconds, "more than 0")));
    }
    Ok(Duration::try_from_secs_f64(seconds).ok()) // longer than a Duration is no limit at all
}

/// A moment in seconds since 1970, as how long it is from now; not at all when it is over.
fn time_until(value: &Bound<'_, PyAny>) -> PyResult<Option<Duration>> {
    if value.is_none() {
        return Ok(None);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let left = (number("deadline", value)? - now.as_secs_f64()).max(0.0);
    Ok(Duration::try_from_secs_f64(left).ok())
}

fn sooner(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    [one, other].into_iter().flatten().min()
}

fn priority(value: &Bound<'_, PyAny>) -> PyResult<Priority> {
    match value.extract::<String>().as_deref() {
        Ok("high") => Ok(Priority::High),
        Ok("normal") => Ok(Priority::Normal),
        Ok("low") => Ok(Priority::Low),
        _ => {
            let allowed = "`high`, `normal` or `low`";
            Err(exception(&Error::invalid("priority", shown(value), allowed)))
        }
    }
}

fn overflow(value: &Bound<'_, PyAny>) -> PyResult<Overflow> {
    match value.extract::<String>().as_deref() {
        Ok("error") => Ok(Overflow::Error),
        Ok("shift") => Ok(Overflow::Shift),
        _ => Err(exception(&Error::invalid("overflow", shown(value), "`error` or `shift`"))),
    }
}

/// A value as an error message quotes it: short.
pub(super) fn shown(value: &Bound<'_, PyAny>) -> String {
    let text = value.repr().map_or_else(|_| "something".into(), |repr| repr.to_string());
    text.chars().take(60).collect()
}

pub(super) fn stats<'py>(py: Python<'py>, stats: &Stats) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("prompt_tokens", stats.prompt_tokens)?;
    values.set_item("cached_tokens", stats.cached_tokens)?;
    values.set_item("dropped_tokens", stats.dropped_tokens)?;
    values.set_item("generated_tokens", stats.generated_tokens)?;
    values.set_item("n_ctx", stats.n_ctx)?;
    values.set_item("seed", stats.seed)?;
    values.set_item("queue_ms", stats.queue_ms)?;
    values.set_item("prompt_ms", stats.prompt_ms)?;
    values.set_item("first_token_ms", stats.first_token_ms)?;
    values.set_item("decode_ms", stats.decode_ms)?;
    values.set_item("total_ms", stats.total_ms)?;
    values.set_item("gap_p50_ms", stats.gap_p50_ms)?;
    values.set_item("gap_p99_ms", stats.gap_p99_ms)?;
    Ok(values)
}

pub(super) fn metrics<'py>(py: Python<'py>, metrics: &Metrics) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("running", metrics.running)?;
    values.set_item("waiting", metrics.waiting)?;
    values.set_item("requests", metrics.requests)?;
    values.set_item("ended_stop", metrics.ended_stop)?;
    values.set_item("ended_length", metrics.ended_length)?;
    values.set_item("ended_cancelled", metrics.ended_cancelled)?;
    values.set_item("ended_error", metrics.ended_error)?;
    values.set_item("prompt_tokens", metrics.prompt_tokens)?;
    values.set_item("cached_tokens", metrics.cached_tokens)?;
    values.set_item("dropped_tokens", metrics.dropped_tokens)?;
    values.set_item("generated_tokens", metrics.generated_tokens)?;
    values.set_item("steps", metrics.steps)?;
    values.set_item("shared_steps", metrics.shared_steps)?;
    values.set_item("busy_slots", metrics.busy_slots)?;
    values.set_item("preemptions", metrics.preemptions)?;
    values.set_item("held_tokens", metrics.held_tokens)?;
    values.set_item("prompt_cache_bytes", metrics.prompt_cache_bytes)?;
    values.set_item("prompt_seconds", metrics.prompt_seconds)?;
    values.set_item("decode_seconds", metrics.decode_seconds)?;
    values.set_item("queue_s", distribution(py, &metrics.queue)?)?;
    values.set_item("first_token_s", distribution(py, &metrics.first_token)?)?;
    values.set_item("gap_s", distribution(py, &metrics.gap)?)?;
    values.set_item("request_s", distribution(py, &metrics.whole)?)?;
    Ok(values)
}

fn distribution<'py>(py: Python<'py>, found: &Distribution) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    let buckets = PyDict::new(py);
    for (bound, count) in &found.buckets {
        buckets.set_item(bound, count)?;
    }
    values.set_item("count", found.buckets.last().map_or(0, |(_, count)| *count))?;
    values.set_item("sum", found.seconds)?;
    values.set_item("buckets", buckets)?;
    Ok(values)
}

pub(super) fn slot<'py>(py: Python<'py>, slot: &SlotView) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("request_id", slot.request)?;
    values.set_item("held_tokens", slot.held_tokens)?;
    values.set_item("prompt_tokens", slot.prompt_tokens)?;
    values.set_item("cached_tokens", slot.cached_tokens)?;
    values.set_item("generated_tokens", slot.generated_tokens)?;
    Ok(values)
}

pub(super) fn description<'py>(
    py: Python<'py>,
    found: &Description,
) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    let shards: Vec<String> =
        found.shards.iter().map(|p| p.to_string_lossy().into_owned()).collect();
    values.set_item("path", found.path.to_string_lossy())?;
    values.set_item("shards", shards)?;
    values.set_item("size_bytes", found.size_bytes)?;
    values.set_item("architecture", &found.architecture)?;
    values.set_item("name", &found.name)?;
    values.set_item("n_params", found.n_params)?;
    values.set_item("quantization", &found.quantization)?;
    values.set_item("n_ctx_train", found.n_ctx_train)?;
    values.set_item("n_layers", found.n_layers)?;
    values.set_item("n_embd", found.n_embd)?;
    values.set_item("n_head", found.n_head)?;
    values.set_item("n_head_kv", found.n_head_kv)?;
    values.set_item("n_vocab", found.n_vocab)?;
    values.set_item("tokenizer", &found.tokenizer)?;
    values.set_item("pre_tokenizer", &found.pre)?;
    values.set_item("has_chat_template", found.has_chat_template)?;
    values.set_item("is_embedding", found.is_embedding)?;
    values.set_item("kv_bytes_per_token", found.kv_bytes_per_token())?;
    Ok(values)
}

pub(super) fn attention(choice: Attention) -> (&'static str, &'static str) {
    (choice.flash_attn.name(), choice.kv_type.name())
}

pub(super) fn memory<'py>(py: Python<'py>, found: &MemoryUse) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("device", &found.device)?;
    values.set_item("in_ram", found.in_ram)?;
    values.set_item("is_mapped", found.is_mapped)?;
    values.set_item("weights", found.weights)?;
    values.set_item("context", found.context)?;
    values.set_item("compute", found.compute)?;
    Ok(values)
}

pub(super) fn level(level: Level) -> &'static str {
    match level {
        Level::Debug => "debug",
        Level::Info => "info",
        Level::Warning => "warning",
        Level::Error => "error",
    }
}

pub(super) fn level_named(name: &str) -> Level {
    let known = [Level::Debug, Level::Info, Level::Warning, Level::Error];
    known.into_iter().find(|each| level(*each) == name).unwrap_or(Level::Info)
}

pub(super) fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}
