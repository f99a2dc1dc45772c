//! GBNF, llama.cpp's way of writing grammars: from its text to a program for `machine`.
//!
//! What can be written, and what it means, is as in llama.cpp; the matching is not. Its stacks grow
//! exponentially for grammars of a few lines, and it asserts; here nothing does.

use std::collections::HashMap;

use super::class::Class;
use crate::error::{Error, Result};
use crate::model::Vocabulary;

/// One instruction. Alternatives are `Split`s, repetitions are loops or copies, and rules that do not
/// contain themselves are mostly written out where they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// One character of a class.
    Char(u32),
    /// This token as a whole, or any other one.
    Token(i32),
    NotToken(i32),
    /// A rule, and then what follows.
    Call(u32),
    /// What follows, and also what is there.
    Split(u32),
    Jump(u32),
    Return,
}

#[derive(Debug, Default)]
pub struct Program {
    pub ops: Vec<Op>,
    pub classes: Vec<Class>,
    /// Where the code of each rule begins.
    pub starts: Vec<u32>,
    pub root: u32,
}

const MOST_RULES: usize = 2000;
const MOST_REPETITIONS: u64 = 2000;
const DEEPEST: usize = 100;
/// Of a program: a few megabytes.
const MOST_OPS: usize = 200_000;
/// A larger rule is called where it is used, and not written out.
const SMALL: usize = 64;

pub fn compile(text: &str, vocabulary: Option<&Vocabulary>) -> Result<Program> {
    let (rules, names) = (Vec::new(), HashMap::new());
    let mut parser = Parser { text, at: 0, vocabulary, rules, names };
    parser.grammar()?;
    let rules = parser.finished()?;
    refuse_left_recursion(text, &rules)?;
    Writer::new(text, &rules).program()
}

struct Rule<'a> {
    name: &'a str,
    /// Where it is first named; errors point there.
    at: usize,
    body: Option<Node>,
}

enum Node {
    Literal(Vec<u32>),
    Class(Class),
    Token { id: i32, is_negated: bool },
    Rule(usize),
    Sequence(Vec<Node>),
    Choice(Vec<Node>),
    Repeat { node: Box<Node>, least: u64, most: Option<u64> },
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    vocabulary: Option<&'a Vocabulary>,
    rules: Vec<Rule<'a>>,
    names: HashMap<&'a str, usize>,
}

impl<'a> Parser<'a> {
    fn grammar(&mut self) -> Result<()> {
        self.skip_space(true);
        while !self.rest().is_empty() {
            self.rule()?;
        }
        Ok(())
    }

