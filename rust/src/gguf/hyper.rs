//! The sizes of a model, `<architecture>.*`: their types, ranges, and how they hang together.
//!
//! Each check stands for an assert or a division in llama.cpp's loader (src/llama-model.cpp, load_hparams)
//! or in the graph of the architecture (src/models/).

use super::arch::{Architecture, EVEN_HEADS, WHOLE_ROPE};
use super::fault::{Check, Fault};
use super::keys::{self, Keys, Kind, Value};

/// `LLAMA_MAX_LAYERS`, `LLAMA_MAX_EXPERTS`
const MAX_LAYERS: u32 = 512;
const MAX_EXPERTS: u32 = 1_024;
/// Far above any model, and small enough that products fit 64 bits.
const MAX_EMBD: u32 = 1 << 20;
const MAX_HEADS: u32 = 1 << 16;
const MAX_FF: u32 = 1 << 24;

#[derive(Debug)]
pub(super) struct Hyper {
    pub n_ctx_train: u32,
    pub n_layers: u32,
    /// Of the layers, those at the end that only predict further tokens.
    pub n_layers_nextn: u32,
    pub n_embd: u32,
    /// Of the embeddings that come out, if that differs.
    pub n_embd_out: Option<u32>,
    /// For each layer; zeros where it has no attention.
    pub heads: Vec<u32>,
    pub heads_kv: Vec<u32>,
    pub head_dim_k: u32,
    pub head_dim_v: u32,
    pub ff: Vec<u32>,
    /// Of all experts that a token goes through, together.
    pub ff_experts: u32,
    pub n_experts: u32,
    pub is_embedding: bool,
    /// What recurrent layers keep of a sequence.
    pub state_bytes_per_sequence: u64,
}

impl Hyper {
    pub fn kv_values_per_token(&self) -> u64 {
        self.kv_values().sum()
    }

    /// Keys plus values of one token, layer by layer.
    pub fn kv_values(&self) -> impl Iterator<Item = u64> + '_ {
        let per_head = u64::from(self.head_dim_k) + u64::from(self.head_dim_v);
        self.heads_kv.iter().map(move |&heads| u64::from(heads) * per_head)
    }

    pub fn widest_ff(&self) -> u32 {
        self.ff.iter().copied().max().unwrap_or(0).max(self.ff_experts)
    }
}

pub(super) fn check(architecture: &Architecture, keys: &Keys) -> Check<Hyper> {
    let key = |name: &str| architecture.key(name);
    let n_layers = keys.required_u32_in(&key("block_count"), 1..=MAX_LAYERS)?;
    let n_ctx_train = keys.required_u32_in(&key("context_length"), 1..=u32::MAX)?;
    let n_embd = keys.required_u32_in(&key("embedding_length"), 1..=MAX_EMBD)?;
    let n_layers_nextn = keys.u32_in(&key("nextn_predict_layers"), 0..=n_layers - 1)?.unwrap_or(0);
    let ff = keys.per_layer(&key("feed_forward_length"), n_layers, MAX_FF)?;
    let heads = Heads::check(architecture, keys, n_layers, n_embd)?;
    let n_experts = check_experts(architecture, keys, n_layers)?;
    check_rope(architecture, keys, &heads)?;
    check_floats(architecture, keys)?;
    check_divisors(architecture, keys)?;
    let pooling = keys.u32_in(&key("pooling_type"), 0..=4)?.unwrap_or(0);
    keys.u32_in(&key("classifier.pooling_type"), 0..=4)?;
    let is_causal = keys.flag(&key("attention.causal"))?.unwrap_or(true);
    Ok(Hyper {
        n_ctx_train,
        n_layers,
        n_layers_nextn,
        n_embd,
        n_embd_out: keys.u32_in(&key("embedding_length_out"), 0..=MAX_EMBD)?,
        heads: heads.per_layer,
        heads_kv: heads.per_layer_kv,
        head_dim_k: heads.dim_k,
        head_dim_v: heads.dim_v,
        ff: ff.unwrap_or_else(|| vec![0; n_layers as usize]),
        ff_experts: ff_experts(architecture, keys, n_layers)?,
        n_experts,
        is_embedding: pooling != 0 || !is_causal || architecture.is_encoder,
        state_bytes_per_sequence: state_bytes(architecture, keys, n_layers, n_embd)?,
    })
}

