//! Runs a program of `gbnf` over bytes, on all ways at once.
//!
//! ```text
//! state   where the text may be: places in the program, each with its node; interned
//! node    where to go on after a rule, and that place's own node: the callers, as one shared tree
//! ```
//!
//! Two ways that expect the same are one state, however they came there, so an ambiguous grammar costs
//! no more than its places. What a byte does to a state is remembered: in text that repeats itself the
//! machine becomes a table.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use llguidance::toktrie::{Recognizer, SimpleVob};

use super::gbnf::{Op, Program};
use super::lexicon::Lexicon;

/// A place in the program, and whom to go back to.
type Item = (u32, u32);
type Fast = BuildHasherDefault<Mix>;

/// The place behind the grammar's end, and the only one to go on there.
const ACCEPT: u32 = u32::MAX;
const REFUSED: u32 = u32::MAX;

/// Steps of the program for one token or one mask: tenths of a second.
const MOST_WORK: u64 = 5_000_000;
/// States to keep between two tokens: some ten megabytes.
const MOST_STATES: usize = 20_000;
const MOST_STATES_AT_ONCE: usize = 200_000;
/// Some twenty kilobytes each.
const MOST_MASKS: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    items: Box<[Item]>,
    is_accepting: bool,
    partial: Partial,
}

/// The beginning of a character that takes several bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Partial {
    value: u32,
    missing: u8,
    length: u8,
}

#[derive(Clone)]
pub struct Machine {
    program: Arc<Program>,
    states: Vec<Arc<State>>,
    known_states: HashMap<Arc<State>, u32, Fast>,
    /// Where to go on from each node.
    nodes: Vec<Arc<[Item]>>,
    known_nodes: HashMap<Arc<[Item]>, u32, Fast>,
    next: HashMap<(u32, u8), u32, Fast>,
    /// What the tree of tokens has for a state: in JSON the same few come again and again.
    masks: HashMap<u32, Arc<SimpleVob>, Fast>,
    now: u32,
    work: u64,
}

/// The grammar has too many ways to read the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooAmbiguous;

impl Machine {
    pub fn new(program: Arc<Program>) -> Result<Machine, TooAmbiguous> {
        let mut machine = Machine {
            program,
            states: Vec::new(),
            known_states: HashMap::default(),
            nodes: Vec::new(),
            known_nodes: HashMap::default(),
            next: HashMap::default(),
            masks: HashMap::default(),
            now: 0,
            work: 0,
        };
        let bottom = machine.node(vec![(ACCEPT, 0)]);
        let root = machine.program.starts[machine.program.root as usize];
        machine.now = machine.close(vec![(root, bottom)])?.ok_or(TooAmbiguous)?;
        Ok(machine)
    }

    pub fn can_end(&self) -> bool {
        self.state(self.now).is_accepting
    }

    /// Nothing can come any more.
    pub fn is_finished(&self) -> bool {
        self.can_end() && self.state(self.now).items.is_empty()
    }

    pub fn allows(&mut self, token: i32, text: &[u8]) -> Result<bool, TooAmbiguous> {
        self.begin();
        Ok(self.after(token, text)?.is_some())
    }

    /// False: it cannot come here, and nothing has changed.
    pub fn accept(&mut self, token: i32, text: &[u8]) -> Result<bool, TooAmbiguous> {
        self.begin();
        let after = self.after(token, text)?;
        self.now = after.unwrap_or(self.now);
        Ok(after.is_some())
    }

    /// Adds the tokens that can come. Of the control tokens only those are looked at that are written
    /// out in the answer, and those that the grammar names.
    pub fn allow(
        &mut self,
        lexicon: &Lexicon,
        written: &[i32],
        allowed: &mut SimpleVob,
    ) -> Result<(), TooAmbiguous> {
        self.begin();
        allowed.or(&*self.mask(lexicon)?);
        let state = self.state(self.now).clone();
        for &(place, _) in &state.items {
            match self.program.ops[place as usize] {
                Op::Token(token) => allowed.allow_token(token as u32),
                Op::NotToken(token) => {
                    let others = lexicon.ordinary().filter(|other| *other != token);
                    others.for_each(|other| allowed.allow_token(other as u32));
                }
                _ => {}
            }
        }
        for &token in written {
            if self.after(token, lexicon.text(token))?.is_some() {
                allowed.allow_token(token as u32);
            }
        }
        Ok(())
    }

