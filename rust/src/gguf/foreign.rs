//! Names what a file is that does not begin like a GGUF file.

/// A few words that complete "`path` is not a GGUF model: …".
pub(super) fn name(beginning: &[u8], size: u64) -> String {
    if size == 0 {
        return "it is empty".into();
    }
    let text = beginning.trim_ascii_start();
    let begins = |words: &str| {
        text.get(..words.len()).is_some_and(|start| start.eq_ignore_ascii_case(words.as_bytes()))
    };
    if begins("version https://git-lfs") {
        return git_lfs_pointer(text);
    }
    if begins("<!doctype html") || begins("<html") || begins("<head") {
        return "it is an HTML page, probably the error page of a download".into();
    }
    if begins("<?xml") {
        return "it is an XML text, probably the error page of a download".into();
    }
    if is_safetensors(beginning, size) {
        return "it is a safetensors file; convert it with llama.cpp's convert_hf_to_gguf.py"
            .into();
    }
    if let Some(kind) = by_magic(beginning) {
        return kind.into();
    }
    if matches!(text.first(), Some(b'{' | b'[')) && is_text(beginning) {
        return "it is a JSON text".into();
    }
    if beginning.iter().all(|&byte| byte == 0) {
        return "it begins with zeros, as a download that was never filled in".into();
    }
    if size < 4 {
        return format!("it has only {size} bytes");
    }
    if is_text(beginning) {
        return format!("it is a text that begins with `{}`", first_words(text));
    }
    format!("it begins with the bytes {}, and a GGUF file with `GGUF`", hex(&beginning[..4]))
}

fn by_magic(beginning: &[u8]) -> Option<&'static str> {
    let magic = beginning.get(..4)?;
    Some(match magic {
        b"PK\x03\x04" | b"PK\x05\x06" => {
            "it is a zip archive, as PyTorch checkpoints are; convert it first"
        }
        [0x80, 2..=5, ..] => {
            "it is a Python pickle, as old PyTorch checkpoints are; convert it first"
        }
        b"lmgg" | b"ggml" | b"GGML" => {
            "it is in the old GGML format, which llama.cpp has dropped; convert it again"
        }
        b"fmgg" | b"ggmf" | b"GGMF" => {
            "it is in the old GGMF format, which llama.cpp has dropped; convert it again"
        }
        b"tjgg" | b"ggjt" | b"GGJT" => {
            "it is in the old GGJT format, which llama.cpp has dropped; convert it again"
        }
        b"algg" | b"ggla" | b"GGLA" => {
            "it is an adapter in the old GGLA format, which llama.cpp has dropped"
        }
        b"FUGG" => "it is a GGUF file of the other byte order",
        [0x1f, 0x8b, ..]
        | [0x28, 0xb5, 0x2f, 0xfd]
        | b"\xfd7zX"
        | b"7z\xbc\xaf"
        | [b'B', b'Z', b'h', _] => "it is compressed; unpack it first",
        b"\x89HDF" => "it is an HDF5 file, as Keras models are",
        b"\x7fELF" | [b'M', b'Z', ..] => "it is a program",
        _ => return None,
    })
}

/// Eight bytes of length, then a JSON object of that length.
fn is_safetensors(beginning: &[u8], size: u64) -> bool {
    let Some((length, rest)) = beginning.split_first_chunk::<8>() else { return false };
    let length = u64::from_le_bytes(*length);
    rest.first() == Some(&b'{') && length >= 2 && length <= size - 8
}

fn git_lfs_pointer(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let size =
        text.lines().find_map(|line| line.strip_prefix("size ")).unwrap_or("an unknown number of");
    format!("it is a git-LFS pointer to a file of {size} bytes; `git lfs pull` fetches that")
}

fn is_text(bytes: &[u8]) -> bool {
    // The last character may be cut in two.
    let valid = match std::str::from_utf8(bytes) {
        Ok(_) => bytes.len(),
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        Err(_) => return false,
    };
    bytes[..valid].iter().all(|&byte| byte >= b' ' || byte.is_ascii_whitespace())
}

fn first_words(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.lines().next().unwrap_or("").chars().take(40).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}
