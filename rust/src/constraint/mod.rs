//! What an answer has to be: a JSON schema, a regular expression, a grammar. A constraint says of each
//! token whether it can come next, and when the answer is complete.
//!
//! ```text
//! lexicon    the tokens of a model as bytes, once per model
//! schema     what is wrong with a JSON schema before anybody compiles it
//! guidance   JSON schemas, regular expressions and Lark, by llguidance
//! gbnf       llama.cpp's grammars, from text to a program
//! machine    runs such a program
//! start      when it begins: at once, behind a text, or when triggered
//! llama      what the tests compare with
//! ```
//!
//! All of it is input from outside: what is wrong with it is said where it comes in, within a second.

mod class;
mod gbnf;
mod guidance;
mod lexicon;
mod llama;
mod machine;
mod schema;
mod start;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

use crate::config::{Constraint, Syntax};
use crate::error::{Error, Result};
use crate::model::Vocabulary;
use gbnf::Program;
use guidance::{Guidance, Guided};
use machine::{Machine, TooAmbiguous};
use start::Start;

pub use lexicon::Lexicon;
pub use llama::{Verdict, llama_grammar};

/// Said when the grammar goes on, but not with anything that the model can write.
const NOBODY: &str = "no token of this model can come next";

/// Where text comes that is not made of tokens.
const NO_TOKEN: i32 = -1;

/// Of one grammar.
const MOST_BYTES: usize = 64 << 10;

/// What a model knows about constraints: its tokens, and what was compiled lately.
#[derive(Default)]
pub struct Constraints {
    lexicon: OnceLock<Result<Arc<Lexicon>>>,
    guidance: OnceLock<Result<Arc<Guidance>>>,
    known: Mutex<VecDeque<(Syntax, String, Compiled)>>,
}

#[derive(Clone)]
enum Compiled {
    Guidance(Arc<Matcher>),
    Gbnf(Arc<Program>),
}

impl Constraints {
    const MOST: usize = 16;

    /// Of words instead of a model; the seam for tests.
    pub fn with_lexicon(lexicon: Lexicon) -> Constraints {
        Constraints { lexicon: OnceLock::from(Ok(Arc::new(lexicon))), ..Constraints::default() }
    }

    /// Compiles it, on the thread of whoever asks. `stop_tokens` end an answer like the model's own end.
    pub fn guide(
        &self,
        asked: &Constraint,
        preserved: &[i32],
        stop_tokens: &[i32],
        vocabulary: Option<&Vocabulary>,
    ) -> Result<Guide> {
        let lexicon = self.lexicon(vocabulary)?;
        let start = Start::of(asked)?;
        let mut body = match self.compiled(asked, &lexicon, vocabulary)? {
            Compiled::Guidance(matcher) => {
                Body::Guidance(Box::new(Guided::new(&matcher, asked.syntax)))
            }
            Compiled::Gbnf(program) => {
                Body::Gbnf(Box::new(Machine::new(program).map_err(|TooAmbiguous| too_ambiguous())?))
            }
        };
        if !asked.prefix.is_empty() {
            let prefix = (NO_TOKEN, asked.prefix.clone().into_bytes());
            if !body.hear(&[prefix], &lexicon)? {
                let what = "it does not go on from what stands in the prompt";
                return Err(Error::grammar(asked.syntax.name(), what, None));
            }
        }
        let written: Vec<i32> =
            preserved.iter().copied().filter(|token| lexicon.is_control(*token)).collect();
        let mut ends = lexicon.end_tokens().to_vec();
        ends.extend(stop_tokens);
        Ok(Guide { syntax: asked.syntax, start, body, lexicon, written, ends, is_finished: false })
    }

