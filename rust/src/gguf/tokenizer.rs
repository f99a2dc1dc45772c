//! The vocabulary: what src/llama-vocab.cpp asserts when it loads one, or while it tokenizes.

use std::borrow::Cow;
use std::collections::HashMap;

use super::arch::Architecture;
use super::fault::{Check, Fault};
use super::keys::{self, Keys, Kind, Strings, Value};

const MAX_TOKENS: u32 = 1 << 22;

#[derive(Debug)]
pub(super) struct Tokenizer {
    pub model: String,
    pub pre: Option<String>,
    /// For the model `none`: what the file says, or 0.
    pub n_tokens: u32,
}

impl Tokenizer {
    pub fn is_none(&self) -> bool {
        matches!(self.model.as_str(), "none" | "no_vocab")
    }

    pub fn is_stack_safe(&self) -> bool {
        is_stack_safe(&self.model, self.pre.as_deref())
    }
}

/// Whether a long word without spaces is tokenized on a small stack.
///
/// Byte-pair tokenizers cut text with a regular expression first, and `std::regex` recurses once per
/// character. The safe ones have a splitter written by hand, or a bounded expression (engine.md, 4.2).
pub fn is_stack_safe(model: &str, pre: Option<&str>) -> bool {
    match model {
        "gpt2" => pre.is_some_and(|pre| STACK_SAFE.contains(&pre)),
        "whitespace" | "hybriddna" => false,
        _ => true, // the others do without
    }
}

pub(super) fn check(architecture: &Architecture, keys: &Keys) -> Check<Tokenizer> {
    let model =
        keys.text("tokenizer.ggml.model")?.ok_or_else(|| keys::missing("tokenizer.ggml.model"))?;
    let pre = keys.text("tokenizer.ggml.pre")?.filter(|pre| !pre.is_empty());
    let mut tokenizer = Tokenizer { model: model.into(), pre: pre.map(str::to_owned), n_tokens: 0 };
    if tokenizer.is_none() {
        let key = architecture.key("vocab_size");
        tokenizer.n_tokens = keys.u32_in(&key, 0..=MAX_TOKENS)?.unwrap_or(0);
        return Ok(tokenizer);
    }
    let style = Style::of(model, pre)?;
    let tokens = keys.strings(TOKENS)?.ok_or_else(|| keys::missing(TOKENS))?;
    if tokens.len() == 0 || tokens.len() > MAX_TOKENS as usize {
        return Err(Fault::damaged(format!(
            "`{TOKENS}` has {} tokens, and must have 1 to {MAX_TOKENS}",
            tokens.len()
        )));
    }
    tokenizer.n_tokens = tokens.len() as u32;
    check_lengths(keys, tokens.len() as u64)?;
    let ids = index(tokens)?;
    match style {
        Style::Sentences | Style::Plamo2 => check_bytes(&ids, &style)?,
        Style::Pairs { .. } => check_merges(keys, pre)?,
        Style::Unigrams => check_charsmap(keys)?,
        Style::World => check_world_bytes(tokens)?,
        Style::Words => check_no_byte_type(keys)?,
    }
    check_special_tokens(keys, &style, pre, tokenizer.n_tokens)?;
    Ok(tokenizer)
}

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";

#[derive(Debug, Clone, Copy, PartialEq)]
enum Style {
    /// SPM
    Sentences,
    /// BPE
    Pairs {
        is_gemma4: bool,
    },
    /// WPM
    Words,
    /// UGM
    Unigrams,
    /// RWKV
    World,
    Plamo2,
}

impl Style {
    fn of(model: &str, pre: Option<&str>) -> Check<Style> {
        let style = match model {
            "llama" => Style::Sentences,
            "gpt2" | "hybriddna" | "whitespace" => Style::Pairs { is_gemma4: false },
            "gemma4" => return Ok(Style::Pairs { is_gemma4: true }),
            "bert" => Style::Words,
            "t5" => Style::Unigrams,
            "rwkv" => Style::World,
            "plamo2" => Style::Plamo2,
            _ => {
                return Err(Fault::unsupported(format!(
                    "its tokenizer `{model}` (`tokenizer.ggml.model`) is unknown to this version of llama.cpp"
                )));
            }
        };
        match pre {
            Some(pre) if matches!(style, Style::Pairs { .. }) && !is_known_pre(pre) => {
                Err(Fault::unsupported(format!(
                    "its pre-tokenizer `{pre}` (`tokenizer.ggml.pre`) is unknown to this version of llama.cpp"
                )))
            }
            _ => Ok(style),
        }
    }
}

fn is_known_pre(pre: &str) -> bool {
    STACK_SAFE.contains(&pre) || OTHER_PRE.contains(&pre)
}