fn ff_experts(architecture: &Architecture, keys: &Keys, n_layers: u32) -> Check<u32> {
    let all = |name: &str| {
        let values = keys.per_layer(&architecture.key(name), n_layers, MAX_FF)?;
        Check::Ok(values.and_then(|values| values.into_iter().max()).unwrap_or(0))
    };
    let used = all("expert_used_count")?;
    Ok(all("expert_feed_forward_length")?.saturating_mul(used))
}

/// The convolution's window and the state of each recurrent layer in f32, as llama.cpp keeps them
/// (`n_embd_r`, `n_embd_s`). In a hybrid every layer is counted, also those that have attention
/// instead: which they are is in no key that all architectures share.
fn state_bytes(architecture: &Architecture, keys: &Keys, n_layers: u32, n_embd: u32) -> Check<u64> {
    if !architecture.is_recurrent && !architecture.is_hybrid {
        return Ok(0);
    }
    // Far above any model, and small enough that no product below leaves 64 bits.
    let number = |name: &str| {
        let value = keys.u32(&architecture.key(name))?.unwrap_or(0);
        Check::Ok(u64::from(value.min(MAX_EMBD)))
    };
    let (inner, state) = (number("ssm.inner_size")?, number("ssm.state_size")?);
    let window = number("ssm.conv_kernel")?.saturating_sub(1);
    let groups = number("ssm.group_count")?;
    let mamba = window * (inner + 2 * groups * state) + inner * state;
    let n_embd = u64::from(n_embd);
    let shifted = number("token_shift_count")?.max(2);
    let rwkv = match number("wkv.head_size")? {
        0 => 0,
        head => n_embd * (shifted + head),
    };
    let short = n_embd * number("shortconv.l_cache")?.saturating_sub(1);
    Ok(u64::from(n_layers) * (mamba + rwkv + short).min(1 << 40) * 4)
}

struct Heads {
    per_layer: Vec<u32>,
    per_layer_kv: Vec<u32>,
    dim_k: u32,
    dim_v: u32,
}

impl Heads {
    fn check(architecture: &Architecture, keys: &Keys, n_layers: u32, n_embd: u32) -> Check<Heads> {
        let key = |name: &str| architecture.key(name);
        let none = vec![0; n_layers as usize];
        let per_layer = keys.per_layer(&key("attention.head_count"), n_layers, MAX_HEADS)?;
        let per_layer_kv = keys.per_layer(&key("attention.head_count_kv"), n_layers, MAX_HEADS)?;
        let per_layer_kv = per_layer_kv.or_else(|| per_layer.clone());
        if architecture.is_recurrent {
            return Ok(Heads { per_layer: none.clone(), per_layer_kv: none, dim_k: 0, dim_v: 0 });
        }
        let per_layer = per_layer.unwrap_or_else(|| none.clone());
        let per_layer_kv = per_layer_kv.unwrap_or(none);
        // hybrids may begin with a layer without attention
        let may_have_none = architecture.is_hybrid || architecture.is_one_of(&["deci", "maple"]);
        if per_layer[0] == 0 && !may_have_none {
            let given = keys.has(&key("attention.head_count"));
            return Err(match given {
                true => keys::out_of_range(&key("attention.head_count"), 0, 1..=MAX_HEADS),
                false => keys::missing(&key("attention.head_count")),
            });
        }
        let dim = |name: &str| keys.u32_in(&key(name), 1..=MAX_HEADS);
        let from_embd =
            n_embd / per_layer.iter().copied().find(|&heads| heads > 0).unwrap_or(n_embd);
        let dim_k = dim("attention.key_length")?;
        let dim_v = dim("attention.value_length")?;
        dim("attention.key_length_swa")?;
        dim("attention.value_length_swa")?;
        if dim_k.is_none()
            && per_layer[0] > 0
            && !n_embd.is_multiple_of(per_layer[0])
            && architecture.is_one_of(EVEN_HEADS)
        {
            return Err(Fault::damaged(format!(
                "`{}` is {n_embd}, which {} heads cannot share (and there is no `{}`)",
                key("embedding_length"),
                per_layer[0],
                key("attention.key_length")
            )));
        }
        let heads = Heads {
            per_layer,
            per_layer_kv,
            dim_k: dim_k.unwrap_or(from_embd),
            dim_v: dim_v.unwrap_or(from_embd),
        };
        heads.check_groups(architecture)?;
        if heads.per_layer[0] > 0
            && heads.dim_k != heads.dim_v
            && architecture.is_one_of(EVEN_HEADS)
        {
            return Err(Fault::damaged(format!(
                "`{}` is {}, and must be {} as `{}`",
                key("attention.value_length"),
                heads.dim_v,
                heads.dim_k,
                key("attention.key_length")
            )));
        }
        Ok(heads)
    }

