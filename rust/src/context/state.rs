//! What a slot holds, as bytes that can be stored: which model they are of and whether they are whole
//! is checked before llama.cpp sees them.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::message::Exported;
use crate::config::ContextConfig;
use crate::error::{Error, Result};
use crate::model::Model;

const MAGIC: &[u8; 8] = b"tabstate";
const FORMAT: u64 = 1;
/// Magic, format, kind, number of tokens, checksum.
const HEADER: usize = 40;

/// Tells contexts apart whose states do not fit each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind(u64);

impl Kind {
    /// llama.cpp takes a state back only where there are as many sequences.
    pub fn of(model: &Model, config: &ContextConfig, n_seq_max: u32) -> Kind {
        let mut hasher = DefaultHasher::new();
        let mut metadata = model.metadata();
        metadata.sort_unstable();
        metadata.hash(&mut hasher);
        (model.n_params(), model.size_bytes(), n_seq_max).hash(&mut hasher);
        format!("{:?} {:?}", config.kv_type, config.flash_attn).hash(&mut hasher);
        env!("CARGO_PKG_VERSION").hash(&mut hasher); // another version may bring another llama.cpp
        Kind(hasher.finish())
    }
}

impl Exported {
    pub fn to_bytes(&self, kind: Kind) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(HEADER + self.tokens.len() * 4 + self.state.len())
            .map_err(|_| Error::exhausted("memory for a state that is to be saved"))?;
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&kind.0.to_le_bytes());
        bytes.extend_from_slice(&(self.tokens.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        self.tokens.iter().for_each(|token| bytes.extend_from_slice(&token.to_le_bytes()));
        bytes.extend_from_slice(&self.state);
        let sum = checksum(&bytes[HEADER..]);
        bytes[HEADER - 8..HEADER].copy_from_slice(&sum.to_le_bytes());
        Ok(bytes)
    }

    pub fn from_bytes(bytes: &[u8], kind: Kind) -> Result<Exported> {
        let refused = |what: &str| Err(Error::invalid("data", what, "a state of this model"));
        if bytes.len() < HEADER || &bytes[..8] != MAGIC {
            return refused("something else");
        }
        let word = |at: usize| {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes of the header"))
        };
        if word(8) != FORMAT {
            return refused(&format!("format {}", word(8)));
        }
        if word(16) != kind.0 {
            return refused("one of another model or of other settings");
        }
        let rest = &bytes[HEADER..];
        let num_tokens = usize::try_from(word(24)).unwrap_or(usize::MAX);
        if num_tokens > rest.len() / 4 || word(32) != checksum(rest) {
            return refused("a damaged one");
        }
        let (tokens, state) = rest.split_at(num_tokens * 4);
        let token = |bytes: &[u8]| i32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let tokens = tokens.chunks_exact(4).map(token).collect();
        Ok(Exported { tokens, state: state.to_vec() })
    }
}

/// Against accidents, not against malice.
fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = bytes.len() as u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        sum = (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    sum
}