    fn mask(&mut self, lexicon: &Lexicon) -> Result<Arc<SimpleVob>, TooAmbiguous> {
        if let Some(known) = self.masks.get(&self.now) {
            return Ok(known.clone());
        }
        let mut mask = lexicon.tree().alloc_token_set();
        let now = self.now;
        let mut walk = Walk { path: vec![now], is_lost: false, machine: self };
        lexicon.tree().add_bias(&mut walk, &mut mask, &[]);
        if walk.is_lost {
            return Err(TooAmbiguous);
        }
        if self.masks.len() == MOST_MASKS {
            self.masks.clear();
        }
        let mask = Arc::new(mask);
        self.masks.insert(now, mask.clone());
        Ok(mask)
    }

    /// The state behind a token: as one that the grammar names, and as its text.
    fn after(&mut self, token: i32, text: &[u8]) -> Result<Option<u32>, TooAmbiguous> {
        let before = self.state(self.now).clone();
        let mut named = Vec::new();
        for &(place, node) in &before.items {
            let is_it = match self.program.ops[place as usize] {
                Op::Token(id) => id == token,
                Op::NotToken(id) => id != token && !text.is_empty(),
                _ => false,
            };
            if is_it && before.partial.missing == 0 {
                named.push((place + 1, node));
            }
        }
        let mut spelled = Some(self.now).filter(|_| !text.is_empty());
        for &byte in text {
            spelled = match spelled {
                Some(state) => self.step(state, byte)?,
                None => break,
            };
        }
        if named.is_empty() {
            return Ok(spelled);
        }
        let named = self.close(named)?;
        let (Some(one), Some(other)) = (spelled, named) else { return Ok(spelled.or(named)) };
        let (one, other) = (self.state(one).clone(), self.state(other).clone());
        if one.partial.missing > 0 {
            return Ok(named); // what is half a character is not also a whole token
        }
        let items: Vec<Item> = one.items.iter().chain(&other.items).copied().collect();
        Ok(Some(self.intern(items, one.is_accepting || other.is_accepting, Partial::default())))
    }

    fn step(&mut self, state: u32, byte: u8) -> Result<Option<u32>, TooAmbiguous> {
        if let Some(&next) = self.next.get(&(state, byte)) {
            return Ok(Some(next).filter(|next| *next != REFUSED));
        }
        let next = self.compute(state, byte)?;
        self.next.insert((state, byte), next.unwrap_or(REFUSED));
        Ok(next)
    }

    fn compute(&mut self, state: u32, byte: u8) -> Result<Option<u32>, TooAmbiguous> {
        let state = self.state(state).clone();
        let Some(partial) = state.partial.then(byte) else { return Ok(None) };
        let (first, last) = partial.range();
        let program = self.program.clone();
        let fits = |&(place, _): &Item| match program.ops[place as usize] {
            Op::Char(class) => program.classes[class as usize].has_any(first, last),
            _ => false,
        };
        let fitting = state.items.iter().copied().filter(fits);
        self.work += state.items.len() as u64;
        if partial.missing == 0 {
            return self.close(fitting.map(|(place, node)| (place + 1, node)).collect());
        }
        let fitting: Vec<Item> = fitting.collect();
        Ok((!fitting.is_empty()).then(|| self.intern(fitting, false, partial)))
    }

    /// The state of all places that are reached from these without a character; none: it is a dead end.
    fn close(&mut self, items: Vec<Item>) -> Result<Option<u32>, TooAmbiguous> {
        if items.is_empty() {
            return Ok(None);
        }
        let program = self.program.clone();
        let mut closing = Closing::new(&program, &self.nodes);
        items.into_iter().for_each(|(place, node)| closing.visit(place, Callers::Old(node)));
        while let Some((place, callers)) = closing.todo.pop() {
            self.work += 1;
            if self.work > MOST_WORK {
                return Err(TooAmbiguous);
            }
            closing.run(place, callers);
        }
        let Closing { found, calls, is_accepting, .. } = closing;
        let mut finals = vec![None; calls.len()];
        let mut items = Vec::with_capacity(found.len());
        for (place, callers) in found {
            items.push((place, self.settle(callers, &calls, &mut finals)));
        }
        if items.is_empty() && !is_accepting {
            return Ok(None);
        }
        if self.states.len() > MOST_STATES_AT_ONCE {
            return Err(TooAmbiguous);
        }
        Ok(Some(self.intern(items, is_accepting, Partial::default())))
    }