    /// Several query heads share a key head, all of them equally many.
    fn check_groups(&self, architecture: &Architecture) -> Check<()> {
        for (layer, (&heads, &heads_kv)) in
            self.per_layer.iter().zip(&self.per_layer_kv).enumerate()
        {
            if heads > 0 && heads_kv > 0 && (heads_kv > heads || heads % heads_kv != 0) {
                return Err(Fault::damaged(format!(
                    "`{}` is {heads_kv} in layer {layer}, which does not divide its {heads} heads",
                    architecture.key("attention.head_count_kv")
                )));
            }
        }
        Ok(())
    }
}

fn check_experts(architecture: &Architecture, keys: &Keys, n_layers: u32) -> Check<u32> {
    let key = |name: &str| architecture.key(name);
    let n_experts = keys.u32_in(&key("expert_count"), 0..=MAX_EXPERTS)?.unwrap_or(0);
    let used =
        keys.per_layer(&key("expert_used_count"), n_layers, MAX_EXPERTS)?.unwrap_or_default();
    let used = used.into_iter().max().unwrap_or(0);
    let groups = keys.u32(&key("expert_group_count"))?.unwrap_or(0);
    let groups_used = keys.u32(&key("expert_group_used_count"))?.unwrap_or(0);
    if n_experts <= 1 && architecture.is_one_of(&["hunyuan_vl", "hunyuan-dense"]) {
        return Ok(0);
    }
    if n_experts == 0 && architecture.is_one_of(NEEDS_EXPERTS) {
        return Err(keys::out_of_range(&key("expert_count"), 0, 1..=MAX_EXPERTS));
    }
    if used > n_experts || (n_experts > 0 && used == 0) {
        let name = key("expert_used_count");
        return Err(keys::out_of_range(&name, used, n_experts.min(1)..=n_experts));
    }
    if groups > 0 && groups >= n_experts {
        return Err(keys::out_of_range(
            &key("expert_group_count"),
            groups,
            0..=n_experts.saturating_sub(1),
        ));
    }
    if groups > 1 {
        if n_experts % groups != 0 {
            return Err(Fault::damaged(format!(
                "`{}` is {groups}, which does not divide {n_experts} experts",
                key("expert_group_count")
            )));
        }
        if !(1..groups).contains(&groups_used) {
            return Err(keys::out_of_range(
                &key("expert_group_used_count"),
                groups_used,
                1..=groups - 1,
            ));
        }
    }
    Ok(n_experts)
}

/// They assert it, or divide by the number of experts in use.
#[rustfmt::skip]
const NEEDS_EXPERTS: &[&str] = &[
    "bailingmoe2", "glm4moe", "grovemoe", "lfm2moe", "llada-moe", "qwen35moe", "qwen4exp", "smallthinker",
];

