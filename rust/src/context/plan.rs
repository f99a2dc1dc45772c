//! How much memory a context takes: for its sequences, and for what they leave behind.

use super::runner::N_CTX_STEP;
use crate::config::ContextConfig;
use crate::error::{Error, Result};
use crate::hardware::memory;
use crate::model::Model;

/// With nothing asked for, a context has at most so many sequences, and their keys and values take
/// at most this share of the free memory.
const MOST_SEQUENCES: u64 = 8;
const SHARE_OF_FREE_MEMORY: u64 = 8;
const SHARE_FOR_PROMPT_CACHE: u64 = 16;

pub struct Plan {
    pub n_seq_max: u32,
    pub prompt_cache_bytes: usize,
}

impl Plan {
    /// Refuses what does not fit into memory.
    pub fn new(model: &Model, config: &ContextConfig) -> Result<Plan> {
        let per_token = model.description().kv_values_per_token;
        let n_ctx = u64::from(config.n_ctx.next_multiple_of(N_CTX_STEP));
        let one = config.kv_type.bytes(per_token) * n_ctx;
        let free = memory::available_bytes();
        let most = MOST_SEQUENCES.min(u64::from(config.n_batch));
        let wanted = match (config.n_seq_max, free) {
            (0, Some(free)) => (free / SHARE_OF_FREE_MEMORY / one.max(1)).clamp(1, most),
            (0, None) => 1,
            (n, _) => u64::from(n),
        };
        let slots = one * wanted;
        let cache = match u64::try_from(config.prompt_cache_mb) {
            Ok(megabytes) => megabytes << 20,
            Err(_) => slots.min(free.unwrap_or(0) / SHARE_FOR_PROMPT_CACHE),
        };
        let needed = slots + if config.prompt_cache_mb > 0 { cache } else { 0 };
        match free {
            Some(free) if needed > free => {
                let what = format!("a context of {wanted} × {} tokens", config.n_ctx);
                Err(Error::OutOfMemory { what, needed, free })
            }
            _ => Ok(Plan { n_seq_max: wanted as u32, prompt_cache_bytes: cache as usize }),
        }
    }
}
