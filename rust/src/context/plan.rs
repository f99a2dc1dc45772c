//! How much memory a context takes: for its sequences, and for what they leave behind.

use super::runner::N_CTX_STEP;
use crate::config::ContextConfig;
use crate::error::{Error, Result};
use crate::gguf::Description;

/// With nothing asked for, a context has at most so many sequences, and their keys and values take
/// at most this share of the free memory.
const MOST_SEQUENCES: u64 = 8;
const SHARE_OF_FREE_MEMORY: u64 = 8;
const SHARE_FOR_PROMPT_CACHE: u64 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub n_seq_max: u32,
    /// Keys and values of all sequences.
    pub kv_bytes: u64,
    pub prompt_cache_bytes: usize,
}

impl Plan {
    /// What the model's header, the settings and the free memory come to. `n_ctx` is at most what the
    /// model was trained with.
    pub fn of(description: &Description, config: &ContextConfig, free: Option<u64>) -> Plan {
        let n_ctx = u64::from(config.n_ctx.next_multiple_of(N_CTX_STEP));
        let one = config.kv_type.bytes(description.kv_values_per_token) * n_ctx;
        let most = MOST_SEQUENCES.min(u64::from(config.n_batch));
        let wanted = match (config.n_seq_max, free) {
            (0, Some(free)) => (free / SHARE_OF_FREE_MEMORY / one.max(1)).clamp(1, most),
            (0, None) => 1,
            (n, _) => u64::from(n),
        };
        let slots = one.saturating_mul(wanted);
        let cache = match u64::try_from(config.prompt_cache_mb) {
            Ok(megabytes) => megabytes << 20,
            Err(_) => slots.min(free.unwrap_or(0) / SHARE_FOR_PROMPT_CACHE),
        };
        Plan { n_seq_max: wanted as u32, kv_bytes: slots, prompt_cache_bytes: cache as usize }
    }

    /// Refuses what does not fit into memory. A prompt cache counts where it was asked for.
    pub fn check(&self, config: &ContextConfig, free: Option<u64>) -> Result<()> {
        let asked = if config.prompt_cache_mb > 0 { self.prompt_cache_bytes as u64 } else { 0 };
        let needed = self.kv_bytes.saturating_add(asked);
        match free {
            Some(free) if needed > free => {
                let what = format!("a context of {} × {} tokens", self.n_seq_max, config.n_ctx);
                Err(Error::OutOfMemory { what, needed, free })
            }
            _ => Ok(()),
        }
    }
}