fn check_rope(architecture: &Architecture, keys: &Keys, heads: &Heads) -> Check<()> {
    let key = |name: &str| architecture.key(name);
    if let Some(kind) = keys.text(&key("rope.scaling.type"))?
        && !["none", "linear", "yarn", "longrope"].contains(&kind)
    {
        return Err(Fault::damaged(format!(
            "`{}` is `{kind}`, and must be none, linear, yarn or longrope",
            key("rope.scaling.type")
        )));
    }
    for name in ["rope.freq_base", "rope.freq_base_swa"] {
        match keys.f32(&key(name))? {
            Some(base) if !(base > 0.0 && base.is_finite()) => {
                return Err(Fault::damaged(format!(
                    "`{}` is {base}, and must be a number above 0",
                    key(name)
                )));
            }
            _ => {}
        }
    }
    check_rope_sections(architecture, keys)?;
    let windowed = key("rope.dimension_count_swa");
    let dim_windowed = keys.u32(&key("attention.key_length_swa"))?.unwrap_or(heads.dim_k);
    match keys.u32(&windowed)? {
        Some(n_rot) if heads.per_layer[0] > 0 && (n_rot % 2 != 0 || n_rot > dim_windowed) => {
            return Err(Fault::damaged(format!(
                "`{windowed}` is {n_rot}, and must be even and at most {dim_windowed}, the length of a head"
            )));
        }
        _ => {}
    }
    let rotated = key("rope.dimension_count");
    let Some(n_rot) = keys.u32(&rotated)? else { return Ok(()) };
    if heads.per_layer[0] == 0 {
        return Ok(());
    }
    if architecture.is_one_of(WHOLE_ROPE) && n_rot != heads.dim_k {
        return Err(Fault::damaged(format!(
            "`{rotated}` is {n_rot}, and must be {}, the length of a head",
            heads.dim_k
        )));
    }
    // With latent attention the rotated part is no part of the head.
    let latent = keys.has(&key("attention.kv_lora_rank"));
    if n_rot % 2 != 0 || (n_rot > heads.dim_k && !latent && !architecture.is_hybrid) {
        return Err(Fault::damaged(format!(
            "`{rotated}` is {n_rot}, and must be even and at most {}, the length of a head",
            heads.dim_k
        )));
    }
    Ok(())
}

/// ggml asserts that one of the first three parts of a position is used.
fn check_rope_sections(architecture: &Architecture, keys: &Keys) -> Check<()> {
    const ALWAYS_IN_SECTIONS: &[&str] =
        &["qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "paddleocr"];
    let key = architecture.key("rope.dimension_sections");
    let Some(Value::Numbers { kind, first, .. }) = keys.value(&key) else { return Ok(()) };
    if *kind != Kind::I32 && *kind != Kind::U32 {
        return Err(Fault::damaged(format!(
            "`{key}` must be an array of i32, but is an array of {}",
            kind.name()
        )));
    }
    let is_bad = |section: &f64| !(0.0..=f64::from(MAX_HEADS)).contains(section);
    let is_unused = first.iter().take(3).all(|&section| section == 0.0);
    if first.iter().any(is_bad) || (is_unused && architecture.is_one_of(ALWAYS_IN_SECTIONS)) {
        return Err(Fault::damaged(format!("`{key}` is {first:?}, which are no lengths")));
    }
    Ok(())
}

/// Norms assert that epsilon is a number from 0; a NaN elsewhere is never meant.
fn check_floats(architecture: &Architecture, keys: &Keys) -> Check<()> {
    for name in ["layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon"] {
        let key = architecture.key(&format!("attention.{name}"));
        match keys.f32(&key)? {
            Some(epsilon) if !(0.0..1.0).contains(&epsilon) => {
                return Err(Fault::damaged(format!(
                    "`{key}` is {epsilon}, and must be from 0 to below 1"
                )));
            }
            _ => {}
        }
    }
    let prefix = architecture.key("");
    let nan = keys.iter().find(|(key, value)| {
        key.starts_with(&prefix) && matches!(value, Value::Float(_, number) if number.is_nan())
    });
    match nan {
        Some((key, _)) => Err(Fault::damaged(format!("`{key}` is not a number (NaN)"))),
        None => Ok(()),
    }
}

/// Numbers that llama.cpp divides by.
fn check_divisors(architecture: &Architecture, keys: &Keys) -> Check<()> {
    const ALWAYS: [&str; 8] = [
        "full_attention_interval",
        "wkv.head_size",
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.time_step_rank",
        "attention.group_norm_groups",
        "experts_per_group",
    ];
    // plamo2 has 0 here, and does not divide by it
    const GROUPED: &[&str] =
        &["mamba2", "granitehybrid", "falcon-h1", "nemotron_h", "nemotron_h_moe", "qwen3next"];
    let mut names = ALWAYS.to_vec();
    if architecture.is_one_of(GROUPED) {
        names.push("ssm.group_count");
    }
    for name in names {
        keys.u32_in(&architecture.key(name), 1..=u32::MAX)?;
    }
    Ok(())
}