    fn finished(self) -> Result<Vec<Rule<'a>>> {
        let error = |at, what: String| Err(refusal(self.text, at, what));
        if !self.names.contains_key("root") {
            return error(self.text.len(), "there is no rule `root`".into());
        }
        match self.rules.iter().find(|rule| rule.body.is_none()) {
            Some(rule) => error(rule.at, format!("the rule `{}` is not defined", rule.name)),
            None => Ok(self.rules),
        }
    }

    fn rule(&mut self) -> Result<()> {
        let rule = self.name()?;
        self.skip_space(false);
        if !self.take("::=") {
            return self.fail("`::=` is expected here");
        }
        self.skip_space(true);
        let body = self.choice(0)?;
        if !self.take("\r\n") && !self.take("\n") && !self.take("\r") && !self.rest().is_empty() {
            return self.fail("a new line is expected here");
        }
        self.skip_space(true);
        self.rules[rule].body = Some(body); // of two with one name the last one counts
        Ok(())
    }

    fn choice(&mut self, depth: usize) -> Result<Node> {
        if depth > DEEPEST {
            return self.fail(&format!("more than {DEEPEST} groups lie in one another"));
        }
        let mut ways = vec![self.sequence(depth)?];
        while self.take("|") {
            self.skip_space(true);
            ways.push(self.sequence(depth)?);
        }
        Ok(if ways.len() == 1 { ways.remove(0) } else { Node::Choice(ways) })
    }

    fn sequence(&mut self, depth: usize) -> Result<Node> {
        let mut nodes = Vec::new();
        let mut can_repeat = false;
        while let Some(next) = self.peek() {
            match next {
                '"' => nodes.push(self.literal()?),
                '[' => nodes.push(self.class()?),
                '<' | '!' => nodes.push(self.token()?),
                '.' => {
                    self.at += 1;
                    nodes.push(Node::Class(Class::any()));
                }
                '(' => {
                    self.at += 1;
                    self.skip_space(true);
                    nodes.push(self.choice(depth + 1)?);
                    if !self.take(")") {
                        return self.fail("`)` is expected here");
                    }
                }
                '*' | '+' | '?' | '{' => {
                    let (least, most) = self.repetition()?;
                    if !can_repeat {
                        return self.fail("there is nothing before it that could be repeated");
                    }
                    let node = Box::new(nodes.pop().expect("what can be repeated"));
                    nodes.push(Node::Repeat { node, least, most });
                }
                _ if is_of_name(next) => nodes.push(Node::Rule(self.name()?)),
                _ => break,
            }
            can_repeat = !matches!(nodes.last(), Some(Node::Literal(all)) if all.is_empty());
            self.skip_space(depth > 0);
        }
        Ok(Node::Sequence(nodes))
    }

    fn literal(&mut self) -> Result<Node> {
        self.at += 1;
        let mut characters = Vec::new();
        while !self.take("\"") {
            characters.push(self.character()?);
        }
        Ok(Node::Literal(characters))
    }

    fn class(&mut self) -> Result<Node> {
        self.at += 1;
        let is_negated = self.take("^");
        let mut ranges = Vec::new();
        while !self.take("]") {
            let first = self.character()?;
            let has_last = self.rest().starts_with('-') && !self.rest().starts_with("-]");
            let last = if has_last {
                self.at += 1;
                self.character()?
            } else {
                first
            };
            ranges.push((first, last));
        }
        if ranges.is_empty() {
            return self.fail("a class without characters");
        }
        Ok(Node::Class(Class::new(ranges, is_negated)))
    }

    fn token(&mut self) -> Result<Node> {
        let is_negated = self.take("!");
        let begin = self.at;
        if !self.take("<") {
            return self.fail("`<` is expected here");
        }
        if self.take("[") {
            let id = self.number()?;
            if !self.take("]>") {
                return self.fail("`]>` is expected here");
            }
            let size = self.vocabulary.map_or(i32::MAX as u64, |known| u64::from(known.size()));
            if id >= size {
                self.at = begin;
                return self.fail(&format!("there is no token {id}"));
            }
            return Ok(Node::Token { id: id as i32, is_negated });
        }
        let Some(length) = self.rest().find('>') else {
            return self.fail("`>` is expected after this");
        };
        self.at += length + 1;
        let written = &self.text[begin..self.at];
        let known = self.vocabulary.filter(|_| written.len() <= 256);
        match known.map(|known| known.tokenize(written, false, true)).transpose()?.as_deref() {
            Some([id]) => Ok(Node::Token { id: *id, is_negated }),
            _ => {
                self.at = begin;
                self.fail(&format!("`{written}` is not one token of this model"))
            }
        }
    }

    fn repetition(&mut self) -> Result<(u64, Option<u64>)> {
        if self.take("*") {
            return Ok((0, None));
        }
        if self.take("+") {
            return Ok((1, None));
        }
        if self.take("?") {
            return Ok((0, Some(1)));
        }
        let begin = self.at;
        self.at += 1;
        self.skip_space(true);
        let least = self.number()?;
        self.skip_space(true);
        let most = if self.take(",") {
            self.skip_space(true);
            let has_most = self.peek().is_some_and(|next| next.is_ascii_digit());
            if has_most { Some(self.number()?) } else { None }
        } else {
            Some(least)
        };
        self.skip_space(true);
        if !self.take("}") {
            return self.fail("`}` is expected here");
        }
        if least.max(most.unwrap_or(0)) > MOST_REPETITIONS {
            self.at = begin;
            return self.fail(&format!("more than {MOST_REPETITIONS} repetitions"));
        }
        if most.is_some_and(|most| most < least) {
            self.at = begin;
            return self.fail(&format!("at least {least} and at most {} times", most.unwrap_or(0)));
        }
        Ok((least, most))
    }

    fn number(&mut self) -> Result<u64> {
        let digits = self.rest().bytes().take_while(u8::is_ascii_digit).count();
        let Ok(number) = self.rest()[..digits].parse::<u64>() else {
            return self.fail("a whole number is expected here, and not a huge one");
        };
        self.at += digits;
        Ok(number)
    }

    /// The rule of the name that stands here; one that is not known yet is expected later.
    fn name(&mut self) -> Result<usize> {
        let length = self.rest().chars().take_while(|&next| is_of_name(next)).count();
        let name = &self.rest()[..length];
        if name.is_empty() {
            return self.fail("the name of a rule is expected here: letters, digits and `-`");
        }
        if let Some(known) = self.names.get(name) {
            self.at += length;
            return Ok(*known);
        }
        if self.rules.len() == MOST_RULES {
            return self.fail(&format!("more than {MOST_RULES} rules"));
        }
        self.names.insert(name, self.rules.len());
        self.rules.push(Rule { name, at: self.at, body: None });
        self.at += length;
        Ok(self.rules.len() - 1)
    }

    fn character(&mut self) -> Result<u32> {
        let Some(first) = self.peek() else { return self.fail("unexpected end") };
        if first != '\\' {
            self.at += first.len_utf8();
            return Ok(first.into());
        }
        let escape = self.rest()[1..].chars().next();
        let digits = match escape {
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            _ => 0,
        };
        let character = match escape {
            Some('t') => '\t'.into(),
            Some('r') => '\r'.into(),
            Some('n') => '\n'.into(),
            Some(itself @ ('\\' | '"' | '[' | ']' | '-')) => itself.into(),
            _ if digits > 0 => {
                let hex = self.rest().get(2..2 + digits).unwrap_or("");
                let hex = Some(hex).filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
                match hex.and_then(|hex| u32::from_str_radix(hex, 16).ok()) {
                    Some(character) => character,
                    None => return self.fail(&format!("{digits} hexadecimal digits are expected")),
                }
            }
            _ => return self.fail("unknown escape"),
        };
        self.at += 2 + digits;
        Ok(character)
    }

    fn skip_space(&mut self, also_lines: bool) {
        while let Some(next) = self.peek() {
            match next {
                ' ' | '\t' => self.at += 1,
                '\r' | '\n' if also_lines => self.at += 1,
                '#' => self.at += self.rest().find(['\r', '\n']).unwrap_or(self.rest().len()),
                _ => break,
            }
        }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn take(&mut self, what: &str) -> bool {
        let is_there = self.rest().starts_with(what);
        self.at += if is_there { what.len() } else { 0 };
        is_there
    }

    fn fail<T>(&self, what: &str) -> Result<T> {
        Err(refusal(self.text, self.at, what))
    }
}

