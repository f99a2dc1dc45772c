//! When a constraint begins: at once, behind a certain text, or when something triggers it.

use regex::bytes::{Regex, RegexBuilder};

use crate::config::{Constraint, Trigger};
use crate::error::{Error, Result};

/// What is waited for, and the text in which it has not come yet.
#[derive(Clone)]
pub struct Start {
    after: Option<Vec<u8>>,
    triggers: Option<Triggers>,
    heard: Vec<u8>,
    /// The tokens of `heard`, and where each ends.
    tokens: Vec<(i32, usize)>,
    /// The beginning of the answer is not in `heard` any more.
    is_cut: bool,
}

#[derive(Clone)]
struct Triggers {
    tokens: Vec<i32>,
    words: Vec<Vec<u8>>,
    patterns: Vec<Pattern>,
}

/// llama.cpp's templates know one thing that the crate does not: what must not follow.
#[derive(Clone)]
struct Pattern {
    regex: Regex,
    not_before: Option<Regex>,
    /// It is about the whole answer.
    is_anchored: bool,
}

/// Tokens, or the rest of one, that the constraint hears first.
pub type Heard = Vec<(i32, Vec<u8>)>;

/// Of the text in which triggers are looked for.
const MOST_HEARD: usize = 16 << 10;

impl Start {
    /// None: it begins at once.
    pub fn of(asked: &Constraint) -> Result<Option<Start>> {
        let triggers = asked.lazy.then(|| Triggers::of(&asked.triggers)).transpose()?;
        if asked.after.is_none() && triggers.is_none() {
            return Ok(None);
        }
        Ok(Some(Start {
            after: asked.after.clone().map(String::into_bytes),
            triggers,
            heard: Vec::new(),
            tokens: Vec::new(),
            is_cut: false,
        }))
    }

    /// An answer may also end without what has to trigger it, but not before what it begins behind.
    pub fn may_never_come(&self) -> bool {
        self.triggers.is_some()
    }

    /// With one more token: what the constraint hears first, if this was what it waited for.
    pub fn hear(&mut self, token: i32, text: &[u8]) -> Option<Heard> {
        self.heard.extend_from_slice(text);
        self.tokens.push((token, self.heard.len()));
        if let Some(after) = &self.after {
            let at = find(&self.heard, after)?;
            let end = at + after.len();
            // Behind the text that was waited for there are often line breaks, which are no answer.
            let space = self.heard[end..].iter().take_while(|byte| byte.is_ascii_whitespace());
            let begin = end + space.count();
            self.after = None;
            if self.triggers.is_none() {
                return Some(self.since(begin));
            }
            self.heard.drain(..end);
            self.tokens = vec![(token, self.heard.len())];
        }
        let triggers = self.triggers.as_ref()?;
        if triggers.tokens.contains(&token) {
            return Some(vec![(token, text.to_vec())]);
        }
        match triggers.find(&self.heard, self.is_cut) {
            Some(begin) => Some(self.since(begin)),
            None => {
                self.forget();
                None
            }
        }
    }

    /// The tokens from a place in the text on; of the first one maybe only its end.
    fn since(&self, begin: usize) -> Heard {
        let mut at = 0;
        let mut heard = Vec::new();
        for &(token, end) in &self.tokens {
            if end > begin {
                heard.push((token, self.heard[at.max(begin)..end].to_vec()));
            }
            at = end;
        }
        heard
    }

    fn forget(&mut self) {
        if self.heard.len() > 2 * MOST_HEARD {
            let cut = self.heard.len() - MOST_HEARD;
            self.heard.drain(..cut);
            self.tokens.retain(|(_, end)| *end > cut);
            self.tokens.iter_mut().for_each(|(_, end)| *end -= cut);
            self.is_cut = true;
        }
    }
}

impl Triggers {
    fn of(asked: &[Trigger]) -> Result<Triggers> {
        let (mut tokens, mut words, mut patterns) = (Vec::new(), Vec::new(), Vec::new());
        for trigger in asked {
            match trigger {
                Trigger::Token(token) => tokens.push(*token),
                Trigger::Word(word) => words.push(word.clone().into_bytes()),
                Trigger::Pattern(pattern) => patterns.push(Pattern::of(pattern)?),
                Trigger::PatternFull(pattern) => {
                    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
                    let pattern = pattern.strip_suffix('$').unwrap_or(pattern);
                    patterns.push(Pattern::of(&format!("^{pattern}$"))?);
                }
            }
        }
        Ok(Triggers { tokens, words, patterns })
    }

    fn find(&self, text: &[u8], is_cut: bool) -> Option<usize> {
        let words = self.words.iter().filter_map(|word| find(text, word));
        let patterns = self.patterns.iter().filter(|pattern| !(is_cut && pattern.is_anchored));
        words.chain(patterns.filter_map(|pattern| pattern.find(text))).min()
    }
}

impl Pattern {
    fn of(pattern: &str) -> Result<Pattern> {
        let refuse = |error: regex::Error| {
            Error::invalid("triggers", pattern, &format!("a regular expression ({error})"))
        };
        // As in C++, where characters are bytes.
        let build = |pattern: &str| {
            RegexBuilder::new(pattern)
                .unicode(false)
                .size_limit(1 << 20)
                .dfa_size_limit(1 << 20)
                .build()
                .map_err(refuse)
        };
        let (regex, not_before) = match pattern.strip_suffix(')').map(|rest| rest.split_once("(?!"))
        {
            Some(Some((regex, not))) => (regex, Some(build(&format!("^(?:{not})"))?)),
            _ => (pattern, None),
        };
        Ok(Pattern { regex: build(regex)?, not_before, is_anchored: pattern.starts_with('^') })
    }

    /// Where its first group that is not empty begins, or all of it.
    fn find(&self, text: &[u8]) -> Option<usize> {
        let follows =
            |at: usize| self.not_before.as_ref().is_none_or(|not| !not.is_match(&text[at..]));
        let found = self
            .regex
            .captures_iter(text)
            .find(|found| found.get(0).is_some_and(|whole| follows(whole.end())))?;
        let group = found.iter().skip(1).flatten().find(|group| !group.is_empty());
        group.or(found.get(0)).map(|found| found.start())
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|part| part == what)
}
