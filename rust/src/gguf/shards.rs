//! The other files of a split model: `name-00001-of-00003.gguf` and so on.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::fault::{Check, Fault};
use super::header::Header;
use super::keys;
use crate::error::Error;

pub(super) struct Shards {
    pub paths: Vec<PathBuf>,
    pub size_bytes: u64,
}

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";

/// Read the headers of all shards, and append their tensors to those of the first.
pub(super) fn gather(path: &Path, first: &mut Header) -> Check<Shards> {
    let count = first.keys.u16(COUNT)?.unwrap_or(0);
    let mut shards = Shards { paths: vec![path.into()], size_bytes: first.size };
    if count <= 1 {
        return Ok(shards);
    }
    let number = first.keys.u16(NUMBER)?.ok_or_else(|| keys::missing(NUMBER))?;
    check_number(path, number, count)?;
    let prefix = prefix(path, number, count)?;
    let mut names: HashSet<String> =
        first.tensors.iter().map(|tensor| tensor.name.clone()).collect();
    for number in 1..count {
        let path = sibling(path, &prefix, number, count);
        let shard = read(&path, number, count)?;
        if let Some(twice) = shard.tensors.iter().find(|tensor| !names.insert(tensor.name.clone()))
        {
            let what = format!("the tensor `{}` is in another shard of the model too", twice.name);
            return Err(Fault::Told(Error::ModelCorrupted { path, what }));
        }
        shards.size_bytes += shard.size;
        shards.paths.push(path);
        first.tensors.extend(shard.tensors);
    }
    check_total(first)?;
    Ok(shards)
}

fn check_number(path: &Path, number: u16, count: u16) -> Check<()> {
    if number >= count {
        return Err(Fault::damaged(format!("`{NUMBER}` is {number}, and `{COUNT}` is {count}")));
    }
    if number > 0 {
        let first = match prefix(path, number, count) {
            Ok(prefix) => {
                format!("give the first one, `{}`", sibling(path, &prefix, 0, count).display())
            }
            Err(_) => "give the first one".into(),
        };
        // A user's mistake; but the file alone is no model, so the class is that of a damaged one.
        return Err(Fault::damaged(format!(
            "it is shard {} of {count} of a model; {first}",
            number + 1
        )));
    }
    Ok(())
}

fn suffix(number: u16, count: u16) -> String {
    format!("-{:05}-of-{count:05}.gguf", number + 1)
}

fn prefix(path: &Path, number: u16, count: u16) -> Check<String> {
    let suffix = suffix(number, count);
    let name = path.file_name().and_then(|name| name.to_str());
    match name.and_then(|name| name.strip_suffix(&suffix)) {
        Some(prefix) if !prefix.is_empty() => Ok(prefix.into()),
        _ => Err(Fault::damaged(format!(
            "it is shard {} of {count} of a model, so its name must end in `{suffix}`",
            number + 1
        ))),
    }
}

fn sibling(path: &Path, prefix: &str, number: u16, count: u16) -> PathBuf {
    path.with_file_name(format!("{prefix}{}", suffix(number, count)))
}

/// What is wrong with a shard is told with the shard's own path.
fn read(path: &Path, number: u16, count: u16) -> Check<Header> {
    let fault = match Header::read(path).and_then(|shard| check_place(shard, number, count)) {
        Ok(shard) => return Ok(shard),
        Err(fault) => fault,
    };
    match fault.at(path) {
        Error::ModelNotFound { path } => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Err(Fault::damaged(format!(
                "its shard {} of {count}, `{name}`, is missing",
                number + 1
            )))
        }
        error => Err(Fault::Told(error)),
    }
}

fn check_place(shard: Header, number: u16, count: u16) -> Check<Header> {
    // llama.cpp reads this key of the later shards by an asserting getter.
    let found = shard.keys.u16(NUMBER)?.ok_or_else(|| keys::missing(NUMBER))?;
    let found_count = shard.keys.u16(COUNT)?.unwrap_or(0);
    if (found, found_count) != (number, count) {
        return Err(Fault::damaged(format!(
            "by its name it is shard {} of {count}, but its header says {} of {found_count}",
            number + 1,
            u32::from(found) + 1
        )));
    }
    Ok(shard)
}

fn check_total(model: &Header) -> Check<()> {
    let found = model.tensors.len();
    let expected = match model.keys.value(TENSORS) {
        None => return Err(keys::missing(TENSORS)),
        Some(keys::Value::Integer(keys::Kind::I32, number)) => *number,
        Some(_) => return Err(Fault::damaged(format!("`{TENSORS}` must have the type i32"))),
    };
    match expected == found as i128 {
        true => Ok(()),
        false => Err(Fault::damaged(format!(
            "`{TENSORS}` is {expected}, and its shards hold {found}; is one of them of another model?"
        ))),
    }
}
