//! Load, ask, unload, without Python:
//!
//! ```sh
//! cargo run --release --example ask -- model.gguf "Once upon a time"
//! ```

use std::path::{Path, PathBuf};
use std::time::Instant;

use tabagent_model::backend::{LlamaCppBackend, ModelBackend};
use tabagent_model::hardware::{memory, modules};
use tabagent_model::model;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: ask MODEL.gguf PROMPT";
    let path = PathBuf::from(arguments.next().ok_or(usage)?);
    let prompt = arguments.next().ok_or(usage)?;

    let libraries = Path::new(env!("TABAGENT_BUILT_LIBRARIES"));
    let best = modules::usable_modules(libraries)?.remove(0);
    model::start(libraries, &best.name)?;

    let before = memory::resident_bytes();
    let begun = Instant::now();
    let mut backend = LlamaCppBackend::default();
    backend.load(&path, 0, 2048)?;
    eprintln!("loaded in {:?} on the {} module", begun.elapsed(), best.name);

    let begun = Instant::now();
    println!("{}", backend.generate(&prompt, 64)?);
    eprintln!("answered in {:?}", begun.elapsed());

    backend.unload()?;
    let mib = |bytes: Option<u64>| bytes.map_or(0, |bytes| bytes >> 20);
    eprintln!("resident: {} MiB before, {} MiB after", mib(before), mib(memory::resident_bytes()));
    Ok(())
}
