//! Keys and tensor infos of one file, as ggml/src/gguf.cpp demands them.
//!
//! ```text
//! "GGUF" · version u32 · number of tensors u64 · number of keys u64
//! keys:    name · type u32 · value            (array: type of the elements u32 · length u64 · elements)
//! tensors: name · dimensions u32 · as many u64 · type u32 · offset u64
//! padding up to the alignment, then the data; tensors follow each other, each padded to the alignment
//! ```
//!
//! Every count is compared with the bytes that are left before memory is taken for it.

use std::collections::HashSet;
use std::path::Path;

use super::fault::{Check, Fault};
use super::foreign;
use super::keys::{Keys, Kind, Strings, Value};
use super::reader::Reader;
use super::types::{self, TensorType};

const MAX_KEYS: u64 = 65_536;
const MAX_TENSORS: u64 = 262_144;
const MAX_NAME: u64 = 65_535;
/// ggml's names are 63 bytes and a NUL.
const MAX_TENSOR_NAME: u64 = 63;
/// Of texts and of small arrays we keep; longer ones are skipped.
const MAX_KEPT_TEXT: u64 = 16 << 20;
const MAX_KEPT_NUMBERS: u64 = 1_024;
const MAX_KEPT_TYPES: u64 = 1 << 22;
/// All keys together; llama.cpp keeps them in memory too. The largest vocabularies need 20 MiB.
const MAX_KEYS_BYTES: u64 = 512 << 20;
/// ggml's own limits.
const MAX_TEXT: u64 = 1 << 30;
const MAX_ELEMENTS: u64 = 1 << 30;
/// All tokens, or all merges, together.
const MAX_STRINGS_BYTES: usize = 256 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;
/// llama.cpp wraps mapped weights in a CPU buffer, whose start must lie so (ggml/src/ggml-impl.h).
const CPU_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;

pub(super) struct Header {
    pub version: u32,
    pub size: u64,
    pub keys: Keys,
    pub tensors: Vec<Tensor>,
}

#[derive(Debug, Clone)]
pub(super) struct Tensor {
    pub name: String,
    pub shape: [u64; 4],
    pub kind: &'static TensorType,
    /// From the start of the data section.
    pub offset: u64,
    pub bytes: u64,
}

impl Tensor {
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().product() // checked when it was read
    }
}

impl Header {
    pub fn read(path: &Path) -> Check<Header> {
        let mut reader = Reader::open(path)?;
        let beginning = reader.beginning()?;
        if !beginning.starts_with(b"GGUF") {
            return Err(Fault::Foreign(foreign::name(&beginning, reader.size())));
        }
        reader.skip(4)?;
        let version = read_version(&mut reader)?;
        let n_tensors = reader.u64()?;
        let n_keys = reader.u64()?;
        // The smallest key has 13 bytes: an empty name, a type and a byte. The smallest tensor has 24.
        check_count(&reader, "keys", n_keys, 13, MAX_KEYS)?;
        check_count(&reader, "tensors", n_tensors, 24, MAX_TENSORS)?;
        let keys = read_keys(&mut reader, n_keys)?;
        let alignment = alignment(&keys)?;
        let tensors = read_tensors(&mut reader, n_tensors)?;
        check_layout(&reader, &tensors, alignment)?;
        Ok(Header { version, size: reader.size(), keys, tensors })
    }
}

fn read_version(reader: &mut Reader) -> Check<u32> {
    match reader.u32()? {
        version @ 2..=3 => Ok(version),
        version if version != 0 && version & 0xffff == 0 => Err(Fault::unsupported(format!(
            "it is a GGUF file of version {} in the other byte order",
            version.swap_bytes()
        ))),
        version => Err(Fault::unsupported(format!(
            "its GGUF version is {version}, and llama.cpp reads 2 and 3"
        ))),
    }
}

fn check_count(reader: &Reader, what: &str, count: u64, smallest: u64, limit: u64) -> Check<()> {
    if count > reader.remaining() / smallest {
        return Err(Fault::damaged(format!(
            "it claims {count} {what}, which {} bytes cannot hold",
            reader.size()
        )));
    }
    if count > limit {
        return Err(Fault::damaged(format!(
            "it claims {count} {what}, and more than {limit} are not accepted"
        )));
    }
    Ok(())
}

// Keys

fn read_keys(reader: &mut Reader, count: u64) -> Check<Keys> {
    let mut keys = Keys::default();
    for index in 0..count {
        let start = reader.position();
        let name = read_name(reader, MAX_NAME).map_err(|fault| {
            name_fault(fault, || format!("the name of key {index} at byte {start}"), MAX_NAME)
        })?;
        let value = read_value(reader, &name)
            .map_err(|fault| fault.inside(|| format!("the value of key `{name}`")))?;
        if reader.position() > MAX_KEYS_BYTES {
            return Err(Fault::damaged(format!(
                "its keys take more than {MAX_KEYS_BYTES} bytes (with `{name}`)"
            )));
        }
        if keys.insert(name.clone(), value).is_some() {
            return Err(Fault::damaged(format!(
                "the key `{name}` occurs twice (again at byte {start})"
            )));
        }
    }
    Ok(keys)
}

