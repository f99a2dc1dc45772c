//! The keys of a file and typed access to them: llama.cpp reads most by a getter that knows one type.

use std::collections::HashMap;

use super::fault::{Check, Fault};

/// The types of a value, numbered as in ggml/include/gguf.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

const KINDS: [(Kind, &str, usize); 13] = [
    (Kind::U8, "u8", 1),
    (Kind::I8, "i8", 1),
    (Kind::U16, "u16", 2),
    (Kind::I16, "i16", 2),
    (Kind::U32, "u32", 4),
    (Kind::I32, "i32", 4),
    (Kind::F32, "f32", 4),
    (Kind::Bool, "bool", 1),
    (Kind::Text, "string", 0),
    (Kind::Array, "array", 0),
    (Kind::U64, "u64", 8),
    (Kind::I64, "i64", 8),
    (Kind::F64, "f64", 8),
];

impl Kind {
    pub fn from_number(number: u32) -> Option<Kind> {
        KINDS.get(number as usize).map(|kind| kind.0)
    }

    pub fn name(self) -> &'static str {
        KINDS[self as usize].1
    }

    /// In bytes; 0 for texts and arrays.
    pub fn size(self) -> usize {
        KINDS[self as usize].2
    }
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    Integer(Kind, i128),
    Float(Kind, f64),
    Bool(bool),
    Text(String),
    /// Too long to keep.
    LongText(u64),
    /// The first of them, at least one per layer; they are exact up to 2^53.
    Numbers {
        kind: Kind,
        length: u64,
        first: Vec<f64>,
    },
    Strings(Strings),
    SkippedStrings,
}

impl Value {
    /// `bytes` are little-endian and filled up with zeros.
    pub fn scalar(kind: Kind, bytes: [u8; 8]) -> Value {
        let unsigned = u64::from_le_bytes(bytes);
        match kind {
            Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Value::Integer(kind, unsigned.into()),
            Kind::I8 => Value::Integer(kind, (unsigned as i8).into()),
            Kind::I16 => Value::Integer(kind, (unsigned as i16).into()),
            Kind::I32 => Value::Integer(kind, (unsigned as i32).into()),
            Kind::I64 => Value::Integer(kind, (unsigned as i64).into()),
            Kind::F32 => Value::Float(kind, f32::from_bits(unsigned as u32).into()),
            Kind::F64 => Value::Float(kind, f64::from_bits(unsigned)),
            Kind::Bool => Value::Bool(unsigned != 0),
            Kind::Text | Kind::Array => unreachable!("texts and arrays are read elsewhere"),
        }
    }

    pub fn numbers(kind: Kind, length: u64, bytes: &[u8]) -> Value {
        let number = |chunk: &[u8]| {
            let mut filled = [0; 8];
            filled[..chunk.len()].copy_from_slice(chunk);
            match Value::scalar(kind, filled) {
                Value::Integer(_, value) => value as f64,
                Value::Float(_, value) => value,
                Value::Bool(value) => f64::from(value),
                _ => unreachable!("a scalar"),
            }
        };
        Value::Numbers {
            kind,
            length,
            first: bytes.chunks_exact(kind.size()).map(number).collect(),
        }
    }

    fn kind_name(&self) -> String {
        match self {
            Value::Integer(kind, _) | Value::Float(kind, _) => kind.name().into(),
            Value::Bool(_) => "bool".into(),
            Value::Text(_) | Value::LongText(_) => "string".into(),
            Value::Numbers { kind, .. } => format!("array of {}", kind.name()),
            Value::Strings(_) | Value::SkippedStrings => "array of string".into(),
        }
    }
}

/// Many short texts in one piece of memory.
#[derive(Debug, Clone, Default)]
pub(super) struct Strings {
    pub bytes: Vec<u8>,
    pub ends: Vec<usize>,
}

impl Strings {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let text = &self.bytes[start..end];
            start = end;
            text
        })
    }
}

