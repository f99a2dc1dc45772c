//! Bytes of a regular file, in order, never past its end.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, BufReader, ErrorKind, Read};
use std::path::Path;

use super::fault::{Check, Fault};
use crate::error::Error;

pub(super) struct Reader {
    file: BufReader<File>,
    position: u64,
    size: u64,
}

impl Reader {
    pub fn open(path: &Path) -> Check<Reader> {
        // Asked before opening, because opening alone can have effects on a device.
        check_regular(&std::fs::metadata(path).map_err(|error| no_file(path, error))?)?;
        let mut options = OpenOptions::new();
        options.read(true);
        do_not_wait(&mut options);
        let file = options.open(path).map_err(|error| no_file(path, error))?;
        let metadata = file.metadata().map_err(unreadable)?;
        check_regular(&metadata)?;
        Ok(Reader {
            file: BufReader::with_capacity(1 << 14, file),
            position: 0,
            size: metadata.len(),
        })
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn position(&self) -> u64 {
        self.position
    }

    pub fn remaining(&self) -> u64 {
        self.size - self.position
    }

    pub fn u32(&mut self) -> Check<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Check<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn array<const N: usize>(&mut self) -> Check<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// The caller has bounded `length`; memory is taken only after the file's end is checked.
    pub fn append_to(&mut self, bytes: &mut Vec<u8>, length: usize) -> Check<()> {
        self.check_remaining(length as u64)?;
        let start = bytes.len();
        bytes.resize(start + length, 0);
        self.fill(&mut bytes[start..])
    }

    pub fn skip(&mut self, length: u64) -> Check<()> {
        self.check_remaining(length)?;
        // Checked against the size of a file, so it fits.
        self.file.seek_relative(length as i64).map_err(unreadable)?;
        self.position += length;
        Ok(())
    }

    /// The first bytes, for a look; the position stays at the start.
    pub fn beginning(&mut self) -> Check<Vec<u8>> {
        let mut bytes = vec![0; self.size.min(512) as usize];
        self.fill(&mut bytes)?;
        self.file.seek_relative(-(bytes.len() as i64)).map_err(unreadable)?;
        self.position = 0;
        Ok(bytes)
    }

    pub fn check_remaining(&self, needed: u64) -> Check<()> {
        match needed <= self.remaining() {
            true => Ok(()),
            false => Err(Fault::Ends { size: self.size, position: self.position, needed }),
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Check<()> {
        let needed = bytes.len() as u64;
        self.check_remaining(needed)?;
        self.file.read_exact(bytes).map_err(|error| match error.kind() {
            // Somebody made the file shorter while we read it.
            ErrorKind::UnexpectedEof => {
                Fault::Ends { size: self.size, position: self.position, needed }
            }
            _ => unreadable(error),
        })?;
        self.position += needed;
        Ok(())
    }
}

fn unreadable(error: io::Error) -> Fault {
    Fault::Unreadable(error.to_string())
}

/// Missing, or something else that keeps us from opening it.
fn no_file(path: &Path, error: io::Error) -> Fault {
    match error.kind() {
        // InvalidInput: a NUL in the path, which no file can have.
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::InvalidInput => {
            Fault::Told(Error::ModelNotFound { path: path.into() })
        }
        _ => unreadable(error),
    }
}

fn check_regular(metadata: &Metadata) -> Check<()> {
    match metadata.is_file() {
        true => Ok(()),
        false => Err(Fault::Foreign(format!("it is {}, not a file", kind_of(metadata)))),
    }
}

#[cfg(unix)]
fn kind_of(metadata: &Metadata) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    let kind = metadata.file_type();
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a named pipe",
        () if kind.is_socket() => "a socket",
        () if kind.is_block_device() || kind.is_char_device() => "a device",
        () => "something special",
    }
}

#[cfg(not(unix))]
fn kind_of(metadata: &Metadata) -> &'static str {
    if metadata.is_dir() { "a directory" } else { "something special" }
}

/// A pipe that took the file's place in the meantime must not block us.
#[cfg(unix)]
fn do_not_wait(options: &mut OpenOptions) {
    use std::os::unix::fs::OpenOptionsExt;
    const O_NONBLOCK: i32 =
        if cfg!(any(target_os = "linux", target_os = "android")) { 0o4000 } else { 0x4 };
    options.custom_flags(O_NONBLOCK);
}

#[cfg(not(unix))]
fn do_not_wait(_: &mut OpenOptions) {}