enum NameFault {
    Empty,
    Long(u64),
    NotUtf8,
    Other(Fault),
}

impl From<Fault> for NameFault {
    fn from(fault: Fault) -> Self {
        NameFault::Other(fault)
    }
}

fn read_name(reader: &mut Reader, limit: u64) -> Result<String, NameFault> {
    let length = reader.u64()?;
    if length == 0 {
        return Err(NameFault::Empty);
    }
    if length > limit {
        return Err(NameFault::Long(length));
    }
    let mut bytes = Vec::new();
    reader.append_to(&mut bytes, length as usize)?;
    String::from_utf8(bytes).map_err(|_| NameFault::NotUtf8)
}

fn name_fault(fault: NameFault, place: impl FnOnce() -> String, limit: u64) -> Fault {
    match fault {
        NameFault::Empty => Fault::damaged(format!("{} is empty", place())),
        NameFault::Long(length) => Fault::damaged(format!(
            "{} is {length} bytes long, and at most {limit} are allowed",
            place()
        )),
        NameFault::NotUtf8 => Fault::damaged(format!("{} is not valid UTF-8", place())),
        NameFault::Other(fault) => fault.inside(place),
    }
}

fn read_value(reader: &mut Reader, key: &str) -> Check<Value> {
    match read_kind(reader, key)? {
        Kind::Array => read_array(reader, key),
        Kind::Text => read_text(reader, key),
        kind => {
            let mut bytes = [0; 8];
            let size = kind.size();
            reader.check_remaining(size as u64)?;
            let mut raw = Vec::with_capacity(8);
            reader.append_to(&mut raw, size)?;
            bytes[..size].copy_from_slice(&raw);
            Ok(Value::scalar(kind, bytes))
        }
    }
}

fn read_kind(reader: &mut Reader, key: &str) -> Check<Kind> {
    let number = reader.u32()?;
    Kind::from_number(number).ok_or_else(|| {
        Fault::damaged(format!("the key `{key}` has the type {number}, and types are 0 to 12"))
    })
}

fn read_text(reader: &mut Reader, key: &str) -> Check<Value> {
    let length = reader.u64()?;
    if length > MAX_TEXT {
        return Err(Fault::damaged(format!(
            "the text of key `{key}` is {length} bytes long, and at most {MAX_TEXT} are allowed"
        )));
    }
    if length > MAX_KEPT_TEXT {
        reader.skip(length)?;
        return Ok(Value::LongText(length));
    }
    let mut bytes = Vec::new();
    reader.append_to(&mut bytes, length as usize)?;
    Ok(Value::Text(String::from_utf8_lossy(&bytes).into_owned()))
}

fn read_array(reader: &mut Reader, key: &str) -> Check<Value> {
    let kind = read_kind(reader, key)?;
    if kind == Kind::Array {
        return Err(Fault::damaged(format!(
            "the key `{key}` is an array of arrays, which GGUF does not have"
        )));
    }
    let length = reader.u64()?;
    let smallest = if kind == Kind::Text { 8 } else { kind.size() as u64 };
    if length > MAX_ELEMENTS || length > reader.remaining() / smallest {
        return Err(Fault::damaged(format!(
            "the array of key `{key}` claims {length} elements of type {}, and {} bytes are left in the file",
            kind.name(),
            reader.remaining()
        )));
    }
    if kind == Kind::Text {
        return match key {
            "tokenizer.ggml.tokens" | "tokenizer.ggml.merges" => read_strings(reader, key, length),
            _ => skip_strings(reader, length),
        };
    }
    let is_token_type = key == "tokenizer.ggml.token_type";
    let kept = length.min(if is_token_type { MAX_KEPT_TYPES } else { MAX_KEPT_NUMBERS });
    let mut bytes = Vec::new();
    reader.append_to(&mut bytes, kept as usize * kind.size())?;
    reader.skip((length - kept) * kind.size() as u64)?;
    Ok(Value::numbers(kind, length, &bytes))
}

fn read_strings(reader: &mut Reader, key: &str, length: u64) -> Check<Value> {
    let mut strings = Strings::default();
    for index in 0..length {
        let size = reader.u64()?;
        if size > (MAX_STRINGS_BYTES - strings.bytes.len()) as u64 {
            return Err(Fault::damaged(format!(
                "text {index} of key `{key}` is {size} bytes long, and all {length} together may have {MAX_STRINGS_BYTES}"
            )));
        }
        reader.append_to(&mut strings.bytes, size as usize)?;
        strings.ends.push(strings.bytes.len());
    }
    Ok(Value::Strings(strings))
}