#[derive(Debug, Default)]
pub(super) struct Keys(HashMap<String, Value>);

impl Keys {
    pub fn insert(&mut self, key: String, value: Value) -> Option<Value> {
        self.0.insert(key, value)
    }

    pub fn value(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub fn text(&self, key: &str) -> Check<Option<&str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(Value::LongText(length)) => Err(Fault::damaged(format!(
                "`{key}` is {length} bytes long, which is not accepted"
            ))),
            Some(other) => Err(wrong_kind(key, "string", other)),
        }
    }

    pub fn flag(&self, key: &str) -> Check<Option<bool>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong_kind(key, "bool", other)),
        }
    }

    pub fn u32(&self, key: &str) -> Check<Option<u32>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Integer(Kind::U32, value)) => Ok(Some(*value as u32)),
            Some(other) => Err(wrong_kind(key, "u32", other)),
        }
    }

    pub fn u16(&self, key: &str) -> Check<Option<u16>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Integer(Kind::U16, value)) => Ok(Some(*value as u16)),
            Some(other) => Err(wrong_kind(key, "u16", other)),
        }
    }

    pub fn f32(&self, key: &str) -> Check<Option<f64>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Float(Kind::F32, value)) => Ok(Some(*value)),
            Some(other) => Err(wrong_kind(key, "f32", other)),
        }
    }

    pub fn strings(&self, key: &str) -> Check<Option<&Strings>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Strings(strings)) => Ok(Some(strings)),
            Some(other) => Err(wrong_kind(key, "array of string", other)),
        }
    }

    /// A number in `range`, if the key is there.
    pub fn u32_in(&self, key: &str, range: std::ops::RangeInclusive<u32>) -> Check<Option<u32>> {
        match self.u32(key)? {
            Some(value) if !range.contains(&value) => Err(out_of_range(key, value, range)),
            value => Ok(value),
        }
    }

    pub fn required_u32_in(&self, key: &str, range: std::ops::RangeInclusive<u32>) -> Check<u32> {
        self.u32_in(key, range)?.ok_or_else(|| missing(key))
    }

    /// One number for all layers, or one each.
    pub fn per_layer(&self, key: &str, n_layers: u32, limit: u32) -> Check<Option<Vec<u32>>> {
        let Some(Value::Numbers { kind, length, first }) = self.value(key) else {
            return Ok(self.u32_in(key, 0..=limit)?.map(|value| vec![value; n_layers as usize]));
        };
        if !matches!(kind, Kind::U32 | Kind::I32 | Kind::Bool) {
            return Err(Fault::damaged(format!(
                "`{key}` must be u32 or an array of it, but is an array of {}",
                kind.name()
            )));
        }
        if *length != u64::from(n_layers) {
            return Err(Fault::damaged(format!(
                "`{key}` has {length} elements, and the model has {n_layers} layers"
            )));
        }
        let number =
            |(layer, &value): (usize, &f64)| match (0.0..=f64::from(limit)).contains(&value) {
                true => Ok(value as u32),
                false => Err(Fault::damaged(format!(
                    "`{key}` is {value} in layer {layer}, and must be 0 to {limit}"
                ))),
            };
        first.iter().enumerate().map(number).collect::<Check<_>>().map(Some)
    }
}

pub(super) fn missing(key: &str) -> Fault {
    Fault::damaged(format!("the key `{key}` is missing"))
}

pub(super) fn out_of_range(
    key: &str,
    value: impl std::fmt::Display,
    range: std::ops::RangeInclusive<u32>,
) -> Fault {
    Fault::damaged(format!("`{key}` is {value}, and must be {} to {}", range.start(), range.end()))
}

fn wrong_kind(key: &str, expected: &str, value: &Value) -> Fault {
    Fault::damaged(format!(
        "`{key}` must have the type {expected}, but has the type {}",
        value.kind_name()
    ))
}