fn is_of_name(next: char) -> bool {
    next.is_ascii_alphanumeric() || next == '-'
}

fn refusal(text: &str, at: usize, what: impl Into<String>) -> Error {
    Error::grammar("grammar", what, Some(super::position(text, at)))
}

/// A rule that begins with itself would never get anywhere.
fn refuse_left_recursion(text: &str, rules: &[Rule]) -> Result<()> {
    let mut may_be_empty = vec![false; rules.len()];
    loop {
        let is_empty =
            |rule: &Rule| rule.body.as_ref().is_some_and(|of| of.is_empty(&may_be_empty));
        let next: Vec<bool> = rules.iter().map(is_empty).collect();
        if next == may_be_empty {
            break;
        }
        may_be_empty = next;
    }
    let firsts: Vec<Vec<usize>> = rules
        .iter()
        .map(|rule| {
            let mut found = Vec::new();
            rule.body.iter().for_each(|body| body.firsts(&may_be_empty, &mut found));
            found
        })
        .collect();
    match first_in_a_circle(&firsts) {
        Some(rule) => {
            let what = format!("the rule `{}` begins with itself", rules[rule].name);
            Err(refusal(text, rules[rule].at, what))
        }
        None => Ok(()),
    }
}

/// Depth first, without recursion: there may be thousands in a row.
fn first_in_a_circle(edges: &[Vec<usize>]) -> Option<usize> {
    let mut is_done = vec![false; edges.len()];
    let mut is_open = vec![false; edges.len()];
    for start in 0..edges.len() {
        let mut path = vec![(start, 0)];
        while let Some((at, next)) = path.pop() {
            if next == 0 {
                if is_done[at] {
                    continue;
                }
                if std::mem::replace(&mut is_open[at], true) {
                    return Some(at);
                }
            }
            match edges[at].get(next) {
                Some(&to) => path.extend([(at, next + 1), (to, 0)]),
                None => {
                    is_open[at] = false;
                    is_done[at] = true;
                }
            }
        }
    }
    None
}

