//! Bytes becoming text: characters are never cut, and a stop string never leaks in part.

/// Takes a sequence's bytes token by token and lets go of what is certainly text.
///
///     bytes: …[ held: may begin a stop string ][ partial: may become a character ]
#[derive(Default)]
pub struct TextStream {
    stops: Vec<String>,
    held: String,
    partial: Vec<u8>,
}

impl TextStream {
    pub fn new(stops: Vec<String>) -> TextStream {
        TextStream { stops, ..TextStream::default() }
    }

    /// What can be shown now, and the stop string that ends the text, if one came.
    pub fn push(&mut self, bytes: &[u8]) -> (String, Option<String>) {
        self.partial.extend_from_slice(bytes);
        self.decode();
        if self.stops.is_empty() {
            return (std::mem::take(&mut self.held), None);
        }
        let first = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop)));
        if let Some((at, stop)) = first.min_by_key(|(at, _)| *at) {
            let stop = stop.clone();
            self.held.truncate(at);
            self.partial.clear();
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let keep = self.longest_beginning();
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What is left when no stop string can come any more.
    pub fn finish(&mut self) -> String {
        let mut rest = std::mem::take(&mut self.held);
        rest.push_str(&String::from_utf8_lossy(&std::mem::take(&mut self.partial)));
        rest
    }

    /// Moves whole characters from `partial` to `held`; bytes that can never make one become
    /// U+FFFD, bytes that still can are kept.
    fn decode(&mut self) {
        let mut bytes = std::mem::take(&mut self.partial);
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    self.held.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid) = error.error_len() else {
                        rest = after;
                        break;
                    };
                    self.held.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[invalid..];
                }
            }
        }
        let kept = bytes.len() - rest.len();
        bytes.drain(..kept);
        self.partial = bytes;
    }

    /// The length of the longest end of `held` that some stop string begins with.
    fn longest_beginning(&self) -> usize {
        let ends = self.held.char_indices().map(|(at, _)| &self.held[at..]);
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        ends.skip_while(|end| end.len() >= longest)
            .find(|end| self.stops.iter().any(|stop| stop.starts_with(end)))
            .map_or(0, str::len)
    }
}
