//! Constraints over a vocabulary of single bytes and a few words: what they let through, what they
//! refuse, and that nothing anybody can write takes long.

use std::ffi::CString;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tabagent_model::config::{Constraint, GenerationConfig, Syntax, Trigger};
use tabagent_model::constraint::{Constraints, Guide, Lexicon, Verdict, llama_grammar};
use tabagent_model::context::Sampler;
use tabagent_model::error::Error;

/// Behind the 256 bytes.
const END: i32 = 256;
const THINK_END: i32 = 257;
const CALL: i32 = 258;
const WORDS: [&str; 8] = ["hello", "tool", "\":", "{\"", "true", "é", "    ", "aaaaaaaaaaaaaaaa"];

fn constraints() -> Constraints {
    let mut words: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    words[255].clear(); // no text has it, and it marks control tokens
    words.extend([&b"\xff<end>"[..], b"\xff</think>", b"\xff<call>"].map(<[u8]>::to_vec));
    words.extend(WORDS.map(|word| word.as_bytes().to_vec()));
    Constraints::with_lexicon(Lexicon::new(&words, vec![END]))
}

fn asked(syntax: Syntax, text: &str) -> Result<Guide, Error> {
    constraints().guide(&Constraint::new(syntax, text), &[], &[], None)
}

fn guide(syntax: Syntax, text: &str) -> Guide {
    asked(syntax, text).unwrap()
}

fn word(word: &str) -> i32 {
    259 + WORDS.iter().position(|known| *known == word).unwrap() as i32
}

/// False at the first byte that is refused; what is allowed is also in the mask, and only that.
fn takes(guide: &mut Guide, text: impl AsRef<[u8]>) -> bool {
    text.as_ref().iter().all(|&byte| {
        let token = i32::from(byte);
        let is_allowed = guide.allows(token).unwrap();
        if is_allowed {
            guide.accept(token).unwrap();
        }
        is_allowed
    })
}

/// As llama.cpp's verdict.
fn verdict(mut guide: Guide, text: &str) -> Verdict {
    match takes(&mut guide, text) {
        false => Verdict::NoMatch,
        true if guide.allows(END).unwrap() => Verdict::Matches,
        true => Verdict::Begins,
    }
}

fn refusal(syntax: Syntax, text: &str) -> (String, Option<(usize, usize)>) {
    let begun = Instant::now();
    let error = asked(syntax, text).err();
    assert!(begun.elapsed() < Duration::from_secs(5), "it took {:?}", begun.elapsed());
    match error {
        Some(Error::Grammar { what, position, .. }) => (what, position),
        other => panic!("{text:.60}: {other:?}"),
    }
}

