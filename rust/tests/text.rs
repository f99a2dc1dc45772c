//! Bytes becoming text: no character is cut, no byte is lost, no part of a stop string leaks.

use tabagent_model::context::TextStream;

/// What the pieces said one by one, and the stop string that came.
fn told(chunks: &[&[u8]], stops: &[&str]) -> (Vec<String>, Option<String>) {
    let mut stream = TextStream::new(stops.iter().map(ToString::to_string).collect());
    let mut pieces = Vec::new();
    for chunk in chunks {
        let (piece, stop) = stream.push(chunk);
        pieces.push(piece);
        if stop.is_some() {
            return (pieces, stop);
        }
    }
    pieces.push(stream.finish());
    (pieces, None)
}

fn pieces<const N: usize>(pieces: [&str; N]) -> Vec<String> {
    pieces.map(String::from).to_vec()
}

#[test]
fn a_character_over_several_tokens_comes_whole() {
    let family = "👨‍👩‍👧".as_bytes();
    let (head, tail) = family.split_at(2);
    let expected = pieces(["", "👨‍👩‍👧", "!", ""]);
    assert_eq!(told(&[head, tail, b"!"], &[]), (expected, None));
}

#[test]
fn bytes_that_become_no_character_are_replaced_once_at_the_end() {
    let expected = pieces(["a", "", "\u{FFFD}"]);
    assert_eq!(told(&[b"a\xf0\x9f", b"\x98"], &[]), (expected, None));
}

#[test]
fn bytes_that_can_become_no_character_are_replaced_at_once() {
    let expected = pieces(["a\u{FFFD}", "\u{FFFD}b", ""]);
    assert_eq!(told(&[b"a\xff", b"\xf0\x9fb"], &[]), (expected, None));
}

#[test]
fn a_stop_string_over_several_tokens_does_not_leak() {
    let expected = pieces(["Hello", "", ""]);
    assert_eq!(
        told(&[b"Hello\n", b"Us", b"er: hi"], &["\nUser:"]),
        (expected, Some("\nUser:".into()))
    );
}

#[test]
fn what_only_looked_like_a_stop_string_is_let_go() {
    let expected = pieces(["", "", "\nUseful", ""]);
    assert_eq!(told(&[b"\nU", b"se", b"ful"], &["\nUser:"]), (expected, None));
}

#[test]
fn what_still_looks_like_a_stop_string_at_the_end_is_text() {
    assert_eq!(told(&[b"END", b" O"], &["END OF"]), (pieces(["", "", "END O"]), None));
}

#[test]
fn a_stop_string_that_begins_within_itself_is_found() {
    assert_eq!(told(&[b"aa", b"a", b"b"], &["aab"]), (pieces(["", "a", ""]), Some("aab".into())));
}

#[test]
fn the_first_of_several_stop_strings_counts() {
    let found = told(&[b"one two three"], &["three", "two", "two t"]);
    assert_eq!(found, (pieces(["one "]), Some("two".into())));
}

#[test]
fn a_stop_string_may_be_one_character_of_several_bytes() {
    let found = told(&[b"stop\xe2", b"\x80", b"\xa6 or not"], &["…"]);
    assert_eq!(found, (pieces(["stop", "", ""]), Some("…".into())));
}

#[test]
fn nothing_comes_of_nothing() {
    assert_eq!(told(&[], &[]), (pieces([""]), None));
    assert_eq!(told(&[b"", b""], &["x"]), (pieces(["", "", ""]), None));
}

/// The same, on the whole: after each chunk everything is decoded again and searched from the start.
fn reference(chunks: &[&[u8]], stops: &[String]) -> (String, Option<String>) {
    let mut bytes = Vec::new();
    for chunk in chunks {
        bytes.extend_from_slice(chunk);
        let text = decoded_so_far(&bytes);
        let found = stops.iter().filter_map(|stop| Some((text.find(stop)?, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            return (text[..at].into(), Some(stop.clone()));
        }
    }
    (String::from_utf8_lossy(&bytes).into_owned(), None)
}

/// Without the bytes at the end that may still become a character.
fn decoded_so_far(bytes: &[u8]) -> String {
    let may_become = |tail: &[u8]| {
        // A beginning of a character: some bytes behind it make it whole.
        std::str::from_utf8(tail).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
    };
    let cut = (1..=3.min(bytes.len())).rev().map(|n| bytes.len() - n);
    let end = cut.into_iter().find(|&at| may_become(&bytes[at..])).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Up to where a stop string may have begun.
fn certain<'a>(text: &'a str, stops: &[String]) -> &'a str {
    let may_begin = |at: &usize| stops.iter().any(|stop| stop.starts_with(&text[*at..]));
    let at = text.char_indices().map(|(at, _)| at).find(may_begin);
    &text[..at.unwrap_or(text.len())]
}

/// Text with characters of every length, pieces of stop strings, and now and then broken bytes.
fn random_bytes(dice: &mut fastrand::Rng, alphabet: &[&str], is_broken: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..dice.usize(0..40) {
        match dice.u32(0..8) {
            0 if is_broken => bytes.push(dice.u8(..)),
            1 if is_broken => {
                let whole = dice.choice(alphabet).unwrap().as_bytes();
                bytes.extend_from_slice(&whole[..dice.usize(0..=whole.len())]);
            }
            2 => bytes.extend_from_slice(dice.char(..).to_string().as_bytes()),
            _ => bytes.extend_from_slice(dice.choice(alphabet).unwrap().as_bytes()),
        }
    }
    bytes
}

fn random_chunks<'a>(dice: &mut fastrand::Rng, mut bytes: &'a [u8]) -> Vec<&'a [u8]> {
    let mut chunks = Vec::new();
    let longest = dice.usize(1..9);
    while !bytes.is_empty() {
        let (chunk, rest) = bytes.split_at(dice.usize(0..=longest.min(bytes.len())));
        chunks.push(chunk);
        bytes = rest;
    }
    chunks
}

#[test]
fn any_text_in_any_pieces_is_the_same_text() {
    const ALPHABET: [&str; 10] =
        ["a", "b", "ab", "é", "…", "字", "👨‍👩‍👧", "e\u{301}", "\u{FFFD}", "\0"];
    let mut num_stopped = 0;
    for seed in 0..20_000 {
        let mut dice = fastrand::Rng::with_seed(seed);
        let is_broken = dice.bool();
        let bytes = random_bytes(&mut dice, &ALPHABET, is_broken);
        let stops: Vec<String> = (0..dice.usize(0..4))
            .map(|_| (0..dice.usize(1..5)).map(|_| dice.choice(ALPHABET).unwrap()).collect())
            .collect();
        let chunks = random_chunks(&mut dice, &bytes);
        let (whole, stop) = reference(&chunks, &stops);
        let borrowed: Vec<&str> = stops.iter().map(String::as_str).collect();
        let (pieces, found) = told(&chunks, &borrowed);
        assert_eq!((pieces.concat(), found), (whole, stop.clone()), "seed {seed}");
        num_stopped += usize::from(stop.is_some());

        // After each chunk all is shown that cannot begin a stop string any more, and only that.
        let (mut shown, mut seen) = (String::new(), Vec::new());
        let before_the_end = &pieces[..pieces.len() - 1];
        for (piece, chunk) in before_the_end.iter().zip(&chunks) {
            shown.push_str(piece);
            seen.extend_from_slice(chunk);
            assert_eq!(shown, certain(&decoded_so_far(&seen), &stops), "seed {seed}");
        }
    }
    assert!((2_000..18_000).contains(&num_stopped), "{num_stopped}");
}