    /// The interned node of a rule that was called while closing. Without left recursion the calls of
    /// one closing do not go in circles.
    fn settle(&mut self, callers: Callers, calls: &[Call], finals: &mut [Option<u32>]) -> u32 {
        let index = match callers {
            Callers::Old(node) => return node,
            Callers::New(index) => index,
        };
        if let Some(node) = finals[index] {
            return node;
        }
        let mut returns = Vec::new();
        for &(place, callers) in &calls[index].returns {
            let node = self.settle(callers, calls, finals);
            match place {
                Some(place) => returns.push((place, node)),
                None => returns.extend_from_slice(&self.nodes[node as usize]),
            }
        }
        let node = self.node(returns);
        finals[index] = Some(node);
        node
    }

    fn node(&mut self, mut returns: Vec<Item>) -> u32 {
        returns.sort_unstable();
        returns.dedup();
        let returns: Arc<[Item]> = returns.into();
        *self.known_nodes.entry(returns).or_insert_with_key(|returns| {
            self.nodes.push(returns.clone());
            self.nodes.len() as u32 - 1
        })
    }

    fn intern(&mut self, mut items: Vec<Item>, is_accepting: bool, partial: Partial) -> u32 {
        items.sort_unstable();
        items.dedup();
        let state = Arc::new(State { items: items.into(), is_accepting, partial });
        *self.known_states.entry(state).or_insert_with_key(|state| {
            self.states.push(state.clone());
            self.states.len() as u32 - 1
        })
    }

    /// Before each token: forgets what is not needed any more, where there is much of it.
    fn begin(&mut self) {
        self.work = 0;
        if self.states.len() > MOST_STATES || self.nodes.len() > MOST_STATES {
            let State { items, is_accepting, partial } = (*self.state(self.now).clone()).clone();
            let old = std::mem::take(&mut self.nodes);
            self.known_nodes.clear();
            self.states.clear();
            self.known_states.clear();
            self.next.clear();
            self.masks.clear();
            let mut moved = HashMap::default();
            let items = items.iter().map(|&(at, node)| (at, self.keep(node, &old, &mut moved)));
            let items = items.collect();
            self.now = self.intern(items, is_accepting, partial);
        }
    }

    /// Callers are older than those whom they call, so the oldest can be moved first.
    fn keep(&mut self, node: u32, old: &[Arc<[Item]>], moved: &mut HashMap<u32, u32, Fast>) -> u32 {
        let mut wanted = std::collections::BTreeSet::from([node]);
        let mut todo = vec![node];
        while let Some(node) = todo.pop() {
            let parents = old[node as usize].iter().filter(|(place, _)| *place != ACCEPT);
            for &(_, parent) in parents {
                if !moved.contains_key(&parent) && wanted.insert(parent) {
                    todo.push(parent);
                }
            }
        }
        for node in wanted {
            let parent = |&(place, of): &Item| match place {
                ACCEPT => (ACCEPT, 0),
                _ => (place, moved[&of]),
            };
            let returns = old[node as usize].iter().map(parent).collect();
            let new = self.node(returns);
            moved.insert(node, new);
        }
        moved[&node]
    }

    fn state(&self, state: u32) -> &Arc<State> {
        &self.states[state as usize]
    }
}

impl Partial {
    /// With one more byte; none where that is not UTF-8.
    fn then(self, byte: u8) -> Option<Partial> {
        let next = match (self.missing, byte) {
            (0, 0x01..=0x7f) => Partial { value: byte.into(), missing: 0, length: 1 },
            (0, 0xc2..=0xdf) => Partial { value: u32::from(byte & 0x1f), missing: 1, length: 2 },
            (0, 0xe0..=0xef) => Partial { value: u32::from(byte & 0x0f), missing: 2, length: 3 },
            (0, 0xf0..=0xf4) => Partial { value: u32::from(byte & 0x07), missing: 3, length: 4 },
            (1.., 0x80..=0xbf) => Partial {
                value: self.value << 6 | u32::from(byte & 0x3f),
                missing: self.missing - 1,
                length: self.length,
            },
            _ => return None,
        };
        let (first, last) = next.range();
        (first <= last && !(first >= 0xd800 && last <= 0xdfff)).then_some(next)
    }

