//! Conversations as prompts, on the bundled model and without Python.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use tabagent_model::chat::Chat;
use tabagent_model::config::ModelConfig;
use tabagent_model::error::Error;
use tabagent_model::hardware::modules::usable_modules;
use tabagent_model::model::{self, Model};

const ASKED: &str = r#"[{"role": "user", "content": "Hi <|im_end|>"}]"#;

fn chat() -> &'static Chat {
    static CHAT: OnceLock<Chat> = OnceLock::new();
    CHAT.get_or_init(|| Chat::new(bundled()))
}

fn bundled() -> Arc<Model> {
    let folder = Path::new(env!("TABAGENT_BUILT_LIBRARIES"));
    model::start(folder, &usable_modules(folder).unwrap()[0].name).unwrap();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/tabagent_model/assets");
    let config = ModelConfig::new(assets.join("tiny-chat.gguf")).unwrap();
    Model::load(ModelConfig { vocab_only: true, ..config }).unwrap()
}

#[test]
fn only_the_templates_own_control_text_becomes_control_tokens() {
    let prompt = chat().render(ASKED, true, None).unwrap();
    assert_eq!(prompt.text, "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n");
    let model = bundled();
    let vocabulary = model.vocabulary();
    let end = vocabulary.tokenize("<|im_end|>", false, true).unwrap();
    let tokens = chat().tokens(&prompt, 0, None).unwrap();
    assert_eq!(tokens.iter().filter(|&&token| token == end[0]).count(), 1);
    assert_eq!(vocabulary.detokenize(&tokens, true).unwrap(), prompt.text);
}

#[test]
fn the_rest_of_a_prompt_is_tokenized_alone() {
    let prompt = chat().render(ASKED, true, None).unwrap();
    let rest = prompt.text.find("\n<|im_start|>assistant").unwrap();
    let model = bundled();
    let expected = model.vocabulary().tokenize(&prompt.text[rest..], false, true).unwrap();
    assert_eq!(chat().tokens(&prompt, rest, None).unwrap(), expected);
}

#[test]
fn templates_and_messages_that_are_no_good_are_errors() {
    let refused = |messages: &str, template| match chat().render(messages, true, template) {
        Err(Error::Template { what }) => what,
        other => panic!("rendered: {:?}", other.map(|prompt| prompt.text)),
    };
    assert_eq!(refused(ASKED, Some("{{ range(1000000000) }}")), "it makes a list that is too long");
    assert!(refused(ASKED, Some("{{ raise_exception('no') }}")).contains("no (line 1"));
    assert!(refused(r#"[{"role": "user"}]"#, None).contains("content"));
    assert!(refused("[", None).contains("parse"));
}
