//! JSON schemas, regular expressions and Lark grammars: the crate llguidance, and what keeps it short.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{InferenceCapabilities, SimpleVob};
use llguidance::{Matcher, ParserFactory};

use super::lexicon::Lexicon;
use super::{position, schema};
use crate::config::Syntax;
use crate::error::{Error, Result};

/// It has limits of its own, but not on everything.
const LONGEST: Duration = Duration::from_millis(900);
/// Compilations that were given up go on until a limit of llguidance's ends them.
const MOST_AT_ONCE: usize = 8;
/// Nested grammars are read by recursion. Pages that are not touched cost nothing.
const STACK: usize = 256 << 20;

pub struct Guidance {
    factory: ParserFactory,
    num_compiling: AtomicUsize,
}

impl Guidance {
    pub fn new(lexicon: &Arc<Lexicon>) -> Result<Arc<Guidance>> {
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let tokenizer = lexicon.tokenizer();
        let mut factory = ParserFactory::new(&tokenizer, InferenceCapabilities::default(), &slices)
            .map_err(|error| Error::internal(format!("no constraints: {error}")))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: 50_000,
            max_grammar_size: 200_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Arc::new(Guidance { factory, num_compiling: AtomicUsize::new(0) }))
    }

    /// On a thread of its own, which is given up when it takes too long.
    pub fn compile(self: &Arc<Guidance>, syntax: Syntax, text: &str) -> Result<Matcher> {
        let grammar = match syntax {
            Syntax::JsonSchema => TopLevelGrammar::from_json_schema(schema::parse(text)?),
            Syntax::Regex => {
                check_regex(text)?;
                TopLevelGrammar::from_regex(text)
            }
            Syntax::Lark => TopLevelGrammar::from_lark(text.into()),
            Syntax::Gbnf => return Err(Error::internal("GBNF is not llguidance's")),
        };
        let busy = self.num_compiling.fetch_add(1, Ordering::Relaxed) >= MOST_AT_ONCE;
        let (sender, receiver) = channel();
        let mine = self.clone();
        let compiling = move || {
            if !busy {
                let parser = mine.factory.create_parser(grammar);
                let _ = sender.send(Matcher::new(parser));
            }
            mine.num_compiling.fetch_sub(1, Ordering::Relaxed);
        };
        std::thread::Builder::new()
            .name("tabagent-grammar".into())
            .stack_size(STACK)
            .spawn(compiling)
            .map_err(|error| {
                self.num_compiling.fetch_sub(1, Ordering::Relaxed);
                Error::exhausted(format!("a thread to compile on: {error}"))
            })?;
        let slow = || Error::grammar(syntax.name(), "it takes too long to compile", None);
        match receiver.recv_timeout(LONGEST) {
            Ok(matcher) if matcher.is_error() => Err(refusal(syntax, &matcher)),
            Ok(matcher) => Ok(matcher),
            Err(RecvTimeoutError::Timeout) => Err(slow()),
            Err(RecvTimeoutError::Disconnected) if busy => Err(slow()),
            Err(RecvTimeoutError::Disconnected) => Err(Error::internal("a compilation panicked")),
        }
    }
}

/// What llguidance says of a regular expression has no position; the parser that it uses has one.
fn check_regex(text: &str) -> Result<()> {
    let refuse =
        |what: String, offset| Err(Error::grammar("regex", what, Some(position(text, offset))));
    match regex_syntax::Parser::new().parse(text) {
        Ok(_) => Ok(()),
        Err(regex_syntax::Error::Parse(error)) => {
            refuse(error.kind().to_string(), error.span().start.offset)
        }
        Err(regex_syntax::Error::Translate(error)) => {
            refuse(error.kind().to_string(), error.span().start.offset)
        }
        Err(error) => refuse(error.to_string(), 0),
    }
}

/// One grammar on its way through one answer.
#[derive(Clone)]
pub struct Guided {
    matcher: Matcher,
    syntax: Syntax,
    /// Of the text so far.
    last_byte: u8,
}

impl Guided {
    /// Without what others have found out about the same grammar: one who fails does not spoil it for
    /// all.
    pub fn new(compiled: &Matcher, syntax: Syntax) -> Guided {
        Guided { matcher: compiled.deep_clone(), syntax, last_byte: 0 }
    }

    pub fn allows(&mut self, token: i32) -> Result<bool> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(false);
        }
        let valid = self.matcher.validate_tokens(&[token as u32]);
        valid.map(|count| count == 1).map_err(|_| self.failure())
    }

    pub fn accept(&mut self, token: i32, text: &[u8]) -> Result<()> {
        self.matcher.consume_token(token as u32).map_err(|_| self.failure())?;
        self.last_byte = text.last().copied().unwrap_or(self.last_byte);
        Ok(())
    }

    pub fn mask(&mut self) -> Result<SimpleVob> {
        self.matcher.compute_mask().map_err(|_| self.failure())
    }

    pub fn can_end(&mut self) -> Result<bool> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(true);
        }
        self.matcher.is_accepting().map_err(|_| self.failure())
    }

    /// Behind a whole JSON value only spaces can come, unless it is a number.
    pub fn is_finished(&mut self) -> Result<bool> {
        let is_whole = self.syntax == Syntax::JsonSchema && !self.last_byte.is_ascii_digit();
        Ok(self.matcher.is_stopped() || is_whole && self.can_end()?)
    }

    fn failure(&self) -> Error {
        match refusal(self.syntax, &self.matcher) {
            // llguidance's name for it.
            Error::Grammar { what, .. } if what == "NoExtensionBias" => {
                Error::grammar(self.syntax.name(), super::NOBODY, None)
            }
            other => other,
        }
    }
}

/// What went wrong, without the state of the parser behind it; and where, if it says so first.
fn refusal(syntax: Syntax, matcher: &Matcher) -> Error {
    let said = matcher.get_error().unwrap_or_else(|| "no reason was given".into());
    let ends = ["\n<state>", "\n<non-verbose/>", "\n<backtrace>"].map(|end| said.find(end));
    let end = ends.into_iter().flatten().min().unwrap_or(said.len());
    let said = said[..end].trim();
    let (place, what) = split_position(said);
    let what: String = what.lines().next().unwrap_or("").chars().take(300).collect();
    Error::grammar(syntax.name(), what, place.filter(|_| syntax == Syntax::Lark))
}

/// `at 3(14): …` or `3(14): …`
fn split_position(said: &str) -> (Option<(usize, usize)>, &str) {
    let split = || {
        let (place, what) = said.strip_prefix("at ").unwrap_or(said).split_once("): ")?;
        let (line, column) = place.split_once('(')?;
        Some(((line.parse().ok()?, column.parse().ok()?), what))
    };
    split().map_or((None, said), |(place, what)| (Some(place), what))
}