    /// The characters that begin like this.
    fn range(self) -> (u32, u32) {
        let bits = 6 * u32::from(self.missing);
        let smallest = match self.length {
            2 => 0x80,
            3 => 0x800,
            4 => 0x1_0000,
            _ => 1,
        };
        let first = self.value << bits;
        let last = first | ((1 << bits) - 1);
        (first.max(smallest), last.min(char::MAX.into()))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Callers {
    /// A node that is interned.
    Old(u32),
    /// A rule that was called while closing.
    New(usize),
}

/// A rule that is called at one position of the text, from however many places.
struct Call {
    /// Where to go on; without a place: where that one goes on.
    returns: Vec<(Option<u32>, Callers)>,
    /// It came to its end already, without any text.
    is_over: bool,
}

/// Follows a program until every way waits for a character or a token.
struct Closing<'a> {
    program: &'a Program,
    nodes: &'a [Arc<[Item]>],
    todo: Vec<(u32, Callers)>,
    seen: HashSet<(u32, Callers), Fast>,
    /// By rule.
    called: HashMap<u32, usize, Fast>,
    calls: Vec<Call>,
    /// Where the ways wait.
    found: Vec<(u32, Callers)>,
    is_accepting: bool,
}

impl<'a> Closing<'a> {
    fn new(program: &'a Program, nodes: &'a [Arc<[Item]>]) -> Closing<'a> {
        Closing {
            program,
            nodes,
            todo: Vec::new(),
            seen: HashSet::default(),
            called: HashMap::default(),
            calls: Vec::new(),
            found: Vec::new(),
            is_accepting: false,
        }
    }

    fn visit(&mut self, place: u32, callers: Callers) {
        if place == ACCEPT {
            self.is_accepting = true;
        } else if self.seen.insert((place, callers)) {
            self.todo.push((place, callers));
        }
    }

    fn run(&mut self, place: u32, callers: Callers) {
        match self.program.ops[place as usize] {
            Op::Char(_) | Op::Token(_) | Op::NotToken(_) => self.found.push((place, callers)),
            Op::Jump(to) => self.visit(to, callers),
            Op::Split(to) => {
                self.visit(place + 1, callers);
                self.visit(to, callers);
            }
            Op::Call(rule) => self.call(rule, place + 1, callers),
            Op::Return => self.go_back(callers),
        }
    }

    fn call(&mut self, rule: u32, back: u32, callers: Callers) {
        let index = *self.called.entry(rule).or_insert_with(|| {
            self.calls.push(Call { returns: Vec::new(), is_over: false });
            self.calls.len() - 1
        });
        // Whoever has nothing left to do is left out, so that a rule may end with itself for ever.
        let back = (!self.is_return(back)).then_some(back);
        if !self.calls[index].returns.contains(&(back, callers)) {
            self.calls[index].returns.push((back, callers));
            if self.calls[index].is_over {
                self.resume(back, callers);
            }
        }
        self.visit(self.program.starts[rule as usize], Callers::New(index));
    }

    fn is_return(&self, mut place: u32) -> bool {
        loop {
            match self.program.ops[place as usize] {
                Op::Jump(to) if to > place => place = to,
                Op::Return => return true,
                _ => return false,
            }
        }
    }

    fn go_back(&mut self, callers: Callers) {
        match callers {
            Callers::Old(node) => {
                for &(place, node) in self.nodes[node as usize].iter() {
                    self.visit(place, Callers::Old(node));
                }
            }
            Callers::New(index) => {
                self.calls[index].is_over = true;
                for at in 0..self.calls[index].returns.len() {
                    let (back, callers) = self.calls[index].returns[at];
                    self.resume(back, callers);
                }
            }
        }
    }

    fn resume(&mut self, back: Option<u32>, callers: Callers) {
        match back {
            Some(place) => self.visit(place, callers),
            None => self.go_back(callers),
        }
    }
}

/// The machine as the tree of tokens walks it: one byte further, some bytes back.
struct Walk<'a> {
    machine: &'a mut Machine,
    path: Vec<u32>,
    is_lost: bool,
}

impl Recognizer for Walk<'_> {
    fn try_push_byte(&mut self, byte: u8) -> bool {
        if self.is_lost {
            return false;
        }
        let now = *self.path.last().expect("a walk begins somewhere");
        match self.machine.step(now, byte) {
            Ok(Some(next)) => self.path.push(next),
            Ok(None) => return false,
            Err(TooAmbiguous) => {
                self.is_lost = true;
                return false;
            }
        }
        true
    }

    fn pop_bytes(&mut self, count: usize) {
        self.path.truncate(self.path.len() - count);
    }

    fn collapse(&mut self) {
        self.path.drain(..self.path.len() - 1);
    }

    fn trie_finished(&mut self) {
        self.path.truncate(1);
    }
}

/// Multiplies and rotates: what is hashed here are small numbers of our own.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(word.into());
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u8(byte));
    }

    fn finish(&self) -> u64 {
        self.0.rotate_left(26)
    }
}
