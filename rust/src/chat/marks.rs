//! Where a tokenizer could read control tokens in a text, and how a text is cut so that it does not.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use crate::model::Vocabulary;

/// A place where the tokenizer could read a control token, or one that was added to the vocabulary.
pub(super) struct Mark {
    pub(super) place: Range<usize>,
    pub(super) is_added: bool,
}

/// Texts that a tokenizer takes for control tokens, by length.
pub(super) struct Marks {
    control: Vec<HashSet<Vec<u8>>>,
    first_bytes: [bool; 256],
    pub(super) added: Vec<Vec<u8>>,
}

impl Marks {
    pub(super) fn of(vocabulary: &Vocabulary) -> Marks {
        let (texts, added) = vocabulary.marks();
        let mut marks = Marks { control: Vec::new(), first_bytes: [false; 256], added };
        for text in texts.iter().chain(&marks.added) {
            marks.first_bytes[text[0] as usize] = true;
        }
        for text in texts {
            marks.control.resize_with(marks.control.len().max(text.len() + 1), HashSet::new);
            marks.control[text.len()].insert(text);
        }
        marks
    }

    /// Every mark in a text; they may overlap.
    pub(super) fn find(&self, text: &str, added: &HashSet<Vec<u8>>) -> Vec<Mark> {
        let bytes = text.as_bytes();
        let starts = (0..bytes.len()).filter(|&at| self.first_bytes[bytes[at] as usize]);
        starts
            .flat_map(|at| {
                let rest = &bytes[at..];
                let control = self.control.iter().enumerate().filter(move |(length, texts)| {
                    !texts.is_empty() && *length <= rest.len() && texts.contains(&rest[..*length])
                });
                let added = added.iter().filter(move |text| rest.starts_with(text));
                let control = control.map(|(length, _)| (length, false));
                control
                    .chain(added.map(|text| (text.len(), true)))
                    .map(move |(length, is_added)| Mark { place: at..at + length, is_added })
            })
            .collect()
    }
}

/// The text in segments, and whether control tokens are read in them: the template's own marks, and
/// what lies between two of them, so that words stay whole. An added token is one wherever it is
/// written, so that one is cut behind its first character.
pub(super) fn segments(
    text: &str,
    written: &[Mark],
    mut own: Vec<Mark>,
) -> Vec<(Range<usize>, bool)> {
    let cut = |mark: &Mark| {
        let first = text[mark.place.start..].chars().next().map_or(0, char::len_utf8);
        mark.place.start + first
    };
    let cuts: BTreeSet<_> = written.iter().filter(|mark| mark.is_added).map(cut).collect();
    own.sort_by_key(|mark| (mark.place.start, Reverse(mark.place.end)));
    own.push(Mark { place: text.len()..text.len(), is_added: false });
    let (mut segments, mut from) = (Vec::new(), 0);
    for Mark { place, .. } in own.into_iter() {
        if place.start < from {
            continue; // inside a longer one
        }
        for &cut in cuts.range(from + 1..place.start.max(from + 1)) {
            segments.push((from..cut, false));
            from = cut;
        }
        segments.push((from..place.start, false));
        from = place.end;
        segments.push((place, true));
    }
    segments.retain(|(range, _)| !range.is_empty());
    segments
}
