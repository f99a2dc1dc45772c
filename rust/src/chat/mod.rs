//! Messages → prompt, and answer → content, reasoning and tool calls, through the shim.
//!
//! A prompt remembers what of it came from messages, so that the template's own control text becomes
//! control tokens and the same text written by a user does not.

pub mod answer;
mod marks;
pub mod prompt;
mod template;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{Error, Result};
use crate::log;
use crate::model::Model;
use marks::{Marks, segments};
use prompt::Prompt;
use template::{Options, Template};

/// What llama.cpp takes for models without a template of their own.
const CHATML: &str = "{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

const MOST_BYTES: usize = 16 << 20;
const MOST_OPTION_BYTES: usize = 1 << 20;
/// Of lists and objects in JSON: llama.cpp walks through them by recursion.
const DEEPEST: usize = 128;
/// Templates that were given instead of the model's own, and are kept for the next time.
const MOST_KEPT: usize = 4;

/// The chat side of a model: its templates, and those that took their place lately.
pub struct Chat {
    model: Arc<Model>,
    own: OnceLock<Result<Arc<Template>>>,
    /// Some models have another template for conversations with tools.
    with_tools: OnceLock<Option<Result<Arc<Template>>>>,
    given: Mutex<Vec<Arc<Template>>>,
    marks: OnceLock<Marks>,
}

impl Chat {
    pub fn new(model: Arc<Model>) -> Chat {
        Chat {
            model,
            own: OnceLock::new(),
            with_tools: OnceLock::new(),
            given: Mutex::default(),
            marks: OnceLock::new(),
        }
    }

    /// `messages` is the JSON text of a list of messages as OpenAI has them, `options` that of an
    /// object as `ta_chat_options_new` has it; `template` is the text of one, or the name of another
    /// one of the model's.
    pub fn render(
        &self,
        messages: &str,
        add_generation_prompt: bool,
        template: Option<&str>,
        options: Option<&str>,
    ) -> Result<Prompt> {
        self.model.check_process()?;
        check_json("messages", messages, MOST_BYTES)?;
        let options = options.unwrap_or("{}");
        check_json("options", options, MOST_OPTION_BYTES)?;
        let options = Options::read(options)?;
        let template = match template {
            Some(given) => match self.model.named_chat_template(given) {
                Some(source) => self.given(&source)?,
                None => self.given(given)?,
            },
            None => self.own(options.has_tools())?,
        };
        template.apply(self.model.vocabulary(), messages, &options, add_generation_prompt)
    }

    /// The ids of a prompt from a byte on; the beginning of text comes before the first one only.
    /// What cannot have fewer than `limit` of them is refused before it takes time.
    pub fn tokens(&self, prompt: &Prompt, from: usize, limit: Option<u32>) -> Result<Vec<i32>> {
        self.model.check_process()?;
        let vocabulary = self.model.vocabulary();
        let marks = self.marks.get_or_init(|| Marks::of(vocabulary));
        let (text, add_bos) = (&prompt.text[from..], from == 0);
        let required = vocabulary.fewest_tokens(text.len()) as u64 + 1;
        if let Some(max) = limit.filter(|&max| required > u64::from(max)) {
            return Err(Error::ContextLimitExceeded { max, required });
        }
        let (written, own): (Vec<_>, Vec<_>) = marks
            .find(text, &prompt.template.added)
            .into_iter()
            .partition(|mark| prompt.has_input_in(mark.place.start + from..mark.place.end + from));
        if written.is_empty() {
            return vocabulary.tokenize(text, add_bos, true); // as everybody else does
        }
        let mut tokens = Vec::new();
        for (index, (range, special)) in segments(text, &written, own).into_iter().enumerate() {
            let add_bos = add_bos && index == 0;
            tokens.extend(vocabulary.tokenize(&text[range], add_bos, special)?);
        }
        Ok(tokens)
    }

    fn own(&self, for_tools: bool) -> Result<Arc<Template>> {
        if for_tools {
            let load = || self.model.named_chat_template("tool_use").map(|text| self.load(&text));
            if let Some(template) = self.with_tools.get_or_init(load) {
                return template.clone();
            }
        }
        self.own.get_or_init(|| self.load_own()).clone()
    }

    fn load_own(&self) -> Result<Arc<Template>> {
        if let Some(source) = self.model.chat_template() {
            return self.load(source);
        }
        if let Some(source) = self.model.named_chat_template("tool_use") {
            return self.load(&source);
        }
        log::note(log::Level::Warning, "the model has no chat template; ChatML is used");
        self.load(CHATML)
    }

    fn given(&self, source: &str) -> Result<Arc<Template>> {
        let known = |kept: &[Arc<Template>]| kept.iter().find(|t| t.source == source).cloned();
        if let Some(template) = known(&lock(&self.given)) {
            return Ok(template);
        }
        let template = self.load(source)?;
        let mut kept = lock(&self.given);
        kept.insert(0, template.clone());
        kept.truncate(MOST_KEPT);
        Ok(template)
    }

    fn load(&self, source: &str) -> Result<Arc<Template>> {
        if !self.model.vocabulary().has_text() {
            let what = "the model has no tokenizer; it takes token ids only".into();
            return Err(Error::Template { what });
        }
        let marks = self.marks.get_or_init(|| Marks::of(self.model.vocabulary()));
        let is_used = |text: &&Vec<u8>| {
            std::str::from_utf8(text).is_ok_and(|text| text.len() > 2 && source.contains(text))
        };
        let added = marks.added.iter().filter(is_used).cloned().collect();
        Ok(Arc::new(Template::new(&self.model, source, added)?))
    }
}

fn check_json(name: &str, text: &str, most: usize) -> Result<()> {
    if text.len() > most {
        return Err(Error::invalid(name, text.len(), &format!("at most {most} bytes of JSON")));
    }
    let depth = depth_of(text);
    if depth > DEEPEST {
        return Err(Error::invalid(name, depth, &format!("nested at most {DEEPEST} deep")));
    }
    Ok(())
}

/// How deep lists and objects of a JSON text are nested.
fn depth_of(json: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut is_escaped) = (0usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = in_string,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