fn check_lengths(keys: &Keys, n_tokens: u64) -> Check<()> {
    for (key, kinds) in
        [("tokenizer.ggml.scores", &[Kind::F32, Kind::I32][..]), (TYPES, &[Kind::I32])]
    {
        match keys.value(key) {
            None => {}
            Some(Value::Numbers { kind, length, .. })
                if kinds.contains(kind) && *length >= n_tokens => {}
            Some(Value::Numbers { kind, length, .. }) if kinds.contains(kind) => {
                return Err(Fault::damaged(format!(
                    "`{key}` has {length} elements, and there are {n_tokens} tokens"
                )));
            }
            Some(_) => {
                return Err(Fault::damaged(format!(
                    "`{key}` must be an array of {}",
                    kinds[0].name()
                )));
            }
        }
    }
    Ok(())
}

/// llama.cpp calls empty tokens so too; everything else must differ.
fn index(tokens: &Strings) -> Check<HashMap<Cow<'_, [u8]>, usize>> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        let token = match token {
            [] => Cow::Owned(format!("[EMPTY_{id}]").into_bytes()),
            token => Cow::Borrowed(token),
        };
        if let Some(first) = ids.insert(token, id) {
            let token = tokens.iter().nth(id).expect("we are at it");
            return Err(Fault::damaged(format!(
                "its vocabulary has the token `{}` twice, as {first} and {id}",
                token.escape_ascii()
            )));
        }
    }
    Ok(ids)
}

/// Text that no token covers is spelled in bytes; llama.cpp throws where it cannot.
fn check_bytes(ids: &HashMap<Cow<'_, [u8]>, usize>, style: &Style) -> Check<()> {
    let is_there = |byte: u8| {
        ids.contains_key(format!("<0x{byte:02X}>").as_bytes())
            || (*style == Style::Sentences && ids.contains_key(&[byte][..]))
    };
    spelled((0..=255).filter(|&byte| !is_there(byte)).collect())
}

fn check_merges(keys: &Keys, pre: Option<&str>) -> Check<()> {
    let Some(merges) = keys.strings(MERGES)? else {
        return match pre {
            Some("kimi-k2") => Ok(()),
            _ => Err(keys::missing(MERGES)),
        };
    };
    let is_pair = |merge: &[u8]| {
        let space = merge.iter().skip(1).position(|&byte| byte == b' ');
        space.is_some_and(|position| position + 2 < merge.len())
    };
    match merges.iter().position(|merge| !is_pair(merge)) {
        None => Ok(()),
        Some(index) => Err(Fault::damaged(format!(
            "merge {index} of `{MERGES}` is `{}`, and must be two texts with a space between",
            merges.iter().nth(index).expect("it was just found").escape_ascii()
        ))),
    }
}

/// A blob that begins with the length of its first part, a table of u32.
fn check_charsmap(keys: &Keys) -> Check<()> {
    let Some(value) = keys.value(CHARSMAP) else { return Ok(()) };
    let Value::Numbers { kind: Kind::U8 | Kind::I8, length, first } = value else {
        return Err(Fault::damaged(format!("`{CHARSMAP}` must be an array of u8")));
    };
    let byte = |index: usize| first.get(index).map_or(0, |&number| number as i64 as u8);
    let table = u64::from(u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]));
    match table + 4 < *length && table % 4 == 0 {
        true => Ok(()),
        false => Err(Fault::damaged(format!(
            "`{CHARSMAP}` has {length} bytes, and says that its table has {table}"
        ))),
    }
}

/// A WordPiece vocabulary has whole characters, and llama.cpp aborts when it is to show a byte.
fn check_no_byte_type(keys: &Keys) -> Check<()> {
    const BYTE: f64 = 6.0;
    let Some(Value::Numbers { first, .. }) = keys.value(TYPES) else { return Ok(()) };
    match first.iter().position(|&kind| kind == BYTE) {
        None => Ok(()),
        Some(id) => Err(Fault::damaged(format!(
            "token {id} has the type 6 (a byte), which a `bert` tokenizer cannot have"
        ))),
    }
}

/// RWKV's tokenizer never ends where a byte begins a token and is none.
fn check_world_bytes(tokens: &Strings) -> Check<()> {
    let mut is_there = [false; 256];
    for token in tokens.iter() {
        if let Some(byte) = single_byte(token) {
            is_there[usize::from(byte)] = true;
        }
    }
    spelled((0..=255).filter(|&byte| !is_there[usize::from(byte)]).collect())
}

/// RWKV tokens are written with Python's escapes.
fn single_byte(token: &[u8]) -> Option<u8> {
    match token {
        [byte] => Some(*byte),
        b"\\t" => Some(b'\t'),
        b"\\n" => Some(b'\n'),
        b"\\r" => Some(b'\r'),
        [b'\\', b'x', digits @ ..] if digits.len() == 2 => {
            u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        }
        [b'\\', byte] => Some(*byte),
        _ => None,
    }
}

/// `missing`: the bytes that no token spells.
fn spelled(missing: Vec<u8>) -> Check<()> {
    match missing.first() {
        None => Ok(()),
        Some(first) => Err(Fault::damaged(format!(
            "its vocabulary has no token for {} of the 256 bytes (the first is <0x{first:02X}>)",
            missing.len()
        ))),
    }
}