fn skip_strings(reader: &mut Reader, length: u64) -> Check<Value> {
    for _ in 0..length {
        let size = reader.u64()?;
        reader.skip(size)?;
    }
    Ok(Value::SkippedStrings)
}

// Tensors

fn alignment(keys: &Keys) -> Check<u64> {
    let alignment = keys.u32("general.alignment")?.map_or(DEFAULT_ALIGNMENT, u64::from);
    match alignment.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&alignment) {
        true => Ok(alignment),
        false => Err(Fault::damaged(format!(
            "`general.alignment` is {alignment}, and must be a power of two from 8 to {MAX_ALIGNMENT}"
        ))),
    }
}

fn read_tensors(reader: &mut Reader, count: u64) -> Check<Vec<Tensor>> {
    let mut tensors = Vec::with_capacity(count as usize);
    let mut names = HashSet::with_capacity(count as usize);
    for index in 0..count {
        let start = reader.position();
        let name = read_name(reader, MAX_TENSOR_NAME).map_err(|fault| {
            name_fault(
                fault,
                || format!("the name of tensor {index} at byte {start}"),
                MAX_TENSOR_NAME,
            )
        })?;
        if !names.insert(name.clone()) {
            return Err(Fault::damaged(format!(
                "the tensor `{name}` occurs twice (again at byte {start})"
            )));
        }
        let place = || format!("the description of tensor `{name}`");
        tensors.push(read_tensor(reader, &name).map_err(|fault| fault.inside(place))?);
    }
    Ok(tensors)
}

fn read_tensor(reader: &mut Reader, name: &str) -> Check<Tensor> {
    let n_dims = reader.u32()?;
    if n_dims > 4 {
        return Err(Fault::damaged(format!(
            "the tensor `{name}` has {n_dims} dimensions, and at most 4 are allowed"
        )));
    }
    let mut shape = [1; 4];
    for (axis, length) in shape.iter_mut().take(n_dims as usize).enumerate() {
        *length = reader.u64()?;
        if *length == 0 || *length > i64::MAX as u64 {
            return Err(Fault::damaged(format!(
                "dimension {axis} of tensor `{name}` is {}, and must be 1 to {}",
                *length as i64,
                i64::MAX
            )));
        }
    }
    let kind = types::tensor_type(reader.u32()?, name)?;
    let offset = reader.u64()?;
    let bytes = size_of(name, &shape, kind)?;
    Ok(Tensor { name: name.into(), shape, kind, offset, bytes })
}

fn size_of(name: &str, shape: &[u64; 4], kind: &TensorType) -> Check<u64> {
    if !shape[0].is_multiple_of(kind.block) {
        return Err(Fault::damaged(format!(
            "the rows of tensor `{name}` have {} numbers, and {} needs a multiple of {}",
            shape[0], kind.name, kind.block
        )));
    }
    let overflow = || {
        Fault::damaged(format!(
            "the shape {shape:?} of tensor `{name}` is larger than 64 bits can count"
        ))
    };
    let mut n_elements = 1u64;
    for &length in shape {
        n_elements = n_elements
            .checked_mul(length)
            .filter(|&n| n <= i64::MAX as u64)
            .ok_or_else(overflow)?;
    }
    (n_elements / kind.block)
        .checked_mul(kind.bytes)
        .filter(|&n| n <= i64::MAX as u64)
        .ok_or_else(overflow)
}

/// Tensors lie one after the other, and all of them in the file.
fn check_layout(reader: &Reader, tensors: &[Tensor], alignment: u64) -> Check<()> {
    // A position is at most the size of a file and an alignment is small, so this cannot overflow.
    let start = reader.position().next_multiple_of(alignment);
    let mut expected = 0u64;
    for tensor in tensors {
        let Tensor { name, offset, bytes, .. } = tensor;
        if *offset != expected {
            return Err(Fault::damaged(format!(
                "the tensor `{name}` has the offset {offset}, and must have {expected}, where the one before it ends"
            )));
        }
        let end = (start + expected).checked_add(*bytes).filter(|&end| end <= reader.size());
        if end.is_none() {
            return Err(Fault::damaged(format!(
                "the file ends at byte {}, inside the tensor `{name}` ({bytes} bytes from byte {} on)",
                reader.size(),
                start + expected
            )));
        }
        if !(start + expected).is_multiple_of(CPU_ALIGNMENT) {
            return Err(Fault::damaged(format!(
                "the tensor `{name}` lies at byte {}, and must at a multiple of {CPU_ALIGNMENT} \
                 (`general.alignment` is {alignment})",
                start + expected
            )));
        }
        expected += bytes.next_multiple_of(alignment); // in the file, so far from overflow
    }
    Ok(())
}