#[test]
fn a_schema_lets_through_what_it_describes_and_nothing_else() {
    let schema = r#"{"type": "object", "required": ["name"], "additionalProperties": false,
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}}}"#;
    for (text, expected) in [
        (r#"{"name":"Ann"}"#, Verdict::Matches),
        (r#"{"name": "Ann", "age": -4}"#, Verdict::Matches),
        (r#"{"name":"Ann","age""#, Verdict::Begins),
        (r#"{"age":4}"#, Verdict::NoMatch),
        (r#"{"name":"Ann","age":4.5}"#, Verdict::NoMatch),
        (r#"{"name":"toolong"#, Verdict::NoMatch),
        ("", Verdict::Begins),
        (" {", Verdict::NoMatch),
    ] {
        assert_eq!(verdict(guide(Syntax::JsonSchema, schema), text), expected, "{text}");
    }
}

#[test]
fn a_whole_object_is_the_end_and_a_number_may_go_on() {
    let mut object = guide(Syntax::JsonSchema, r#"{"type": "object", "maxProperties": 0}"#);
    assert!(takes(&mut object, "{"));
    assert!(!object.is_finished());
    assert!(takes(&mut object, "}"));
    assert!(object.is_finished());

    let mut number = guide(Syntax::JsonSchema, r#"{"type": "integer"}"#);
    assert!(takes(&mut number, "12"));
    assert!(number.allows(END).unwrap() && !number.is_finished());
    assert!(takes(&mut number, "3"));
}

#[test]
fn between_the_parts_of_json_there_is_not_space_without_end() {
    let any = || guide(Syntax::JsonSchema, "{}");
    assert!(takes(&mut any(), "{\n    \"a\": [1, 2]\n}"));
    assert!(!takes(&mut any(), "{\n\n\n"));
    assert!(!takes(&mut any(), "{  "));
}

#[test]
fn a_regular_expression_and_a_lark_grammar_mean_what_they_mean_elsewhere() {
    let date = r"\d{4}-\d{2}-\d{2}|never";
    assert_eq!(verdict(guide(Syntax::Regex, date), "2026-11-21"), Verdict::Matches);
    assert_eq!(verdict(guide(Syntax::Regex, date), "nev"), Verdict::Begins);
    assert_eq!(verdict(guide(Syntax::Regex, date), "2026-1-"), Verdict::NoMatch);
    let sum = "start: NUMBER (\"+\" NUMBER)*\nNUMBER: /[0-9]+/";
    assert_eq!(verdict(guide(Syntax::Lark, sum), "1+22+3"), Verdict::Matches);
    assert_eq!(verdict(guide(Syntax::Lark, sum), "1+"), Verdict::Begins);
    assert_eq!(verdict(guide(Syntax::Lark, sum), "+"), Verdict::NoMatch);
}

#[test]
fn what_is_allowed_is_what_the_mask_has() {
    let json = r#"root ::= "{" ws "\"" [^"]* "\":" ws ("true" | [0-9]+) "}"
ws ::= [ \n]*"#;
    for (syntax, text) in [
        (Syntax::Gbnf, json),
        (Syntax::Gbnf, "root ::= \"é\" | [^a-z]{2,5} root | \"hello\""),
        (Syntax::Gbnf, "root ::= <[258]> \"a\"+ | !<[65]> \"b\""),
        (Syntax::JsonSchema, r#"{"type": "object", "additionalProperties": {"type": "boolean"}}"#),
        (Syntax::Regex, "(hel|hello|é+)*[a-z ]{3}"),
    ] {
        let mut guide = guide(syntax, text);
        let mut dice = fastrand::Rng::with_seed(7);
        for _ in 0..12 {
            let allowed = guide.allowed().unwrap();
            let tokens: Vec<i32> = (0..267).filter(|token| allowed.has(*token)).collect();
            let asked: Vec<i32> = (0..267).filter(|token| guide.allows(*token).unwrap()).collect();
            assert_eq!(tokens, asked, "{text}");
            let token = tokens[dice.usize(0..tokens.len())];
            guide.accept(token).unwrap();
            if token == END || guide.is_finished() {
                break;
            }
        }
    }
}

#[test]
fn a_mask_leaves_the_logits_of_those_who_may_come() {
    let mut row = vec![1.0; 267];
    guide(Syntax::Regex, "hello|a").allowed().unwrap().apply(&mut row);
    let left: Vec<i32> = (0..267).filter(|token| row[*token as usize] == 1.0).collect();
    assert_eq!(left, [i32::from(b'a'), i32::from(b'h'), word("hello")]);
}

#[test]
fn a_token_over_several_parts_of_a_grammar_is_one_step() {
    let mut guide = guide(
        Syntax::Gbnf,
        r#"root ::= open "a" "\":" "true"
open ::= "{" "\"""#,
    );
    for token in [word("{\""), i32::from(b'a'), word("\":"), word("true")] {
        assert!(guide.allows(token).unwrap());
        guide.accept(token).unwrap();
    }
    assert!(guide.is_finished());
}

#[test]
fn half_a_character_is_allowed_where_the_whole_one_may_follow() {
    let grammar = "root ::= [à-ü]+ | [^a]";
    let mut accents = guide(Syntax::Gbnf, grammar);
    assert!(takes(&mut accents, [0xc3]));
    assert!(!accents.allows(END).unwrap());
    assert!(takes(&mut accents, [0xa9]));
    assert!(accents.allows(END).unwrap());
    assert!(!takes(&mut guide(Syntax::Gbnf, "root ::= [à-ü]"), [0xc2]));
    // Not UTF-8: a byte that goes on with nothing, an overlong form, half of a surrogate pair.
    for bytes in [&[0x80][..], &[0xc0], &[0xe0, 0x80], &[0xed, 0xa0], &[0xf4, 0x90], &[0xff], &[0]]
    {
        assert!(!takes(&mut guide(Syntax::Gbnf, "root ::= ."), bytes), "{bytes:?}");
    }
}

#[test]
fn control_tokens_are_only_there_where_they_are_written_out_or_named() {
    let mut text = guide(Syntax::Gbnf, "root ::= .*");
    assert!(!text.allows(CALL).unwrap());
    let asked = Constraint::new(Syntax::Gbnf, "root ::= \"<call>\" \"a\"");
    let mut written = constraints().guide(&asked, &[CALL], &[], None).unwrap();
    assert!(written.allowed().unwrap().has(CALL));
    written.accept(CALL).unwrap();
    assert!(takes(&mut written, "a"));
    let mut named = guide(Syntax::Gbnf, "root ::= <[258]> \"a\"");
    assert!(named.allowed().unwrap().has(CALL) && !named.allows(i32::from(b'<')).unwrap());
    let (what, position) = refusal(Syntax::Gbnf, "root ::= <call>");
    assert_eq!(
        (what.as_str(), position),
        ("`<call>` is not one token of this model", Some((1, 10)))
    );
}

#[test]
fn a_stop_token_ends_the_answer_only_where_it_is_complete() {
    let asked = Constraint::new(Syntax::Regex, "ab?");
    let stop = i32::from(b'b');
    let mut guide = constraints().guide(&asked, &[], &[stop], None).unwrap();
    assert!(!guide.allows(stop).unwrap() && !guide.allows(END).unwrap());
    guide.accept(i32::from(b'a')).unwrap();
    assert!(guide.allows(stop).unwrap() && guide.allows(END).unwrap());
}

#[test]
fn a_constraint_begins_behind_a_text() {
    for syntax in [(Syntax::JsonSchema, r#"{"const": 17}"#), (Syntax::Gbnf, "root ::= \"17\"")] {
        let asked =
            Constraint { after: Some("</think>".into()), ..Constraint::new(syntax.0, syntax.1) };
        let guide = || constraints().guide(&asked, &[], &[], None).unwrap();
        let mut spelled = guide();
        assert!(takes(&mut spelled, "anything {} </thin is not </think"));
        let mut spelled = guide();
        assert!(takes(&mut spelled, "hm </think>"));
        assert!(!spelled.allows(i32::from(b'x')).unwrap());
        assert!(takes(&mut spelled, "17"));
        assert!(spelled.allows(END).unwrap());
        let mut as_token = guide();
        assert!(takes(&mut as_token, "hm"));
        assert!(!as_token.allows(END).unwrap());
        as_token.accept(THINK_END).unwrap();
        assert!(!as_token.allows(i32::from(b'2')).unwrap());
        assert!(takes(&mut as_token, "17"));
    }
}

#[test]
fn a_constraint_goes_on_from_what_stands_in_the_prompt() {
    let asked = |prefix: &str| Constraint {
        prefix: prefix.into(),
        ..Constraint::new(Syntax::Gbnf, "root ::= \"<call>\" \" \"? [0-9]+")
    };
    let mut guide = constraints().guide(&asked("<call>"), &[], &[], None).unwrap();
    assert!(!guide.allows(END).unwrap() && !guide.allows(i32::from(b'<')).unwrap());
    assert!(takes(&mut guide, " 42"));
    assert!(guide.allows(END).unwrap());
    let refused = constraints().guide(&asked("<cell>"), &[], &[], None).err().unwrap();
    assert!(refused.to_string().contains("does not go on from what stands in the prompt"));
}

#[test]
fn a_lazy_grammar_hears_its_trigger_and_what_came_with_it() {
    let call = "root ::= \"<call>\" [0-9]+ \";\"";
    let lazy = |triggers: &[Trigger]| {
        let asked = Constraint {
            lazy: true,
            triggers: triggers.to_vec(),
            ..Constraint::new(Syntax::Gbnf, call)
        };
        constraints().guide(&asked, &[CALL], &[], None).unwrap()
    };
    let word = Trigger::Word("<call>".into());
    let pattern = Trigger::Pattern("to=(<call>)".into());
    let full = Trigger::PatternFull("[a-z ]*to=(<call>)".into());
    let not = Trigger::Pattern("(<call>)(?!x)".into());
    for trigger in [word, pattern, full, not, Trigger::Token(CALL)] {
        let mut guide = lazy(std::slice::from_ref(&trigger));
        assert!(takes(&mut guide, "some text to="), "{trigger:?}");
        assert!(guide.allows(END).unwrap());
        assert!(guide.allowed().unwrap().has(i32::from(b'x')));
        guide.accept(CALL).unwrap();
        assert!(!guide.allows(END).unwrap() && !guide.allows(i32::from(b'x')).unwrap());
        assert!(takes(&mut guide, "42;"), "{trigger:?}");
        assert!(guide.is_finished());
    }
    let mut spelled = lazy(&[Trigger::Word("<call>".into())]);
    assert!(takes(&mut spelled, "a<call>7"));
    assert!(!takes(&mut spelled, "x"));
}

#[test]
fn what_triggers_must_fit_the_grammar() {
    let asked = Constraint {
        lazy: true,
        triggers: vec![Trigger::Word("to".into())],
        ..Constraint::new(Syntax::Gbnf, "root ::= \"to be\"")
    };
    let mut guide = constraints().guide(&asked, &[], &[], None).unwrap();
    assert!(!guide.allows(word("tool")).unwrap());
    assert!(!guide.allowed().unwrap().has(word("tool")));
    assert!(takes(&mut guide, "to b"));
}

#[test]
fn a_broken_grammar_is_refused_with_the_place() {
    for (text, what, position) in [
        ("", "it is empty", (1, 1)),
        ("root ::= \"a", "unexpected end", (1, 12)),
        ("root ::= foo bar", "the rule `foo` is not defined", (1, 10)),
        ("x ::= \"a\"", "there is no rule `root`", (1, 10)),
        ("root = \"a\"", "`::=` is expected here", (1, 6)),
        ("root ::= \"\\q\"", "unknown escape", (1, 11)),
        ("root ::= \"a\"\r\nb ::= [a", "unexpected end", (2, 9)),
        (
            "\u{feff}root ::= \"a\"",
            "the name of a rule is expected here: letters, digits and `-`",
            (1, 1),
        ),
        ("root ::= (\"a\"", "`)` is expected here", (1, 14)),
        ("root ::= *", "there is nothing before it that could be repeated", (1, 11)),
        ("root ::= \"a\"{2,1}", "at least 2 and at most 1 times", (1, 13)),
        ("root ::= \"a\"{5000}", "more than 2000 repetitions", (1, 13)),
        (
            "root ::= \"a\"{99999999999999999999}",
            "a whole number is expected here, and not a huge one",
            (1, 14),
        ),
        ("root ::= root \"a\" | \"b\"", "the rule `root` begins with itself", (1, 1)),
        (
            "root ::= a\na ::= b \"x\"\nb ::= \"y\"? c\nc ::= a | \"z\"",
            "the rule `a` begins with itself",
            (1, 10),
        ),
    ] {
        assert_eq!(refusal(Syntax::Gbnf, text), (what.to_owned(), Some(position)), "{text}");
    }
    assert!(asked(Syntax::Gbnf, "root ::= \"a\" # done\r\n\r\nb ::= \"c\"\r\n").is_ok());
}

#[test]
fn a_broken_expression_or_schema_is_refused_with_the_place() {
    for (syntax, text, position) in [
        (Syntax::Regex, "a(b", Some((1, 2))),
        (Syntax::Regex, "a(?=b)", Some((1, 2))),
        (Syntax::Regex, "", Some((1, 1))),
        (Syntax::Lark, "start: foo", None),
        (Syntax::Lark, "start: \"a\"\nb: (", None),
        (Syntax::JsonSchema, "{\"type\": \"string\",\n]", Some((2, 1))),
        (Syntax::JsonSchema, "[]", None),
        (Syntax::JsonSchema, r#"{"type": "strin"}"#, None),
        (Syntax::JsonSchema, r#"{"enum": []}"#, None),
        (Syntax::JsonSchema, "false", None),
        (Syntax::JsonSchema, r#"{"$ref": "http://example.com/x"}"#, None),
        (Syntax::JsonSchema, r#"{"type": "string", "pattern": "(?=a)b"}"#, None),
        (Syntax::JsonSchema, r#"{"type": "string", "pattern": "("}"#, None),
    ] {
        let (what, found) = refusal(syntax, text);
        assert!(!what.is_empty() && !what.contains("panic"), "{what}");
        assert!(position.is_none() || found == position, "{text}: {what} {found:?}");
    }
    let (what, _) = refusal(
        Syntax::JsonSchema,
        r#"{"properties": {"a": {"type": "string", "minLength": 5, "maxLength": 2}}}"#,
    );
    assert_eq!(what, "at `#/properties/a`: `minLength` 5 is more than `maxLength` 2");
}

#[test]
fn what_is_huge_or_deep_is_refused_quickly() {
    let brackets =
        |count: usize| format!("root ::= {}\"a\"{}", "(".repeat(count), ")".repeat(count));
    assert!(asked(Syntax::Gbnf, &brackets(100)).is_ok());
    for (syntax, text) in [
        (Syntax::Gbnf, brackets(101)),
        (Syntax::Gbnf, brackets(30_000)),
        (Syntax::Gbnf, brackets(60_000)),
        (Syntax::Gbnf, format!("root ::= \"{}\"{{2000}}", "a".repeat(60_000))),
        (Syntax::Gbnf, "root ::= (((\"a\"{2000}){2000}){2000}){2000}".into()),
        (Syntax::JsonSchema, format!("{}{}", "[".repeat(60_000), "]".repeat(60_000))),
        (Syntax::JsonSchema, format!("{}{}{}", "{\"not\":".repeat(50), "{}", "}".repeat(50))),
        (Syntax::JsonSchema, format!("{{\"title\": \"{}\"}}", "a".repeat(1 << 20))),
        (Syntax::Regex, format!("{}a{}", "(".repeat(30_000), ")".repeat(30_000))),
        (Syntax::Lark, format!("start: {}\"a\"{}", "(".repeat(30_000), "]".repeat(30_000))),
    ] {
        refusal(syntax, &text);
    }
}

/// Whoever takes them keeps to the clock while they are used, too.
#[test]
fn what_would_be_exponential_elsewhere_is_kept_or_refused_in_time() {
    let chain: String =
        (0..40).map(|i| format!("r{i} ::= r{n} \"a\" | r{n} \"b\"\n", n = i + 1)).collect();
    let choices: Vec<String> = (0..8)
        .map(|i| {
            let ways = (0..12).map(|k| format!(r#"{{"required": ["p{i}{k}"]}}"#));
            format!(r#"{{"anyOf": [{}]}}"#, ways.collect::<Vec<_>>().join(","))
        })
        .collect();
    for (syntax, text, input) in [
        (Syntax::Gbnf, format!("root ::= r0\n{chain}r40 ::= \"x\""), "xabab"),
        (
            Syntax::Gbnf,
            "root ::= \"a\" root \"b\" | \"a\" root \"c\" | \"d\"".into(),
            "aaaaaaaaaaaaa",
        ),
        (Syntax::Gbnf, "root ::= \"a\" root root | \"a\" | \"b\"".into(), "aaaaaaaaaaaaa"),
        (Syntax::Gbnf, "root ::= ((\"a\"*)*)* \"b\"".into(), "aaaaaaaaaaaa"),
        (Syntax::Gbnf, "root ::= (\"a\"?){2000}".into(), "aaaaaaaaaaaa"),
        (Syntax::Gbnf, "root ::= (\"a\"{0,2000} \"a\"{0,2000} \"b\")+".into(), "aaaaaaaaaaaa"),
        (Syntax::Regex, "((a{1000}){1000}){1000}".into(), "aaaaaaaaaaaa"),
        (Syntax::Regex, "(a|a)*(a|aa)*(a*)*b".into(), "aaaaaaaaaaaa"),
        (Syntax::Regex, "(.*a.{12}b)*.{40}".into(), "aaaaaaaaaaaaaaaaaaa"),
        (Syntax::Regex, "a?".repeat(2000) + &"a".repeat(2000), "aaaaaaaaaaaaaa"),
        (Syntax::Regex, "a?".repeat(30_000), "aaaaaaaaaaaaaa"),
        (Syntax::JsonSchema, format!(r#"{{"allOf": [{}]}}"#, choices.join(",")), "{"),
        (Syntax::JsonSchema, r##"{"$ref": "#"}"##.into(), "{"),
        (Syntax::JsonSchema, r##"{"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}"##.into(), "{"),
        (Syntax::JsonSchema, r#"{"type": "array", "minItems": 9999}"#.into(), "[1,2"),
        (Syntax::JsonSchema, r#"{"type": "string", "minLength": 999999}"#.into(), "\"aaaa"),
        (Syntax::JsonSchema, r#"{"type": "string", "pattern": "(a+)+$"}"#.into(), "\"aaaa"),
        (Syntax::Lark, "start: start start | \"a\"".into(), "aaaaaaaaaaaaaaaaaaaaaaa"),
        (Syntax::Lark, format!("start: {}\"a\"{}", "(".repeat(30_000), ")".repeat(30_000)), "a"),
        (
            Syntax::Lark,
            format!("start: A\nA: {}\"a\"{}", "(".repeat(30_000), ")?".repeat(30_000)),
            "a",
        ),
    ] {
        let begun = Instant::now();
        let shown: String = text.chars().take(60).collect();
        if let Ok(mut guide) = asked(syntax, &text) {
            for byte in input.bytes() {
                let (Ok(allows), Ok(_)) = (guide.allows(byte.into()), guide.allowed()) else {
                    break;
                };
                if !allows || guide.accept(byte.into()).is_err() {
                    break;
                }
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{shown}: {:?}", begun.elapsed());
    }
}

#[test]
fn a_grammar_whose_characters_no_token_has_says_so() {
    let words = vec![b"a".to_vec(), b"\xff<end>".to_vec()];
    for (syntax, text) in [(Syntax::Gbnf, "root ::= \"b\""), (Syntax::Regex, "b")] {
        let constraints = Constraints::with_lexicon(Lexicon::new(&words, vec![1]));
        let mut guide = constraints.guide(&Constraint::new(syntax, text), &[], &[], None).unwrap();
        let error = guide.allowed().err().expect("nobody is left").to_string();
        let expected = format!("`{}`: no token of this model can come next", syntax.name());
        assert_eq!(error, expected);
    }
}

#[test]
fn a_long_text_does_not_fill_the_memory() {
    let nested = "root ::= value\nvalue ::= \"[\" (value (\",\" value)*)? \"]\" | [0-9]+";
    let mut guide = guide(Syntax::Gbnf, nested);
    let mut dice = fastrand::Rng::with_seed(3);
    for _ in 0..30_000 {
        let tokens: Vec<i32> = (0..256).filter(|token| guide.allows(*token).unwrap()).collect();
        let Some(token) = tokens.get(dice.usize(0..tokens.len().max(1))) else { break };
        guide.accept(*token).unwrap();
    }
}

#[test]
fn grammars_mean_what_they_mean_in_llama_cpp() {
    let json = r#"root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}"#;
    for text in [
        "{}",
        "{\"a\": [1, 2.5e3, {\"b\": null}]}",
        "{\"a\" 1",
        "{\"é\": \"\\u00e9\"}",
        "[1]",
        "{\"a\": tru",
        "{\"a\": 01}",
        "{ \n",
        "{\n\t\t\"x\":\"y\"}\n",
        "{\"\u{7f}",
    ] {
        same_as_llama(json, text);
    }
    for (grammar, texts) in [
        (
            "root ::= \"a\"{2,4} \"b\"{2,} \"c\"{3} [d-f]?",
            ["aabbccc", "aaaabbbcccd", "aab", "aabbccccc"],
        ),
        ("root ::= ( \"x\" |\n \"y\" # or\n )+ .", ["xyx", "z", "xyz!", "é"]),
        ("root ::= [^\\n\\u00e9-\\u00ff]* \"\\x41\\U0001F600\"", ["abA😀", "é", "A😀", "A"]),
        ("root ::= [a-]+ [\\]\\[]", ["a-a]", "-", "a[", "b"]),
        ("root ::= \"\" a\na ::= | \"b\" a", ["", "b", "bbb", "c"]),
    ] {
        for text in texts {
            same_as_llama(grammar, text);
        }
    }
}

#[test]
fn random_grammars_mean_what_they_mean_in_llama_cpp() {
    let mut dice = fastrand::Rng::with_seed(11);
    let mut counted = [0; 4];
    for _ in 0..400 {
        let grammar = random_grammar(&mut dice);
        if asked(Syntax::Gbnf, &grammar).is_err() {
            continue; // left recursion, which llama.cpp does not always see and may not survive
        }
        for _ in 0..12 {
            let length = dice.usize(0..7);
            let text: String =
                (0..length).map(|_| dice.choice(['a', 'b', 'c', 'é']).unwrap()).collect();
            counted[same_as_llama(&grammar, &text) as usize] += 1;
        }
    }
    assert!(counted.iter().skip(1).all(|count| *count > 50), "{counted:?}");
}

fn same_as_llama(grammar: &str, text: &str) -> Verdict {
    let [of, with] = [grammar, text].map(|text| CString::new(text).unwrap());
    let theirs = llama_grammar(&of, &with).unwrap();
    if theirs != Verdict::Refused {
        assert_eq!(verdict(guide(Syntax::Gbnf, grammar), text), theirs, "{grammar}\n{text:?}");
    }
    theirs
}

fn random_grammar(dice: &mut fastrand::Rng) -> String {
    (0..3)
        .map(|rule| {
            let name = ["root", "one", "two"][rule];
            let ways: Vec<String> = (0..dice.usize(1..4)).map(|_| random_way(dice, 0)).collect();
            format!("{name} ::= {}\n", ways.join(" | "))
        })
        .collect()
}

fn random_way(dice: &mut fastrand::Rng, depth: usize) -> String {
    let parts = (0..dice.usize(1..4)).map(|_| {
        let part = match dice.usize(0..9) {
            0 | 1 => "one".into(),
            2 => "two".into(),
            3 if depth < 2 => {
                format!("({} | {})", random_way(dice, depth + 1), random_way(dice, depth + 1))
            }
            4 => "[ab]".into(),
            5 => "[^b]".into(),
            6 => "\"ab\"".into(),
            7 => "\"é\"".into(),
            _ => "\"c\"".into(),
        };
        part + ["", "", "", "", "?", "*", "+", "{2}", "{1,3}", "{0,2}"][dice.usize(0..10)]
    });
    parts.collect::<Vec<_>>().join(" ")
}

/// The figures of docs/performance.md: `cargo test --test constraint -- --ignored --nocapture`.
#[test]
#[ignore = "prints times"]
fn how_long_masks_take() {
    let begun = Instant::now();
    let words = large_vocabulary();
    println!("{} tokens made up in {:?}", words.len(), begun.elapsed());
    let begun = Instant::now();
    let lexicon = Lexicon::new(&words, vec![256]);
    println!("tree: {:?}", begun.elapsed());
    let constraints = Constraints::with_lexicon(lexicon);
    let begun = Instant::now();
    let _ = constraints.guide(&Constraint::new(Syntax::Regex, "a"), &[], &[], None).unwrap();
    println!("slices of the tree: {:?}", begun.elapsed());
    print_choices(&constraints, words.len());
    let person = r##"{"type": "object", "properties": {"name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150}, "tags": {"type": "array",
        "items": {"enum": ["red", "green"]}}, "home": {"$ref": "#/$defs/home"}},
        "required": ["name", "age", "tags", "home"], "additionalProperties": false, "$defs": {"home":
        {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "string",
        "pattern": "^[0-9]{5}$"}}, "required": ["street"], "additionalProperties": false}}}"##;
    let object = r#"root ::= "{" ws (pair ("," ws pair)*)? "}"
pair ::= string ":" ws value
value ::= string | [0-9]+ | "{" ws (pair ("," ws pair)*)? "}" | "[" ws (value ("," ws value)*)? "]"
string ::= "\"" ([^"\\\x00-\x1f] | "\\" .)* "\"" ws
ws ::= [ \n]?"#;
    let text = r#"{"name": "Ann Bee", "age": 41, "tags": ["red", "green", "red"], "home": {"street": "Long Lane 7", "zip": "12345"}}"#;
    for (name, syntax, grammar, text) in [
        ("schema", Syntax::JsonSchema, person, text),
        ("any JSON", Syntax::JsonSchema, "{}", text),
        ("regex", Syntax::Regex, r"\w+@\w+\.(com|org)", "somebody@example.com"),
        ("GBNF", Syntax::Gbnf, object, text),
    ] {
        let asked = Constraint::new(syntax, grammar);
        let begun = Instant::now();
        let mut guide = constraints.guide(&asked, &[], &[], None).unwrap();
        let compiled = begun.elapsed();
        let begun = Instant::now();
        let mut again = constraints.guide(&asked, &[], &[], None).unwrap();
        let copied = begun.elapsed();
        let (mut masks, mut checks) = (Vec::new(), Vec::new());
        let mut row = vec![0.0; words.len()];
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let length =
                (1..=rest.len().min(4)).rev().find(|n| words.contains(&rest[..*n].to_vec()));
            let (now, after) = rest.split_at(length.unwrap());
            let token = words.iter().position(|word| word == now).unwrap() as i32;
            let begun = Instant::now();
            guide.allowed().unwrap().apply(&mut row);
            masks.push(begun.elapsed());
            guide.accept(token).unwrap();
            let begun = Instant::now();
            assert!(again.allows(token).unwrap());
            again.accept(token).unwrap();
            checks.push(begun.elapsed());
            rest = after;
        }
        masks.sort();
        checks.sort();
        let [half, most] = [masks.len() / 2, masks.len() - 1];
        println!(
            "{name}: compiled in {compiled:?}, again in {copied:?}; {} tokens; mask {:?} (median) {:?} \
             (worst); a check {:?}, {:?}",
            masks.len(),
            masks[half],
            masks[most],
            checks[half],
            checks[most]
        );
    }
}

/// A whole choice where the constraint refuses the first one each time, and without a constraint.
fn print_choices(constraints: &Constraints, size: usize) {
    let asked = Constraint::new(Syntax::Regex, "[0-9]{4000}");
    let mut dice = fastrand::Rng::with_seed(5);
    let row: Vec<f32> = (0..size).map(|_| dice.f32() * 20.0 - 10.0).collect();
    for (name, is_guided) in [("without", false), ("refused each time", true)] {
        let guide = || constraints.guide(&asked, &[], &[], None).unwrap();
        let sampler = Sampler::new(GenerationConfig::default(), Arc::default(), 4096);
        let mut sampler = sampler.guided_by(is_guided.then(guide));
        let mut times: Vec<Duration> = (0..101)
            .map(|_| {
                let begun = Instant::now();
                sampler.sample(&row, &[], []).unwrap();
                begun.elapsed()
            })
            .collect();
        times.sort();
        println!("choice, {name}: {:?} (median) {:?} (worst)", times[50], times[100]);
    }
}

/// As many tokens as Qwen's vocabulary has, of about the same lengths.
fn large_vocabulary() -> Vec<Vec<u8>> {
    let mut words: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    words[255].clear();
    words.push(b"\xff<end>".to_vec());
    let letters = b"etaoinshrdlucmfwypvbgkjqxz";
    let signs = b" \"'{}[]():;,.-_=+*/\\<>!?#$%&|@^~`\n\t";
    let mut add = |word: &[u8]| words.push(word.to_vec());
    for a in signs {
        signs.iter().for_each(|b| add(&[*a, *b]));
    }
    for number in 0..1000 {
        add(format!("{number:03}").as_bytes());
    }
    for a in letters {
        for b in letters {
            for word in [vec![*a, *b], vec![a.to_ascii_uppercase(), *b]] {
                add(&word);
                add(&[b" ", &word[..]].concat());
                for c in letters {
                    add(&[&word[..], &[*c]].concat());
                    add(&[b" ", &word[..], &[*c]].concat());
                }
            }
        }
    }
    let mut dice = fastrand::Rng::with_seed(1);
    while words.len() < 151_936 {
        let length = dice.usize(4..9);
        words.push((0..length).map(|_| letters[dice.usize(0..16)]).collect());
    }
    words
}

/// The public JSON-Schema-Test-Suite, from the folder named by `JSON_SCHEMA_TEST_SUITE` (`make
/// test-json-schema`). Valid data may be refused, since a grammar fixes the order of properties;
/// invalid data is never let through.
#[test]
#[ignore = "needs the suite: make test-json-schema"]
fn nothing_invalid_of_the_public_suite_is_let_through() {
    let folder = std::env::var("JSON_SCHEMA_TEST_SUITE").expect("the folder with draft2020-12");
    let constraints = constraints();
    let (mut refused, mut valid, mut too_strict, mut invalid) = (0, 0, 0, 0);
    let mut wrong = Vec::new();
    let files = std::fs::read_dir(std::path::Path::new(&folder).join("draft2020-12")).unwrap();
    let files = files.map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let groups: serde_json::Value = serde_json::from_str(&text).unwrap();
        for group in groups.as_array().unwrap() {
            let asked = Constraint::new(Syntax::JsonSchema, group["schema"].to_string());
            if constraints.guide(&asked, &[], &[], None).is_err() {
                refused += 1;
                continue;
            }
            for case in group["tests"].as_array().unwrap() {
                let guide = constraints.guide(&asked, &[], &[], None).unwrap();
                let fits = verdict(guide, &case["data"].to_string()) == Verdict::Matches;
                match (case["valid"].as_bool().unwrap(), fits) {
                    (true, true) => valid += 1,
                    (true, false) => too_strict += 1,
                    (false, false) => invalid += 1,
                    (false, true) => wrong.push(format!("{} {case}", group["schema"])),
                }
            }
        }
    }
    println!(
        "{refused} schemas refused; valid: {valid} let through, {too_strict} not; {invalid} refused"
    );
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}
