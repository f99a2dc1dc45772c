//! The architectures of the pinned llama.cpp (src/llama-arch.cpp) and what sets them apart.
//!
//! The lists are taken from its sources by hand; renew them when the pin moves.

use super::fault::{Check, Fault};
use super::keys::{self, Keys, Value};

#[derive(Debug)]
pub(super) struct Architecture {
    pub name: String,
    /// No attention at all.
    pub is_recurrent: bool,
    /// Attention in some layers.
    pub is_hybrid: bool,
    /// Looks at a text as a whole and keeps nothing from it: generating would assert.
    pub is_encoder: bool,
}

impl Architecture {
    pub fn of(keys: &Keys) -> Check<Architecture> {
        let kind = keys.text("general.type").ok().flatten().unwrap_or("model");
        if let Some(what) = not_a_model(kind, keys) {
            return Err(Fault::unsupported(what));
        }
        let name = keys
            .text("general.architecture")?
            .ok_or_else(|| keys::missing("general.architecture"))?;
        match name {
            "clip" => Err(Fault::unsupported(PROJECTOR)),
            "eagle3" | "dflash" | "gemma4-assistant" => Err(Fault::unsupported(format!(
                "it is a draft head (`{name}`), which works only together with the model it was made for"
            ))),
            "dream" | "llada" | "llada-moe" | "rnd1" => Err(Fault::unsupported(format!(
                "it writes by diffusion (`{name}`), and here models write token after token"
            ))),
            "wavtokenizer-dec" | "qwen3tts" | "pockettts" => {
                Err(Fault::unsupported(format!("it makes speech (`{name}`), not text")))
            }
            _ if !KNOWN.contains(&name) => Err(Fault::unsupported(format!(
                "its architecture `{name}` is unknown to this version of llama.cpp"
            ))),
            _ => Ok(Architecture {
                name: name.into(),
                is_recurrent: RECURRENT.contains(&name),
                is_hybrid: HYBRID.contains(&name),
                is_encoder: ENCODERS.contains(&name),
            }),
        }
    }

    /// The full name of one of the architecture's own keys.
    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    pub fn is_one_of(&self, names: &[&str]) -> bool {
        names.contains(&self.name.as_str())
    }
}

const PROJECTOR: &str =
    "it is the image or audio part (mmproj) of another model; give the file of the model itself";

/// Other things are kept in GGUF files too.
fn not_a_model(kind: &str, keys: &Keys) -> Option<String> {
    let is = |what: &str| keys.iter().any(|(key, _)| key.starts_with(what));
    if kind == "adapter" || is("adapter.") {
        let kind = match keys.value("adapter.type") {
            Some(Value::Text(kind)) => kind.as_str(),
            _ => "lora",
        };
        return Some(format!("it is an adapter (`{kind}`), which needs the model it was made for"));
    }
    if kind == "mmproj" {
        return Some(PROJECTOR.into());
    }
    if kind == "imatrix" || is("imatrix.") {
        return Some("it is an importance matrix for quantizing, not a model".into());
    }
    None
}

/// `gptj` has a name in llama.cpp, but nothing that builds it.
#[rustfmt::skip]
const KNOWN: &[&str] = &[
    "llama", "llama4", "deci", "falcon", "grok", "gpt2", "gptneox", "mpt", "baichuan", "starcoder", "refact",
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3",
    "eurobert", "bloom", "stablelm", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3next",
    "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "clef", "qwen4exp", "phi2", "phi3", "phimoe", "plamo",
    "plamo2", "plamo3", "codeshell", "orion", "internlm2", "minicpm", "minicpm3", "gemma", "gemma2", "gemma3",
    "gemma3n", "gemma4", "gemma4-assistant", "gemma-embedding", "starcoder2", "mamba", "mamba2", "maple",
    "jamba", "falcon-h1", "xverse", "command-r", "cohere2", "cohere2moe", "dbrx", "olmo", "olmo2", "olmoe",
    "muse-glimmer", "openelm", "arctic", "deepseek", "deepseek2", "deepseek2-ocr", "deepseek32", "deepseek4",
    "chatglm", "glm4", "glm4moe", "glm-dsa", "bitnet", "t5", "t5encoder", "jais", "jais2", "nemotron",
    "nemotron_h", "nemotron_h_moe", "exaone", "exaone4", "exaone-moe", "rwkv6", "rwkv6qwen2", "rwkv7",
    "arwkv7", "granite", "granitemoe", "granitehybrid", "graniteswitch", "granite_swa", "chameleon",
    "wavtokenizer-dec", "plm", "bailingmoe", "bailingmoe2", "bailingmoe3", "dots1", "dots3note", "arcee",
    "afmoe", "laguna", "ernie4_5", "ernie4_5-moe", "hunyuan-moe", "hunyuan-dense", "hunyuan_vl", "hy_v3",
    "hy_v4", "smollm3", "gpt-oss", "lfm2", "lfm2moe", "dream", "smallthinker", "llada", "llada-moe",
    "seed_oss", "grovemoe", "apertus", "minimax-01", "hrm_text", "minimax-m2", "minimax-m3", "cogvlm", "rnd1",
    "pangu-embedded", "mistral3", "eagle3", "dflash", "mistral4", "paddleocr", "mimo2", "step35", "spark2_5",
    "llama-embed", "maincoder", "kimi-linear", "kimi-k3", "glm5-next", "talkie", "mellum", "nanbeige",
    "qwen3tts", "pockettts",
];

