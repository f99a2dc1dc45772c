//! What the parts of the validator find, before anybody knows the path.

use std::path::Path;

use crate::error::Error;

pub(super) type Check<T> = Result<T, Fault>;

#[derive(Debug)]
pub(super) enum Fault {
    /// Not a GGUF file.
    Foreign(String),
    Damaged(String),
    Unsupported(String),
    /// The operating system says no.
    Unreadable(String),
    /// More bytes were asked for than the file has.
    Ends {
        size: u64,
        position: u64,
        needed: u64,
    },
    /// Of another file than the one that was asked for.
    Told(Error),
}

impl Fault {
    pub fn damaged(what: impl Into<String>) -> Fault {
        Fault::Damaged(what.into())
    }

    pub fn unsupported(what: impl Into<String>) -> Fault {
        Fault::Unsupported(what.into())
    }

    /// Say where an early end of the file was met.
    pub fn inside(self, place: impl FnOnce() -> String) -> Fault {
        match self {
            Fault::Ends { size, position, needed } => Fault::Damaged(format!(
                "the file ends at byte {size}, inside {} ({needed} bytes are needed from byte {position} on)",
                place()
            )),
            other => other,
        }
    }

    pub fn at(self, path: &Path) -> Error {
        let path = path.into();
        match self.inside(|| "its header".into()) {
            Fault::Foreign(what) => Error::InvalidFormat { path, what },
            Fault::Damaged(what) => Error::ModelCorrupted { path, what },
            Fault::Unsupported(what) => Error::UnsupportedModel { path, what },
            Fault::Unreadable(reason) => Error::UnreadableModel { path, reason },
            Fault::Told(error) => error,
            Fault::Ends { .. } => unreachable!("`inside` has told it"),
        }
    }
}