/// Which ids exist, and whether those that are always added do.
fn check_special_tokens(keys: &Keys, style: &Style, pre: Option<&str>, n_tokens: u32) -> Check<()> {
    // Others out of range are ignored, by llama.cpp and by us: public files have a padding id too many.
    for name in ["bos", "eos"] {
        keys.u32_in(&id_key(name), 0..=n_tokens - 1)?;
    }
    let defaults = Defaults::of(style, pre);
    let known = |name: &str, default: Option<u32>| -> Check<bool> {
        let given = keys.u32(&id_key(name))?;
        Ok(given.or(default).is_some_and(|id| id < n_tokens)
            || default.is_some_and(|id| id < n_tokens))
    };
    let adds = |name: &str, default: bool| -> Check<bool> {
        Ok(keys.flag(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(default))
    };
    let always = *style == Style::Words; // adds both, whatever the flags say
    adds("sep", false)?;
    if (adds("bos", defaults.adds_bos)? || always) && !known("bos", defaults.bos)? {
        return Err(never_there("begin-of-text", "bos"));
    }
    if adds("eos", defaults.adds_eos)?
        && !known("eos", defaults.eos)?
        && *style != Style::World
        && !always
    {
        return Err(never_there("end-of-text", "eos"));
    }
    if always && !known("seperator", Some(102))? {
        return Err(never_there("separator", "seperator"));
    }
    if matches!(style, Style::Words | Style::Unigrams) && !known("unknown", defaults.unknown)? {
        return Err(never_there("unknown", "unknown"));
    }
    Ok(())
}

fn id_key(name: &str) -> String {
    format!("tokenizer.ggml.{name}_token_id")
}

fn never_there(what: &str, name: &str) -> Fault {
    Fault::damaged(format!(
        "its tokenizer needs the {what} token, but `{}` names none of the vocabulary",
        id_key(name)
    ))
}

/// What llama.cpp assumes where the file says nothing.
struct Defaults {
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    adds_bos: bool,
    adds_eos: bool,
}

impl Defaults {
    fn of(style: &Style, pre: Option<&str>) -> Defaults {
        let (bos, eos, unknown) = match style {
            Style::Sentences | Style::Plamo2 => (Some(1), Some(2), Some(0)),
            Style::Pairs { is_gemma4: false } => (Some(11), Some(11), None),
            Style::Pairs { is_gemma4: true } | Style::World => (None, None, None),
            Style::Words => (Some(101), None, Some(100)),
            Style::Unigrams => (None, Some(1), Some(2)),
        };
        let has_no_bos = *style == (Style::Pairs { is_gemma4: false })
            && pre.is_some_and(|pre| ["chatglm-bpe", "glm4", "glm5"].contains(&pre));
        let adds_bos = match style {
            Style::Sentences | Style::Words => true,
            Style::Pairs { is_gemma4 } => {
                *is_gemma4 || pre.is_some_and(|pre| ADDS_BOS.contains(&pre))
            }
            Style::Unigrams | Style::World | Style::Plamo2 => false,
        };
        Defaults {
            bos: bos.filter(|_| !has_no_bos),
            eos,
            unknown,
            adds_bos,
            adds_eos: *style == Style::Unigrams,
        }
    }
}

#[rustfmt::skip]
const ADDS_BOS: &[&str] = &[
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    "tekken", "chameleon", "gemma4", "granite-embed-multi-311m",
];

/// Pre-tokenizers that do not recurse over a long word (names: src/llama-vocab.cpp, load).
#[rustfmt::skip]
const STACK_SAFE: &[&str] = &[
    "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
    "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "exaone4", "mpt", "olmo", "jais", "trillion",
    "granite-docling", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
    "lfm2", "jina-v5-nano", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5", "stablelm2", "qwen2",
    "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "solar-open", "grok-2", "qwen35", "kimi-k2",
    "laguna", "gemma4", "granite-embed-multi-311m", "sarvam-moe", "mmbert", "starcoder", "refact", "command-r",
    "smollm", "codeshell", "exaone", "minerva-7b", "mellum2",
];

/// All the others that the pinned llama.cpp knows.
#[rustfmt::skip]
const OTHER_PRE: &[&str] = &[
    "default", "minicpm5", "deepseek-llm", "deepseek-coder", "deepseek-v3", "spark2_5", "youtu", "falcon",
    "jais-2", "whitespace", "poro-chat", "viking", "tekken", "bloom", "gpt3-finnish", "exaone-moe",
    "chameleon", "gpt-4o", "llama4", "kanana2", "talkie", "granite-embed-multi-97m", "tiny_aya", "cohere2moe",
    "superbpe", "bailingmoe", "bailingmoe2", "llada-moe", "seed-coder", "hunyuan-dense", "hy_v4", "joyai-llm",
    "ufakzeka", "afmoe", "minimax-m2",
];