    fn compiled(
        &self,
        asked: &Constraint,
        lexicon: &Arc<Lexicon>,
        vocabulary: Option<&Vocabulary>,
    ) -> Result<Compiled> {
        let (syntax, text) = (asked.syntax, &asked.text);
        if text.len() > MOST_BYTES {
            let what = format!("{} bytes are more than {MOST_BYTES}", text.len());
            return Err(Error::grammar(syntax.name(), what, None));
        }
        if text.trim().is_empty() {
            return Err(Error::grammar(syntax.name(), "it is empty", Some((1, 1))));
        }
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |(of, with, _): &(Syntax, String, _)| *of == syntax && with == text;
        if let Some((.., compiled)) = known().iter().find(|known| is_it(known)) {
            return Ok(compiled.clone());
        }
        let compiled = match syntax {
            Syntax::Gbnf => Compiled::Gbnf(Arc::new(gbnf::compile(text, vocabulary)?)),
            _ => {
                let guidance = self.guidance.get_or_init(|| Guidance::new(lexicon)).clone()?;
                Compiled::Guidance(Arc::new(guidance.compile(syntax, text)?))
            }
        };
        let mut known = known();
        known.truncate(Self::MOST - 1);
        known.push_front((syntax, text.clone(), compiled.clone()));
        Ok(compiled)
    }

    fn lexicon(&self, vocabulary: Option<&Vocabulary>) -> Result<Arc<Lexicon>> {
        let none = || Err(Error::internal("a constraint needs a vocabulary"));
        self.lexicon.get_or_init(|| vocabulary.map_or_else(none, Lexicon::of)).clone()
    }
}

/// A constraint at work for one request.
pub struct Guide {
    syntax: Syntax,
    /// Until it has begun.
    start: Option<Start>,
    body: Body,
    lexicon: Arc<Lexicon>,
    /// Control tokens that are part of the answer's text.
    written: Vec<i32>,
    ends: Vec<i32>,
    is_finished: bool,
}

#[derive(Clone)]
enum Body {
    Guidance(Box<Guided>),
    Gbnf(Box<Machine>),
}

/// The tokens that can come next.
pub struct Allowed(SimpleVob);

impl Guide {
    /// Whether a token can come next; one that ends the answer can when it is complete.
    pub fn allows(&mut self, token: i32) -> Result<bool> {
        if self.ends.contains(&token) {
            return self.can_end();
        }
        let text = self.lexicon.text(token).to_vec();
        match &self.start {
            None => self.body.allows(token, written(&self.written, &self.lexicon, token, &text)),
            Some(start) => match start.clone().hear(token, &text) {
                Some(heard) => Ok(self.body.clone().hear(&heard, &self.lexicon)?),
                None => Ok(true),
            },
        }
    }

    /// The answer goes on with a token that it allows.
    pub fn accept(&mut self, token: i32) -> Result<()> {
        if self.ends.contains(&token) {
            return Ok(());
        }
        let text = self.lexicon.text(token).to_vec();
        let is_kept = match &mut self.start {
            None => {
                let text = written(&self.written, &self.lexicon, token, &text);
                self.body.accept(token, text)?
            }
            Some(start) => match start.hear(token, &text) {
                Some(heard) => {
                    self.start = None;
                    self.body.hear(&heard, &self.lexicon)?
                }
                None => true,
            },
        };
        if !is_kept {
            return Err(self.failure("a token came that it does not allow"));
        }
        self.is_finished = self.start.is_none() && self.body.is_finished()?;
        Ok(())
    }

    /// All that can come next.
    pub fn allowed(&mut self) -> Result<Allowed> {
        let mut allowed = self.lexicon.tree().alloc_token_set();
        if self.start.is_some() {
            // Nearly all; that one cannot is rare, and that it was the likeliest one rarer.
            for token in 0..self.lexicon.size() as i32 {
                if self.allows(token)? {
                    allowed.allow_token(token as u32);
                }
            }
        } else {
            self.body.allow(&self.lexicon, &self.written, &mut allowed)?;
        }
        let can_end = self.can_end()?;
        self.ends.iter().for_each(|end| allowed.set(*end as usize, can_end));
        match allowed.is_zero() {
            true => Err(self.failure(NOBODY)),
            false => Ok(Allowed(allowed)),
        }
    }

