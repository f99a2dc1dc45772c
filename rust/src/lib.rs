//! Local language models over llama.cpp, without Python and with it.
//!
//! ```text
//! py (feature "python")     plain values for Python, nothing else
//!   ├─ chat                 messages → prompt, answer → content, reasoning and tool calls
//!   └─ context              requests in, events out; one owner thread for each llama.cpp context
//!        ├─ constraint      what an answer has to be
//!        └─ model           open weights and vocabulary
//!             └─ gguf, hardware, config, log, ffi (the shim), reserve ─ error
//! ```
//!
//! A request goes down as a `Command` and comes back as `Event`s; there is no third way.

pub mod backend;
pub mod chat;
pub mod config;
pub mod constraint;
pub mod context;
pub mod error;
pub mod ffi;
pub mod gguf;
pub mod hardware;
pub mod log;
pub mod model;
#[cfg(feature = "python")]
mod py;
#[cfg(any(feature = "python", test))]
mod reserve;
#[cfg(unix)]
pub mod wire;

/// Of the Python module alone: a Rust program chooses its own.
#[cfg(feature = "python")]
#[global_allocator]
static ALLOCATOR: reserve::Patient = reserve::Patient::new();
