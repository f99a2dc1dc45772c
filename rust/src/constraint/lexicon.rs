//! The tokens of a model as bytes, and as one tree: what a constraint walks to find who may come next.

use std::sync::Arc;

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::error::{Error, Result};
use crate::model::Vocabulary;

/// Control tokens are in the tree behind a byte that no text has.
pub struct Lexicon {
    tree: TokTrie,
    end_tokens: Vec<i32>,
}

impl Lexicon {
    pub fn of(vocabulary: &Vocabulary) -> Result<Arc<Lexicon>> {
        if !vocabulary.has_text() {
            let what = "the model has no tokenizer, so no text can be asked for".into();
            return Err(Error::Tokenization { what });
        }
        let words = (0..vocabulary.size() as i32).map(|token| word(vocabulary, token));
        Ok(Arc::new(Lexicon::new(&words.collect::<Result<Vec<_>>>()?, vocabulary.end_tokens())))
    }

    /// Of these words, where control tokens are marked; the seam for tests, which need no model.
    pub fn new(words: &[Vec<u8>], end_tokens: Vec<i32>) -> Lexicon {
        // llguidance decides nothing about the end here; without one it gets an id that is none.
        let end = end_tokens.first().map_or(u32::MAX, |end| *end as u32);
        Lexicon { tree: TokTrie::from(&TokRxInfo::new(words.len() as u32, end), words), end_tokens }
    }

    pub fn tree(&self) -> &TokTrie {
        &self.tree
    }

    pub fn size(&self) -> usize {
        self.tree.vocab_size()
    }

    pub fn ends(&self, token: i32) -> bool {
        self.end_tokens.contains(&token)
    }

    pub fn end_tokens(&self) -> &[i32] {
        &self.end_tokens
    }

    /// What a token stands for, also a control token.
    pub fn text(&self, token: i32) -> &[u8] {
        let word = self.tree.token(token as TokenId);
        word.strip_prefix(&[CONTROL]).unwrap_or(word)
    }

    pub fn is_control(&self, token: i32) -> bool {
        self.tree.token(token as TokenId).first() == Some(&CONTROL)
    }

    /// All tokens that are text.
    pub fn ordinary(&self) -> impl Iterator<Item = i32> + '_ {
        let is_text = |token: &i32| !self.is_control(*token) && !self.text(*token).is_empty();
        (0..self.size() as i32).filter(is_text)
    }

    pub fn tokenizer(self: &Arc<Lexicon>) -> TokEnv {
        Arc::new(Tokenizer(self.clone()))
    }
}

const CONTROL: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

fn word(vocabulary: &Vocabulary, token: i32) -> Result<Vec<u8>> {
    let mut word = Vec::new();
    vocabulary.piece(token, false, &mut word)?;
    if word.first() == Some(&CONTROL) {
        word.clear(); // the token of a byte that no text has
    } else if word.is_empty() {
        word.push(CONTROL);
        vocabulary.piece(token, true, &mut word)?;
        word.truncate(if word.len() == 1 { 0 } else { word.len() });
    }
    Ok(word)
}

/// What llguidance wants to know of a tokenizer. It never forces tokens on the model, which would need
/// the model's own way to cut text.
struct Tokenizer(Arc<Lexicon>);

impl TokenizerEnv for Tokenizer {
    fn tok_trie(&self) -> &TokTrie {
        &self.0.tree
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.0.tree.greedy_tokenize(text)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}
