//! Sets of characters.

/// Ranges in ascending order that do not touch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Class(Box<[(u32, u32)]>);

const LAST: u32 = char::MAX as u32;

impl Class {
    pub fn new(mut ranges: Vec<(u32, u32)>, is_negated: bool) -> Class {
        ranges.retain(|(first, last)| first <= last);
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => {
                    before.1 = before.1.max(last);
                }
                _ => merged.push((first, last)),
            }
        }
        Class(if is_negated { others(&merged) } else { merged }.into())
    }

    pub fn one(character: u32) -> Class {
        Class(Box::new([(character, character)]))
    }

    pub fn any() -> Class {
        Class(Box::new([(0, LAST)]))
    }

    /// Whether one from `first` to `last` is in it.
    pub fn has_any(&self, first: u32, last: u32) -> bool {
        let after = self.0.partition_point(|range| range.1 < first);
        self.0.get(after).is_some_and(|range| range.0 <= last)
    }
}

fn others(ranges: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let mut others = Vec::with_capacity(ranges.len() + 1);
    let mut next = 0;
    for &(first, last) in ranges {
        if next < first {
            others.push((next, first - 1));
        }
        next = last.saturating_add(1);
    }
    if next <= LAST {
        others.push((next, LAST));
    }
    others
}