/// `llama_model::create_memory` makes none for them; a T5 encoder has nothing to make one for.
#[rustfmt::skip]
const ENCODERS: &[&str] = &[
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert",
    "gemma-embedding", "clef", "t5encoder",
];

/// `llm_arch_is_recurrent`
const RECURRENT: &[&str] = &["mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"];

/// `llm_arch_is_hybrid`
#[rustfmt::skip]
const HYBRID: &[&str] = &[
    "jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe",
    "qwen3next", "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next", "qwen35", "qwen35moe", "qwen4exp",
    "deepseek4", "minimax-01",
];

/// Their graphs assert that keys and values of a head have one length.
#[rustfmt::skip]
pub(super) const EVEN_HEADS: &[&str] = &[
    "llama", "llama4", "maincoder", "deci", "baichuan", "falcon", "grok", "starcoder", "refact", "bert",
    "modern-bert", "neo-bert", "eurobert", "bloom", "mpt", "stablelm", "mellum", "nanbeige", "qwen", "qwen2",
    "dream", "llada", "llada-moe", "rnd1", "qwen2vl", "qwen2moe", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe",
    "pockettts", "phi2", "phi3", "plamo", "gpt2", "codeshell", "orion", "internlm2", "starcoder2", "xverse",
    "command-r", "cohere2", "cohere2moe", "dbrx", "olmo", "olmo2", "olmoe", "muse-glimmer", "openelm",
    "gptneox", "arctic", "deepseek", "chatglm", "glm4", "glm4moe", "bitnet", "t5", "jais", "jais2", "nemotron",
    "nemotron_h", "nemotron_h_moe", "exaone", "granite", "graniteswitch", "granitehybrid", "granite_swa",
    "chameleon", "bailingmoe2", "seed_oss", "dots1", "arcee", "afmoe", "laguna", "ernie4_5", "ernie4_5-moe",
    "paddleocr", "hunyuan-moe", "hunyuan_vl", "hy_v3", "smollm3", "smallthinker", "grovemoe", "apertus",
    "minimax-01", "minimax-m2", "minimax-m3", "cogvlm", "pangu-embedded", "qwen3next", "qwen35", "qwen35moe",
    "clef", "qwen4exp", "mistral3", "spark2_5",
];

/// Their graphs assert that the whole head is rotated.
#[rustfmt::skip]
pub(super) const WHOLE_ROPE: &[&str] = &[
    "llama", "llama4", "maincoder", "talkie", "deci", "baichuan", "falcon", "grok", "mellum", "qwen2", "dream",
    "llada", "llada-moe", "rnd1", "qwen2vl", "qwen2moe", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe",
    "pockettts", "plamo", "codeshell", "orion", "internlm2", "starcoder2", "xverse", "cohere2moe", "dbrx",
    "olmo", "olmo2", "olmoe", "arctic", "deepseek", "jais2", "exaone", "exaone4", "exaone-moe", "granite",
    "graniteswitch", "granite_swa", "chameleon", "seed_oss", "dots1", "arcee", "ernie4_5", "ernie4_5-moe",
    "paddleocr", "hunyuan-moe", "hunyuan_vl", "hy_v3", "smollm3", "smallthinker", "grovemoe", "apertus",
    "cogvlm", "pangu-embedded", "mistral3",
];