    /// It is complete, and nothing can come but the end.
    pub fn is_finished(&self) -> bool {
        self.is_finished
    }

    fn can_end(&mut self) -> Result<bool> {
        match &self.start {
            Some(start) => Ok(start.may_never_come()),
            None => self.body.can_end(),
        }
    }

    fn failure(&self, what: &str) -> Error {
        Error::grammar(self.syntax.name(), what, None)
    }
}

impl Allowed {
    pub fn has(&self, token: i32) -> bool {
        (token as usize) < self.0.len() && self.0.is_allowed(token as u32)
    }

    /// Nobody else keeps a chance.
    pub fn apply(&self, row: &mut [f32]) {
        for (logits, bits) in row.chunks_mut(32).zip(self.0.as_slice()) {
            match *bits {
                u32::MAX => {}
                0 => logits.fill(f32::NEG_INFINITY),
                bits => {
                    for (place, logit) in logits.iter_mut().enumerate() {
                        *logit = if bits >> place & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                    }
                }
            }
        }
    }
}

impl Body {
    fn allows(&mut self, token: i32, text: &[u8]) -> Result<bool> {
        match self {
            Body::Guidance(guided) => guided.allows(token),
            Body::Gbnf(machine) => {
                machine.allows(token, text).map_err(|TooAmbiguous| too_ambiguous())
            }
        }
    }

    fn accept(&mut self, token: i32, text: &[u8]) -> Result<bool> {
        match self {
            Body::Guidance(guided) => guided.accept(token, text).map(|()| true),
            Body::Gbnf(machine) => {
                machine.accept(token, text).map_err(|TooAmbiguous| too_ambiguous())
            }
        }
    }

    /// Tokens before the first one of its own, of which the first may be the end of one. False: they
    /// do not fit.
    fn hear(&mut self, heard: &[(i32, Vec<u8>)], lexicon: &Lexicon) -> Result<bool> {
        for (token, text) in heard {
            let is_kept = match self {
                Body::Gbnf(_) => self.accept(*token, text)?,
                Body::Guidance(guided) => {
                    let tokens = lexicon.tree().greedy_tokenize(text);
                    tokens.into_iter().try_fold(true, |is_kept, part| {
                        let is_kept = is_kept && guided.allows(part as i32)?;
                        if is_kept {
                            guided.accept(part as i32, lexicon.text(part as i32))?;
                        }
                        Ok::<_, Error>(is_kept)
                    })?
                }
            };
            if !is_kept {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn allow(&mut self, lexicon: &Lexicon, written: &[i32], allowed: &mut SimpleVob) -> Result<()> {
        match self {
            Body::Guidance(guided) => guided.mask().map(|mask| allowed.or(&mask)),
            Body::Gbnf(machine) => {
                machine.allow(lexicon, written, allowed).map_err(|TooAmbiguous| too_ambiguous())
            }
        }
    }

    fn can_end(&mut self) -> Result<bool> {
        match self {
            Body::Guidance(guided) => guided.can_end(),
            Body::Gbnf(machine) => Ok(machine.can_end()),
        }
    }

    fn is_finished(&mut self) -> Result<bool> {
        match self {
            Body::Guidance(guided) => guided.is_finished(),
            Body::Gbnf(machine) => Ok(machine.is_finished()),
        }
    }
}

/// What a token adds to the answer: nothing, for a control token that is not written out.
fn written<'a>(preserved: &[i32], lexicon: &Lexicon, token: i32, text: &'a [u8]) -> &'a [u8] {
    if lexicon.is_control(token) && !preserved.contains(&token) { &[] } else { text }
}

fn too_ambiguous() -> Error {
    Error::grammar("grammar", "it has too many ways to read the same text", None)
}

/// Line and column of a byte, both counted from 1.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    (line, column)
}
