//! The validator on small files: sound ones are described, each fault is named whole.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use tabagent_model::error::Error;
use tabagent_model::gguf::{
    Description, Part, Parts, check_tokenizer_is_stack_safe, inspect, inspect_vocabulary,
};

// A writer

#[derive(Clone)]
enum Value {
    U16(u16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(Vec<u8>),
    Texts(Vec<Vec<u8>>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// A type number, and bytes as they are.
    Raw(u32, Vec<u8>),
}

fn text(text: &str) -> Value {
    Value::Text(text.into())
}

fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Value {
    Value::Texts(texts.into_iter().map(|text| text.as_bytes().to_vec()).collect())
}

#[derive(Clone)]
struct Tensor {
    name: String,
    shape: Vec<u64>,
    kind: u32,
    offset: Option<u64>,
    bytes: usize,
}

#[derive(Clone)]
struct File {
    magic: [u8; 4],
    version: u32,
    n_keys: Option<u64>,
    n_tensors: Option<u64>,
    keys: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
}

impl File {
    fn set(mut self, key: &str, value: Value) -> File {
        match self.keys.iter_mut().find(|(name, _)| name == key) {
            Some(found) => found.1 = value,
            None => self.keys.push((key.into(), value)),
        }
        self
    }

    fn drop(mut self, name: &str) -> File {
        self.keys.retain(|(key, _)| key != name);
        self.tensors.retain(|tensor| tensor.name != name);
        self
    }

    fn tensor(mut self, name: &str, change: impl FnOnce(&mut Tensor)) -> File {
        change(self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap());
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        bytes.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (name, value) in &self.keys {
            put_text(&mut bytes, name.as_bytes());
            put_value(&mut bytes, value);
        }
        let mut end = 0;
        for tensor in &self.tensors {
            put_text(&mut bytes, tensor.name.as_bytes());
            bytes.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|length| bytes.extend(length.to_le_bytes()));
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend(tensor.offset.unwrap_or(end).to_le_bytes());
            end += tensor.bytes.next_multiple_of(32) as u64;
        }
        bytes.resize(bytes.len().next_multiple_of(32) + end as usize, 0);
        bytes
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text);
}

fn put_value(bytes: &mut Vec<u8>, value: &Value) {
    let mut put = |kind: u32, rest: &[u8]| {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(rest);
    };
    let array = |kind: u32, length: usize| {
        [&kind.to_le_bytes()[..], &(length as u64).to_le_bytes()[..]].concat()
    };
    match value {
        Value::U16(number) => put(2, &number.to_le_bytes()),
        Value::U32(number) => put(4, &number.to_le_bytes()),
        Value::I32(number) => put(5, &number.to_le_bytes()),
        Value::F32(number) => put(6, &number.to_le_bytes()),
        Value::Bool(flag) => put(7, &[u8::from(*flag)]),
        Value::Raw(kind, rest) => put(*kind, rest),
        Value::I32s(numbers) => {
            put(9, &array(5, numbers.len()));
            numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
        }
        Value::F32s(numbers) => {
            put(9, &array(6, numbers.len()));
            numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
        }
        Value::Text(text) => {
            put(8, &[]);
            put_text(bytes, text);
        }
        Value::Texts(texts) => {
            put(9, &array(8, texts.len()));
            texts.iter().for_each(|text| put_text(bytes, text));
        }
    }
}

// Models

fn key(name: &str, value: Value) -> (String, Value) {
    (name.into(), value)
}

fn f32_tensor(name: &str, shape: &[u64]) -> Tensor {
    let bytes = shape.iter().product::<u64>() as usize * 4;
    Tensor { name: name.into(), shape: shape.to_vec(), kind: 0, offset: None, bytes }
}

/// Two layers of a llama with 32 numbers per token, two heads, and eight tokens.
fn llama() -> File {
    let tokens = ["a", "b", "c", "ab", "<x>", "<y>", "<bos>", "<eos>"];
    let keys = vec![
        key("general.architecture", text("llama")),
        key("general.name", text("tiny")),
        key("general.file_type", Value::U32(0)),
        key("llama.block_count", Value::U32(2)),
        key("llama.context_length", Value::U32(64)),
        key("llama.embedding_length", Value::U32(32)),
        key("llama.feed_forward_length", Value::U32(64)),
        key("llama.attention.head_count", Value::U32(2)),
        key("llama.attention.head_count_kv", Value::U32(1)),
        key("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        key("llama.rope.dimension_count", Value::U32(16)),
        key("tokenizer.ggml.model", text("gpt2")),
        key("tokenizer.ggml.pre", text("qwen2")),
        key("tokenizer.ggml.tokens", texts(tokens)),
        key("tokenizer.ggml.token_type", Value::I32s(vec![1, 1, 1, 1, 1, 1, 3, 3])),
        key("tokenizer.ggml.merges", texts(["a b"])),
        key("tokenizer.ggml.bos_token_id", Value::U32(6)),
        key("tokenizer.ggml.eos_token_id", Value::U32(7)),
        key("tokenizer.chat_template", text("{{ messages }}")),
    ];
    let mut tensors = vec![
        f32_tensor("token_embd.weight", &[32, 8]),
        f32_tensor("output_norm.weight", &[32]),
        f32_tensor("output.weight", &[32, 8]),
    ];
    for layer in 0..2 {
        for (part, shape) in [
            ("attn_norm", &[32][..]),
            ("attn_q", &[32, 32]),
            ("attn_k", &[32, 16]),
            ("attn_v", &[32, 16]),
            ("attn_output", &[32, 32]),
            ("ffn_norm", &[32]),
            ("ffn_gate", &[32, 64]),
            ("ffn_up", &[32, 64]),
            ("ffn_down", &[64, 32]),
        ] {
            tensors.push(f32_tensor(&format!("blk.{layer}.{part}.weight"), shape));
        }
    }
    let magic = *b"GGUF";
    File { magic, version: 3, n_keys: None, n_tensors: None, keys, tensors }
}

/// The same with a SentencePiece vocabulary that can spell every byte.
fn sentence_llama() -> File {
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let tokens: Vec<_> =
        ["<unk>", "<s>", "</s>"].into_iter().map(str::to_owned).chain(bytes).collect();
    llama()
        .drop("tokenizer.ggml.pre")
        .drop("tokenizer.ggml.merges")
        .set("tokenizer.ggml.model", text("llama"))
        .set("tokenizer.ggml.tokens", texts(tokens.iter().map(String::as_str)))
        .set("tokenizer.ggml.scores", Value::F32s(vec![0.0; 259]))
        .set("tokenizer.ggml.token_type", Value::I32s(vec![1; 259]))
        .set("tokenizer.ggml.bos_token_id", Value::U32(1))
        .set("tokenizer.ggml.eos_token_id", Value::U32(2))
        .tensor("token_embd.weight", |tensor| *tensor = f32_tensor("token_embd.weight", &[32, 259]))
        .tensor("output.weight", |tensor| *tensor = f32_tensor("output.weight", &[32, 259]))
}

// What comes out

struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("gguf-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Class and message, without the folder.
    fn told(&self, result: Result<Description, Error>) -> String {
        let error = match result {
            Ok(description) => return format!("sound: {}", description.architecture),
            Err(error) => error,
        };
        let class = match &error {
            Error::ModelNotFound { .. } => "not found",
            Error::UnreadableModel { .. } => "unreadable",
            Error::InvalidFormat { .. } => "format",
            Error::ModelCorrupted { .. } => "corrupted",
            Error::UnsupportedModel { .. } => "unsupported",
            _ => "another class",
        };
        format!("{class}: {error}").replace(&format!("{}/", self.0.display()), "")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn told_of_bytes(bytes: &[u8]) -> String {
    let folder = Folder::new();
    let path = folder.file("m", bytes);
    folder.told(inspect(&path))
}

fn told(file: &File) -> String {
    told_of_bytes(&file.bytes())
}

fn damaged(what: &str) -> String {
    format!("corrupted: `m` is damaged: {what}")
}

fn unsupported(what: &str) -> String {
    format!("unsupported: `m` cannot be run here: {what}")
}

fn foreign(what: &str) -> String {
    format!("format: `m` is not a GGUF model: {what}")
}

// Tests

#[test]
fn a_sound_model_is_described() {
    let folder = Folder::new();
    let bytes = llama().bytes();
    let path = folder.file("m.gguf", &bytes);
    let description = inspect(&path).unwrap();
    let expected = Description {
        path: path.clone(),
        shards: vec![path],
        size_bytes: bytes.len() as u64,
        version: 3,
        architecture: "llama".into(),
        name: Some("tiny".into()),
        n_params: 2 * 32 * 8 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64),
        quantization: "F32".into(),
        n_ctx_train: 64,
        n_layers: 2,
        n_embd: 32,
        n_head: 2,
        n_head_kv: 1,
        head_dim_k: 16,
        head_dim_v: 16,
        n_vocab: 8,
        tokenizer: "gpt2".into(),
        pre: Some("qwen2".into()),
        tokenizer_is_stack_safe: true,
        has_chat_template: true,
        chat_template: Some("{{ messages }}".into()),
        is_embedding: false,
        is_recurrent: false,
        n_experts: 0,
        n_ff: 64,
        n_merges: 1,
        caps_scores: false,
        kv_values_per_token: 2 * (16 + 16),
        state_bytes_per_sequence: 0,
        parts: Parts {
            input: part(32 * 8 * 4, 0, 0),
            layers: vec![part(37_120, 36_864, 16 + 16); 2],
            output: part(32 * 8 * 4 + 32 * 4, 32 * 8 * 4, 0),
            shared_bytes: 0,
        },
    };
    assert_eq!(description, expected);
    assert_eq!(description.kv_bytes_per_token(), 128);
}

/// So many bytes, so many of them in matrices of F32, and keys and values of a token.
fn part(bytes: u64, matrices: u64, kv_values: u64) -> Part {
    let matrices = (matrices > 0).then_some(("F32", matrices)).into_iter().collect();
    Part { bytes, matrices, kv_values }
}

#[test]
fn a_model_without_an_output_matrix_multiplies_with_its_embedding() {
    let folder = Folder::new();
    let tied = inspect(&folder.file("m.gguf", &llama().drop("output.weight").bytes())).unwrap();
    let own = inspect(&folder.file("n.gguf", &llama().bytes())).unwrap();
    assert_eq!(tied.parts, Parts { shared_bytes: 32 * 8 * 4, ..own.parts });
}

#[test]
fn variants_of_a_sound_model_are_sound() {
    for (what, file) in [
        ("version 2", File { version: 2, ..llama() }),
        ("tied embeddings", llama().drop("output.weight")),
        ("no name", llama().drop("general.name")),
        ("no rope size", llama().drop("llama.rope.dimension_count")),
        ("no pre-tokenizer", llama().drop("tokenizer.ggml.pre")),
        ("sentence pieces", sentence_llama()),
        ("layers of their own", {
            let both = || Value::I32s(vec![64, 64]);
            llama().set("llama.feed_forward_length", both())
        }),
        ("a padding id too many", llama().set("tokenizer.ggml.padding_token_id", Value::U32(8))),
        ("no vocabulary", {
            let none = llama().set("tokenizer.ggml.model", text("none"));
            none.set("llama.vocab_size", Value::U32(8))
        }),
        (
            "an unknown key",
            llama().set("x.y", Value::Raw(9, vec![0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7])),
        ),
    ] {
        assert_eq!(told(&file), "sound: llama", "{what}");
    }
}

#[test]
fn a_path_that_is_no_file() {
    let folder = Folder::new();
    let told = |path: &Path| folder.told(inspect(path));
    assert_eq!(told(&folder.0.join("absent")), "not found: there is no model file at `absent`");
    assert_eq!(told(Path::new("")), "not found: there is no model file at ``");
    assert_eq!(told(Path::new("a\0b")), "not found: there is no model file at `a\0b`");
    let inside = folder.file("m", b"x").join("n");
    assert_eq!(told(&inside), "not found: there is no model file at `m/n`");
    std::fs::create_dir(folder.0.join("d")).unwrap();
    assert_eq!(
        told(&folder.0.join("d")),
        "format: `d` is not a GGUF model: it is a directory, not a file"
    );
    #[cfg(target_os = "linux")]
    {
        assert_eq!(
            told(Path::new("/dev/zero")),
            "format: `/dev/zero` is not a GGUF model: it is a device, not a file"
        );
        let long = "x".repeat(5_000);
        assert!(told(Path::new(&long)).starts_with("unreadable: "), "a name too long");
        std::os::unix::fs::symlink("loop", folder.0.join("loop")).unwrap();
        assert!(told(&folder.0.join("loop")).starts_with("unreadable: `loop` cannot be read: "));
        let status = std::process::Command::new("mkfifo").arg(folder.0.join("pipe")).status();
        if status.is_ok_and(|status| status.success()) {
            assert_eq!(
                told(&folder.0.join("pipe")),
                "format: `pipe` is not a GGUF model: it is a named pipe, not a file"
            );
        }
    }
}

#[test]
fn other_kinds_of_files_are_named() {
    let safetensors = [&16u64.to_le_bytes()[..], br#"{"a":{"x":"yyy"}}"#].concat();
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 4368439584\n";
    for (bytes, what) in [
        (&b""[..], "it is empty"),
        (b"\x01", "it has only 1 bytes"),
        (b"GGU", "it has only 3 bytes"),
        (
            pointer,
            "it is a git-LFS pointer to a file of 4368439584 bytes; `git lfs pull` fetches that",
        ),
        (
            b"\n<!DOCTYPE html><title>404</title>",
            "it is an HTML page, probably the error page of a download",
        ),
        (b"<?xml version=\"1.0\"?>", "it is an XML text, probably the error page of a download"),
        (
            &safetensors,
            "it is a safetensors file; convert it with llama.cpp's convert_hf_to_gguf.py",
        ),
        (b"PK\x03\x04....", "it is a zip archive, as PyTorch checkpoints are; convert it first"),
        (b"\x80\x02}q", "it is a Python pickle, as old PyTorch checkpoints are; convert it first"),
        (
            b"lmgg\0\0\0\0",
            "it is in the old GGML format, which llama.cpp has dropped; convert it again",
        ),
        (b"GGML", "it is in the old GGML format, which llama.cpp has dropped; convert it again"),
        (b"ggjt", "it is in the old GGJT format, which llama.cpp has dropped; convert it again"),
        (b"FUGG\0\0\0\x03", "it is a GGUF file of the other byte order"),
        (b"\x1f\x8b\x08\0", "it is compressed; unpack it first"),
        (b" {\"error\": \"x\"}", "it is a JSON text"),
        (b"Entry not found", "it is a text that begins with `Entry not found`"),
        (&[0; 64], "it begins with zeros, as a download that was never filled in"),
        (b"\xde\xad\xbe\xef", "it begins with the bytes de ad be ef, and a GGUF file with `GGUF`"),
    ] {
        assert_eq!(told_of_bytes(bytes), foreign(what));
    }
}

#[test]
fn counts_and_versions_in_the_head() {
    let version = |version| told(&File { version, ..llama() });
    for number in [0, 1, 4, u32::MAX] {
        let what = format!("its GGUF version is {number}, and llama.cpp reads 2 and 3");
        assert_eq!(version(number), unsupported(&what));
    }
    assert_eq!(
        version(3u32.swap_bytes()),
        unsupported("it is a GGUF file of version 3 in the other byte order")
    );
    let size = llama().bytes().len();
    for count in [1_000_000_000, 1 << 63, u64::MAX] {
        let keys = File { n_keys: Some(count), ..llama() };
        let what = format!("it claims {count} keys, which {size} bytes cannot hold");
        assert_eq!(told(&keys), damaged(&what));
        let tensors = File { n_tensors: Some(count), ..llama() };
        let what = format!("it claims {count} tensors, which {size} bytes cannot hold");
        assert_eq!(told(&tensors), damaged(&what));
    }
    assert_eq!(
        told_of_bytes(&llama().bytes()[..23]),
        damaged("the file ends at byte 23, inside its header (8 bytes are needed from byte 16 on)")
    );
}

#[test]
fn every_truncation_is_damage() {
    let bytes = llama().bytes();
    for percent in 0..100 {
        let told = told_of_bytes(&bytes[..bytes.len() * percent / 100]);
        assert!(
            told.starts_with("corrupted: ") || told.starts_with("format: "),
            "{percent} %: {told}"
        );
    }
    let last = told_of_bytes(&bytes[..bytes.len() - 1]);
    let (size, start) = (bytes.len() - 1, bytes.len() - 64 * 32 * 4);
    assert_eq!(
        last,
        damaged(&format!(
            "the file ends at byte {size}, inside the tensor `blk.1.ffn_down.weight` (8192 bytes from byte {start} on)"
        ))
    );
}

#[test]
fn keys_are_read_strictly() {
    let raw = |kind, rest: &[u8]| told(&llama().set("x", Value::Raw(kind, rest.into())));
    assert_eq!(raw(99, b""), damaged("the key `x` has the type 99, and types are 0 to 12"));
    let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    assert_eq!(
        raw(9, &nested),
        damaged("the key `x` is an array of arrays, which GGUF does not have")
    );
    let huge = [&10u32.to_le_bytes()[..], &(1u64 << 61).to_le_bytes()].concat();
    assert!(raw(9, &huge).starts_with(&damaged(
        "the array of key `x` claims 2305843009213693952 elements of type u64, and "
    )));
    assert_eq!(
        raw(8, &u64::MAX.to_le_bytes()),
        damaged(
            "the text of key `x` is 18446744073709551615 bytes long, and at most 1073741824 are allowed"
        )
    );
    assert!(raw(8, &(1u64 << 24).to_le_bytes()).contains("inside the value of key `x`"));
    let empty = File { keys: vec![key("", Value::U32(1))], ..llama() };
    assert_eq!(told(&empty), damaged("the name of key 0 at byte 24 is empty"));
    let long = File { keys: vec![key(&"x".repeat(65_536), Value::U32(1))], ..llama() };
    assert_eq!(
        told(&long),
        damaged("the name of key 0 at byte 24 is 65536 bytes long, and at most 65535 are allowed")
    );
    let mut twice = llama();
    twice.keys.insert(1, twice.keys[0].clone());
    assert_eq!(
        told(&twice),
        damaged("the key `general.architecture` occurs twice (again at byte 69)")
    );
}

#[test]
fn tensors_are_read_strictly() {
    let change = |change: fn(&mut Tensor)| told(&llama().tensor("blk.0.attn_q.weight", change));
    let name = "`blk.0.attn_q.weight`";
    assert_eq!(
        change(|tensor| tensor.shape = vec![1; 5]),
        damaged(&format!("the tensor {name} has 5 dimensions, and at most 4 are allowed"))
    );
    assert_eq!(
        change(|tensor| tensor.shape[1] = 0),
        damaged(&format!(
            "dimension 1 of tensor {name} is 0, and must be 1 to 9223372036854775807"
        ))
    );
    assert_eq!(
        change(|tensor| tensor.shape[1] = -32i64 as u64),
        damaged(&format!(
            "dimension 1 of tensor {name} is -32, and must be 1 to 9223372036854775807"
        ))
    );
    assert_eq!(
        change(|tensor| tensor.shape = vec![1 << 32; 4]),
        damaged(&format!(
            "the shape [4294967296, 4294967296, 4294967296, 4294967296] of tensor {name} is larger than 64 bits can count"
        ))
    );
    assert_eq!(
        change(|tensor| tensor.kind = 12),
        damaged(&format!(
            "the rows of tensor {name} have 32 numbers, and Q4_K needs a multiple of 256"
        ))
    );
    assert_eq!(
        change(|tensor| tensor.kind = 999),
        damaged(&format!("the tensor {name} has the type 999, which llama.cpp does not know"))
    );
    for (kind, old) in
        [(4, "Q4_2"), (5, "Q4_3"), (31, "Q4_0_4_4"), (33, "Q4_0_8_8"), (36, "IQ4_NL_4_4")]
    {
        let file = llama().tensor("blk.0.attn_q.weight", |tensor| tensor.kind = kind);
        let what =
            format!("the tensor {name} has the type {kind} ({old}), which llama.cpp has removed");
        assert_eq!(told(&file), damaged(&what));
    }
    let before = 2 * 32 * 8 * 4 + 2 * 32 * 4;
    for offset in [7, 0, 1 << 40, u64::MAX] {
        let file = llama().tensor("blk.0.attn_q.weight", |tensor| tensor.offset = Some(offset));
        let what = format!(
            "the tensor {name} has the offset {offset}, and must have {before}, where the one before it ends"
        );
        assert_eq!(told(&file), damaged(&what));
    }
    let mut file = llama();
    file.tensors[1].name = file.tensors[0].name.clone();
    assert!(
        told(&file)
            .starts_with(&damaged("the tensor `token_embd.weight` occurs twice (again at byte "))
    );
    let long = llama().tensor("output.weight", |tensor| tensor.name = "x".repeat(64));
    assert!(told(&long).ends_with(" is 64 bytes long, and at most 63 are allowed"));
}

#[test]
fn alignment_is_a_power_of_two() {
    for alignment in [0, 1, 3, 4, 48, 1 << 31] {
        let file = llama().set("general.alignment", Value::U32(alignment));
        let what = format!(
            "`general.alignment` is {alignment}, and must be a power of two from 8 to 1048576"
        );
        assert_eq!(told(&file), damaged(&what));
    }
    let file = llama().set("general.alignment", Value::I32(32));
    assert_eq!(
        told(&file),
        damaged("`general.alignment` must have the type u32, but has the type i32")
    );
}

#[test]
fn sizes_have_types_and_ranges() {
    for (name, value, what) in [
        ("block_count", Value::U32(0), "`llama.block_count` is 0, and must be 1 to 512"),
        ("block_count", Value::U32(513), "`llama.block_count` is 513, and must be 1 to 512"),
        (
            "block_count",
            Value::I32(2),
            "`llama.block_count` must have the type u32, but has the type i32",
        ),
        (
            "block_count",
            text("2"),
            "`llama.block_count` must have the type u32, but has the type string",
        ),
        ("block_count", Value::U32(3), "the tensor `blk.2.attn_norm.weight` is missing"),
        (
            "block_count",
            Value::U32(1),
            "it has the tensor `blk.1.attn_norm.weight`, and `llama.block_count` is 1",
        ),
        (
            "context_length",
            Value::U32(0),
            "`llama.context_length` is 0, and must be 1 to 4294967295",
        ),
        (
            "embedding_length",
            Value::U32(33),
            "`llama.embedding_length` is 33, which 2 heads cannot share (and there is no `llama.attention.key_length`)",
        ),
        (
            "attention.head_count",
            Value::U32(0),
            "`llama.attention.head_count` is 0, and must be 1 to 65536",
        ),
        (
            "attention.head_count_kv",
            Value::U32(4),
            "`llama.attention.head_count_kv` is 4 in layer 0, which does not divide its 2 heads",
        ),
        (
            "attention.head_count_kv",
            Value::I32s(vec![1, 1, 1]),
            "`llama.attention.head_count_kv` has 3 elements, and the model has 2 layers",
        ),
        (
            "attention.head_count_kv",
            Value::I32s(vec![1, -1]),
            "`llama.attention.head_count_kv` is -1 in layer 1, and must be 0 to 65536",
        ),
        (
            "attention.head_count_kv",
            Value::U32(2),
            "the tensor `blk.0.attn_k.weight` has the shape 32 × 16, and must have 32 × 32 by the sizes in the header",
        ),
        (
            "attention.value_length",
            Value::U32(8),
            "`llama.attention.value_length` is 8, and must be 16 as `llama.attention.key_length`",
        ),
        (
            "feed_forward_length",
            Value::U32(65),
            "the tensor `blk.0.ffn_gate.weight` has the shape 32 × 64, and must have 32 × 65 by the sizes in the header",
        ),
        (
            "rope.dimension_count",
            Value::U32(15),
            "`llama.rope.dimension_count` is 15, and must be 16, the length of a head",
        ),
        (
            "rope.scaling.type",
            text("bogus"),
            "`llama.rope.scaling.type` is `bogus`, and must be none, linear, yarn or longrope",
        ),
        (
            "rope.freq_base",
            Value::F32(0.0),
            "`llama.rope.freq_base` is 0, and must be a number above 0",
        ),
        (
            "attention.layer_norm_rms_epsilon",
            Value::F32(f32::NAN),
            "`llama.attention.layer_norm_rms_epsilon` is NaN, and must be from 0 to below 1",
        ),
        ("logit_scale", Value::F32(f32::NAN), "`llama.logit_scale` is not a number (NaN)"),
        ("pooling_type", Value::U32(77), "`llama.pooling_type` is 77, and must be 0 to 4"),
        ("expert_count", Value::U32(8), "`llama.expert_used_count` is 0, and must be 1 to 8"),
        ("expert_used_count", Value::U32(2), "`llama.expert_used_count` is 2, and must be 0 to 0"),
        (
            "embedding_length_out",
            Value::U32(33),
            "`llama.embedding_length_out` is 33, but no tensor makes embeddings longer than 32",
        ),
        (
            "nextn_predict_layers",
            Value::U32(2),
            "`llama.nextn_predict_layers` is 2, and must be 0 to 1",
        ),
    ] {
        assert_eq!(told(&llama().set(&format!("llama.{name}"), value)), damaged(what));
    }
    let wide = llama().drop("llama.rope.dimension_count");
    assert_eq!(
        told(&wide.set("llama.embedding_length", Value::U32(34))),
        damaged(
            "the rows of tensor `token_embd.weight` have 32 numbers, and `llama.embedding_length` is 34"
        )
    );
    for name in ["block_count", "context_length", "embedding_length", "attention.head_count"] {
        let what = format!("the key `llama.{name}` is missing");
        assert_eq!(told(&llama().drop(&format!("llama.{name}"))), damaged(&what));
    }
}

#[test]
fn what_is_no_language_model_is_unsupported() {
    let with = |key: &str, value: &str| told(&llama().set(key, text(value)));
    assert_eq!(
        with("general.architecture", "flux"),
        unsupported("its architecture `flux` is unknown to this version of llama.cpp")
    );
    let projector = "it is the image or audio part (mmproj) of another model; give the file of the model itself";
    assert_eq!(with("general.architecture", "clip"), unsupported(projector));
    assert_eq!(with("general.type", "mmproj"), unsupported(projector));
    let adapter = "it is an adapter (`lora`), which needs the model it was made for";
    assert_eq!(with("general.type", "adapter"), unsupported(adapter));
    assert_eq!(with("adapter.type", "lora"), unsupported(adapter));
    assert_eq!(
        with("general.type", "imatrix"),
        unsupported("it is an importance matrix for quantizing, not a model")
    );
    assert_eq!(
        with("general.architecture", "eagle3"),
        unsupported(
            "it is a draft head (`eagle3`), which works only together with the model it was made for"
        )
    );
    assert_eq!(
        with("general.architecture", "dream"),
        unsupported("it writes by diffusion (`dream`), and here models write token after token")
    );
    let empty = File { tensors: vec![], ..llama() };
    assert_eq!(told(&empty), unsupported("it holds no weights (a vocabulary only)"));
    assert_eq!(
        told(&llama().drop("general.architecture")),
        damaged("the key `general.architecture` is missing")
    );
}

#[test]
fn a_vocabulary_alone_can_be_asked_for() {
    let folder = Folder::new();
    let file = File { tensors: vec![], ..llama() };
    let path = folder.file("m", &file.bytes());
    let description = inspect_vocabulary(&path).unwrap();
    assert_eq!((description.n_vocab, description.n_layers, description.n_params), (8, 0, 0));
}

#[test]
fn vocabularies_are_consistent() {
    let tokens = "tokenizer.ggml.tokens";
    let twice = texts(["a", "b", "c", "ab", "b", "<y>", "<bos>", "<eos>"]);
    assert_eq!(
        told(&llama().set(tokens, twice)),
        damaged("its vocabulary has the token `b` twice, as 1 and 4")
    );
    for (file, what) in [
        (
            llama().set(tokens, texts(["a", "b", "c", "ab", "<x>", "<bos>", "<eos>"])),
            "`tokenizer.ggml.eos_token_id` is 7, and must be 0 to 6",
        ),
        (llama().drop(tokens), "the key `tokenizer.ggml.tokens` is missing"),
        (
            llama().set(tokens, Value::Texts(vec![])),
            "`tokenizer.ggml.tokens` has 0 tokens, and must have 1 to 4194304",
        ),
        (
            llama().set("tokenizer.ggml.token_type", Value::I32s(vec![1; 7])),
            "`tokenizer.ggml.token_type` has 7 elements, and there are 8 tokens",
        ),
        (
            sentence_llama().set("tokenizer.ggml.scores", Value::F32s(vec![0.0; 258])),
            "`tokenizer.ggml.scores` has 258 elements, and there are 259 tokens",
        ),
        (
            llama().set("tokenizer.ggml.token_type", Value::U32(1)),
            "`tokenizer.ggml.token_type` must be an array of i32",
        ),
        (
            llama().set("tokenizer.ggml.eos_token_id", Value::U32(u32::MAX)),
            "`tokenizer.ggml.eos_token_id` is 4294967295, and must be 0 to 7",
        ),
        (llama().drop("tokenizer.ggml.merges"), "the key `tokenizer.ggml.merges` is missing"),
        (
            llama().set("tokenizer.ggml.merges", texts(["a b", "ab"])),
            "merge 1 of `tokenizer.ggml.merges` is `ab`, and must be two texts with a space between",
        ),
        (
            llama()
                .drop("tokenizer.ggml.bos_token_id")
                .set("tokenizer.ggml.add_bos_token", Value::Bool(true)),
            "its tokenizer needs the begin-of-text token, but `tokenizer.ggml.bos_token_id` names none of the vocabulary",
        ),
        (
            llama().set("tokenizer.ggml.add_bos_token", Value::U32(1)),
            "`tokenizer.ggml.add_bos_token` must have the type bool, but has the type u32",
        ),
        (
            llama().tensor("token_embd.weight", |tensor| {
                *tensor = f32_tensor("token_embd.weight", &[32, 7])
            }),
            "the tensor `token_embd.weight` has 7 rows, and the vocabulary has 8 tokens",
        ),
        (
            llama().set("tokenizer.ggml.model", text("none")),
            "the tensor `token_embd.weight` has 8 rows, and `llama.vocab_size` says 0 tokens",
        ),
    ] {
        assert_eq!(told(&file), damaged(what));
    }
    let model = llama().set("tokenizer.ggml.model", text("wordle"));
    assert_eq!(
        told(&model),
        unsupported(
            "its tokenizer `wordle` (`tokenizer.ggml.model`) is unknown to this version of llama.cpp"
        )
    );
    let pre = llama().set("tokenizer.ggml.pre", text("qwen9"));
    assert_eq!(
        told(&pre),
        unsupported(
            "its pre-tokenizer `qwen9` (`tokenizer.ggml.pre`) is unknown to this version of llama.cpp"
        )
    );
}

#[test]
fn sentence_pieces_can_spell_every_byte() {
    let mut file = sentence_llama();
    for (_, value) in &mut file.keys {
        if let Value::Texts(tokens) = value {
            tokens[3 + 0xfe] = b"<0xfe>".to_vec();
            tokens[3 + 0xff] = b"<0xff>".to_vec();
            tokens[3 + usize::from(b'a')] = b"a".to_vec(); // as good as <0x61>
        }
    }
    assert_eq!(
        told(&file),
        damaged("its vocabulary has no token for 2 of the 256 bytes (the first is <0xFE>)")
    );
}

#[test]
fn world_vocabularies_have_every_byte() {
    let token = |byte: u8| byte.escape_ascii().to_string();
    let with = |tokens: Vec<String>| {
        let file = sentence_llama().set("tokenizer.ggml.model", text("rwkv"));
        file.set("tokenizer.ggml.tokens", texts(tokens.iter().map(String::as_str)))
    };
    let extra = ["<s>", "ab", "\\nx"].map(str::to_owned);
    let all: Vec<_> = extra.into_iter().chain((0..=255).map(token)).collect();
    assert_eq!(told(&with(all.clone())), "sound: llama");
    let without: Vec<_> =
        all.iter().map(|token| if token == "\\n" { "yy".into() } else { token.clone() }).collect();
    assert_eq!(
        told(&with(without)),
        damaged("its vocabulary has no token for 1 of the 256 bytes (the first is <0x0A>)")
    );
}

#[test]
fn tensors_have_types_that_can_be_computed_with() {
    let norm = llama().tensor("blk.1.ffn_norm.weight", |tensor| tensor.kind = 1);
    // only the kind changes, so that the next tensor seems to come too late
    assert!(told(&norm).contains("has the offset"));
    let norm = norm.tensor("blk.1.ffn_norm.weight", |tensor| tensor.bytes = 64);
    assert_eq!(
        told(&norm),
        damaged("the tensor `blk.1.ffn_norm.weight` is of type F16, and must be F32")
    );
    let matrix = llama().tensor("blk.1.ffn_down.weight", |tensor| tensor.kind = 26);
    assert_eq!(
        told(&matrix),
        damaged(
            "the tensor `blk.1.ffn_down.weight` is of type I32, which cannot be multiplied with"
        )
    );
    let cube = llama().tensor("token_embd.weight", |tensor| tensor.shape = vec![32, 4, 2]);
    assert_eq!(
        told(&cube),
        damaged(
            "the tensor `token_embd.weight` has the shape 32 × 4 × 2, and at most 2 dimensions make sense there"
        )
    );
}

#[test]
fn the_quantization_is_named() {
    let quantization = |file: &File| {
        let folder = Folder::new();
        inspect(&folder.file("m", &file.bytes())).unwrap().quantization
    };
    assert_eq!(quantization(&llama().set("general.file_type", Value::U32(15))), "Q4_K_M");
    let mut mixed = llama().drop("general.file_type");
    assert_eq!(quantization(&mixed), "F32");
    for tensor in mixed.tensors.iter_mut().filter(|tensor| tensor.shape.len() == 2) {
        tensor.kind = 8;
        tensor.bytes = tensor.bytes / 4 / 32 * 34;
    }
    assert_eq!(quantization(&mixed), "Q8_0");
}

// Shards

fn shards(folder: &Folder) -> [PathBuf; 2] {
    let whole = llama();
    let place = |file: File, number| {
        file.set("split.no", Value::U16(number))
            .set("split.count", Value::U16(2))
            .set("split.tensors.count", Value::I32(whole.tensors.len() as i32))
    };
    let (front, back) = whole.tensors.split_at(9);
    let first = place(File { tensors: front.to_vec(), ..whole.clone() }, 0);
    let second = place(File { tensors: back.to_vec(), keys: vec![], ..whole.clone() }, 1);
    [
        folder.file("m-00001-of-00002.gguf", &first.bytes()),
        folder.file("m-00002-of-00002.gguf", &second.bytes()),
    ]
}

#[test]
fn a_split_model_is_one_model() {
    let folder = Folder::new();
    let paths = shards(&folder);
    let description = inspect(&paths[0]).unwrap();
    let whole = folder.file("whole", &llama().bytes());
    let whole = Description { path: paths[0].clone(), ..inspect(&whole).unwrap() };
    let size = paths.iter().map(|path| path.metadata().unwrap().len()).sum();
    assert_eq!(description, Description { shards: paths.to_vec(), size_bytes: size, ..whole });
}

#[test]
fn faults_of_shards_name_the_shard() {
    let folder = Folder::new();
    let [first, second] = shards(&folder);
    assert_eq!(
        folder.told(inspect(&second)),
        "corrupted: `m-00002-of-00002.gguf` is damaged: it is shard 2 of 2 of a model; give the first one, `m-00001-of-00002.gguf`"
    );

    let bytes = std::fs::read(&second).unwrap();
    std::fs::write(&second, &bytes[..bytes.len() - 1]).unwrap();
    assert!(
        folder
            .told(inspect(&first))
            .starts_with("corrupted: `m-00002-of-00002.gguf` is damaged: the file ends at byte ")
    );

    std::fs::write(&second, std::fs::read(&first).unwrap()).unwrap();
    assert_eq!(
        folder.told(inspect(&first)),
        "corrupted: `m-00002-of-00002.gguf` is damaged: by its name it is shard 2 of 2, but its header says 1 of 2"
    );

    let other = File { keys: vec![], tensors: vec![f32_tensor("x", &[4])], ..llama() };
    let other = other.set("split.no", Value::U16(1)).set("split.count", Value::U16(2));
    std::fs::write(&second, other.bytes()).unwrap();
    assert_eq!(
        folder.told(inspect(&first)),
        "corrupted: `m-00001-of-00002.gguf` is damaged: `split.tensors.count` is 21, and its shards hold 10; is one of them of another model?"
    );

    let wide = other.set("split.no", Value::U32(1));
    std::fs::write(&second, wide.bytes()).unwrap();
    assert_eq!(
        folder.told(inspect(&first)),
        "corrupted: `m-00002-of-00002.gguf` is damaged: `split.no` must have the type u16, but has the type u32"
    );

    std::fs::remove_file(&second).unwrap();
    assert_eq!(
        folder.told(inspect(&first)),
        "corrupted: `m-00001-of-00002.gguf` is damaged: its shard 2 of 2, `m-00002-of-00002.gguf`, is missing"
    );

    let renamed = folder.0.join("m.gguf");
    std::fs::rename(&first, &renamed).unwrap();
    assert_eq!(
        folder.told(inspect(&renamed)),
        "corrupted: `m.gguf` is damaged: it is shard 1 of 2 of a model, so its name must end in `-00001-of-00002.gguf`"
    );
}

// Whole files

#[test]
fn stack_safe_tokenizers_are_known() {
    assert!(check_tokenizer_is_stack_safe("gpt2", Some("qwen2")));
    assert!(check_tokenizer_is_stack_safe("gpt2", Some("llama-bpe")));
    assert!(check_tokenizer_is_stack_safe("llama", None));
    assert!(!check_tokenizer_is_stack_safe("gpt2", Some("tekken")));
    assert!(!check_tokenizer_is_stack_safe("gpt2", None));
}

/// No byte of the header may bring the validator down, or make it slow.
#[test]
fn any_byte_may_be_wrong() {
    let folder = Folder::new();
    let sound = llama().bytes();
    let header = sound.len() - llama().tensors.iter().map(|tensor| tensor.bytes).sum::<usize>();
    let path = folder.file("m", &sound);
    let mut file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let mut put = |position: usize, byte: u8| {
        file.seek(SeekFrom::Start(position as u64)).unwrap();
        file.write_all(&[byte]).unwrap();
    };
    for (position, &right) in sound.iter().enumerate().take(header) {
        for byte in [0x00, 0x01, 0x7f, 0xff] {
            put(position, byte);
            let _ = inspect(&path);
        }
        put(position, right);
    }
    assert_eq!(folder.told(inspect(&path)), "sound: llama");
}

#[test]
fn a_large_vocabulary_is_described_like_a_small_one() {
    let n_tokens = 150_000;
    let tokens: Vec<_> =
        (0..n_tokens).map(|number| format!("token{number}").into_bytes()).collect();
    let merges = (0..n_tokens).map(|number| format!("to ken{number}").into_bytes()).collect();
    let file = llama()
        .set("tokenizer.ggml.tokens", Value::Texts(tokens))
        .set("tokenizer.ggml.merges", Value::Texts(merges))
        .set("tokenizer.ggml.token_type", Value::I32s(vec![1; n_tokens]))
        .tensor("token_embd.weight", |tensor| {
            *tensor = f32_tensor("token_embd.weight", &[32, n_tokens as u64])
        })
        .tensor("output.weight", |tensor| {
            *tensor = f32_tensor("output.weight", &[32, n_tokens as u64])
        });
    let folder = Folder::new();
    let path = folder.file("m", &file.bytes());
    assert_eq!(inspect(&path).unwrap().n_vocab, n_tokens as u32);
}