impl Node {
    fn is_empty(&self, rules: &[bool]) -> bool {
        match self {
            Node::Literal(all) => all.is_empty(),
            Node::Class(_) | Node::Token { .. } => false,
            Node::Rule(rule) => rules[*rule],
            Node::Sequence(nodes) => nodes.iter().all(|node| node.is_empty(rules)),
            Node::Choice(ways) => ways.iter().any(|way| way.is_empty(rules)),
            Node::Repeat { node, least, .. } => *least == 0 || node.is_empty(rules),
        }
    }

    /// The rules that it may begin with.
    fn firsts(&self, empty: &[bool], found: &mut Vec<usize>) {
        match self {
            Node::Literal(_) | Node::Class(_) | Node::Token { .. } => {}
            Node::Rule(rule) => found.push(*rule),
            Node::Sequence(nodes) => {
                for node in nodes {
                    node.firsts(empty, found);
                    if !node.is_empty(empty) {
                        break;
                    }
                }
            }
            Node::Choice(ways) => ways.iter().for_each(|way| way.firsts(empty, found)),
            Node::Repeat { node, .. } => node.firsts(empty, found),
        }
    }

    fn rules(&self, found: &mut Vec<usize>) {
        match self {
            Node::Literal(_) | Node::Class(_) | Node::Token { .. } => {}
            Node::Rule(rule) => found.push(*rule),
            Node::Sequence(nodes) | Node::Choice(nodes) => {
                nodes.iter().for_each(|node| node.rules(found));
            }
            Node::Repeat { node, .. } => node.rules(found),
        }
    }
}

struct Writer<'a> {
    text: &'a str,
    rules: &'a [Rule<'a>],
    /// Rules that are called: those that contain themselves, and large ones.
    is_called: Vec<bool>,
    program: Program,
}

impl<'a> Writer<'a> {
    fn new(text: &'a str, rules: &'a [Rule<'a>]) -> Writer<'a> {
        let is_called = vec![false; rules.len()];
        Writer { text, rules, is_called, program: Program::default() }
    }

    fn program(mut self) -> Result<Program> {
        self.choose_called();
        self.program.starts = vec![u32::MAX; self.rules.len()];
        for (index, rule) in self.rules.iter().enumerate() {
            let is_root = rule.name == "root";
            if is_root {
                self.program.root = index as u32;
            }
            if is_root || self.is_called[index] {
                self.program.starts[index] = self.here();
                self.write(self.body(index), rule.at)?;
                self.push(Op::Return, rule.at)?;
            }
        }
        Ok(self.program)
    }

    /// Every circle of rules has one that is called, so that writing out the others comes to an end.
    /// The rules in the order of a depth-first walk: who is met while it is still open closes one.
    fn choose_called(&mut self) {
        let count = self.rules.len();
        let parts: Vec<Vec<usize>> = (0..count)
            .map(|index| {
                let mut found = Vec::new();
                self.body(index).rules(&mut found);
                found
            })
            .collect();
        let (mut is_open, mut is_seen) = (vec![false; count], vec![false; count]);
        let mut sizes = vec![0usize; count];
        for start in 0..count {
            let mut path = vec![(start, 0)];
            while let Some((at, next)) = path.pop() {
                if next == 0 {
                    if is_open[at] {
                        self.is_called[at] = true;
                    }
                    if is_seen[at] {
                        continue;
                    }
                    (is_open[at], is_seen[at]) = (true, true);
                }
                if let Some(&to) = parts[at].get(next) {
                    path.extend([(at, next + 1), (to, 0)]);
                    continue;
                }
                is_open[at] = false;
                sizes[at] = self.size(self.body(at), &sizes);
                self.is_called[at] |= sizes[at] > SMALL;
            }
        }
    }

    /// How long its code will be, about.
    fn size(&self, node: &Node, sizes: &[usize]) -> usize {
        let sum = |nodes: &[Node]| -> usize {
            nodes.iter().map(|node| self.size(node, sizes) + 1).fold(0, usize::saturating_add)
        };
        match node {
            Node::Literal(all) => all.len(),
            Node::Class(_) | Node::Token { .. } => 1,
            Node::Rule(rule) => {
                if self.is_called[*rule] {
                    1
                } else {
                    sizes[*rule].max(1)
                }
            }
            Node::Sequence(nodes) | Node::Choice(nodes) => sum(nodes),
            Node::Repeat { node, least, most } => {
                let times = most.unwrap_or(*least).max(1) as usize + 1;
                self.size(node, sizes).saturating_add(1).saturating_mul(times)
            }
        }
    }

    fn write(&mut self, node: &'a Node, at: usize) -> Result<()> {
        match node {
            Node::Literal(all) => all.iter().try_for_each(|&character| {
                let class = self.class(&Class::one(character));
                self.push(Op::Char(class), at)
            }),
            Node::Class(class) => {
                let class = self.class(class);
                self.push(Op::Char(class), at)
            }
            &Node::Token { id, is_negated: true } => self.push(Op::NotToken(id), at),
            &Node::Token { id, is_negated: false } => self.push(Op::Token(id), at),
            Node::Rule(rule) if self.is_called[*rule] => self.push(Op::Call(*rule as u32), at),
            Node::Rule(rule) => self.write(self.body(*rule), at),
            Node::Sequence(nodes) => nodes.iter().try_for_each(|node| self.write(node, at)),
            Node::Choice(ways) => self.write_choice(ways, at),
            Node::Repeat { node, least, most } => self.write_repetition(node, *least, *most, at),
        }
    }

    fn write_choice(&mut self, ways: &'a [Node], at: usize) -> Result<()> {
        let mut jumps = Vec::new();
        let (last, others) = ways.split_last().expect("a choice has ways");
        for way in others {
            let split = self.push_open(Op::Split(0), at)?;
            self.write(way, at)?;
            jumps.push(self.push_open(Op::Jump(0), at)?);
            self.program.ops[split] = Op::Split(self.here());
        }
        self.write(last, at)?;
        for jump in jumps {
            self.program.ops[jump] = Op::Jump(self.here());
        }
        Ok(())
    }

    fn write_repetition(
        &mut self,
        node: &'a Node,
        least: u64,
        most: Option<u64>,
        at: usize,
    ) -> Result<()> {
        for _ in 0..least {
            self.write(node, at)?;
        }
        let Some(most) = most else {
            let begin = self.here();
            let split = self.push_open(Op::Split(0), at)?;
            self.write(node, at)?;
            self.push(Op::Jump(begin), at)?;
            self.program.ops[split] = Op::Split(self.here());
            return Ok(());
        };
        let mut splits = Vec::new();
        for _ in least..most {
            splits.push(self.push_open(Op::Split(0), at)?);
            self.write(node, at)?;
        }
        for split in splits {
            self.program.ops[split] = Op::Split(self.here());
        }
        Ok(())
    }

    fn body(&self, rule: usize) -> &'a Node {
        self.rules[rule].body.as_ref().expect("all rules are defined")
    }

    fn class(&mut self, class: &Class) -> u32 {
        let classes = &mut self.program.classes;
        let known = classes.iter().rev().take(64).position(|known| known == class);
        if let Some(back) = known {
            return (classes.len() - 1 - back) as u32;
        }
        classes.push(class.clone());
        classes.len() as u32 - 1
    }

    fn here(&self) -> u32 {
        self.program.ops.len() as u32
    }

    fn push(&mut self, op: Op, at: usize) -> Result<()> {
        if self.program.ops.len() == MOST_OPS {
            let what = format!("with its repetitions it has more than {MOST_OPS} elements");
            return Err(refusal(self.text, at, what));
        }
        self.program.ops.push(op);
        Ok(())
    }

    /// Its target is filled in later.
    fn push_open(&mut self, op: Op, at: usize) -> Result<usize> {
        self.push(op, at)?;
        Ok(self.program.ops.len() - 1)
    }
}
