//! Load, ask and unload a 3B and a 7B model, then one after the other, without Python:
//!
//! ```sh
//! cargo run --release --no-default-features --example spike3 -- --model-dir ./models \
//!     --backend …/libggml-cuda.so --n-gpu-layers 99 --n-ctx 2048 [--model-3b FILE] [--model-7b FILE]
//! ```
//!
//! Layers for a GPU need a backend, which `tabagent-model build-backend` compiles. It is what
//! `tabagent-bench spike3` does, with the same prompts, targets and exit codes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use tabagent_model::backend::{LlamaCppBackend, ModelBackend};
use tabagent_model::error::Error;
use tabagent_model::gguf::{self, Description};
use tabagent_model::hardware::{gpu, memory, modules};
use tabagent_model::model;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const LOAD_S: f64 = 10.0;
const CLASSIFICATION_MS: f64 = 500.0;
const GENERATION_MS: f64 = 2000.0;
const RECLAIMED_MB: f64 = 100.0;

const WARM_UP: &str = "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n";
const GENERATION: &str = "<|im_start|>user\nWhy is the sea salty? Answer in one sentence.<|im_end|>\n\
                          <|im_start|>assistant\n";
const CLASSIFICATION: &str = "<|im_start|>system\nClassify the sentiment of the text in one word: \
                              positive, negative or neutral.<|im_end|>\n<|im_start|>user\n\
                              I love this product, it works very well!<|im_end|>\n\
                              <|im_start|>assistant\n";

fn main() -> ExitCode {
    match run() {
        Ok(rows) => conclude(&rows),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Outcome<Vec<Row>> {
    let asked = Asked::read()?;
    start(&asked)?;
    let small = asked.model(&asked.small, 2.5e9..=4e9)?;
    let large = asked.model(&asked.large, 6.5e9..=8.5e9)?;

    let mut spike = Spike { asked, backend: LlamaCppBackend::default(), warm: None, rows: vec![] };
    spike.warm_up()?;
    spike.phase("3B", &small, Some(CLASSIFICATION_MS), None)?;
    spike.phase("7B", &large, None, Some(GENERATION_MS))?;
    spike.swap(&small, &large)?;
    Ok(spike.rows)
}

struct Spike {
    asked: Asked,
    backend: LlamaCppBackend,
    /// What is in use when a model has come and gone: what is set up once stays for good.
    warm: Option<Reading>,
    rows: Vec<Row>,
}

impl Spike {
    fn warm_up(&mut self) -> Outcome<()> {
        let tiny =
            concat!(env!("CARGO_MANIFEST_DIR"), "/python/tabagent_model/assets/tiny-chat.gguf");
        self.load(Path::new(tiny))?;
        self.backend.generate(WARM_UP, 1)?;
        self.backend.unload()?;
        self.warm = Some(Reading::now());
        Ok(())
    }

    fn phase(
        &mut self,
        name: &str,
        path: &Path,
        classification: Option<f64>,
        generation: Option<f64>,
    ) -> Outcome<()> {
        let begun = Instant::now();
        if let Err(error) = self.load(path) {
            let error = no_memory(error)?;
            self.rows.push(Row::new(name, "load", "s").below(Some(LOAD_S)).broken(error));
            self.rows.push(Row::new(name, "classification", "ms").below(classification));
            self.rows.push(Row::new(name, "short generation", "ms").below(generation));
            return self.reclaimed(name);
        }
        let load_s = begun.elapsed().as_secs_f64();
        self.rows.push(Row::new(name, "load", "s").measured(load_s).below(Some(LOAD_S)));
        self.ask(name, "warm-up", WARM_UP, 10, None)?;
        self.ask(name, "short generation", GENERATION, 32, generation)?;
        self.ask(name, "classification", CLASSIFICATION, 10, classification)?;
        self.backend.unload()?;
        self.reclaimed(name)
    }

    /// A backend holds one model, and lets go of it before it loads the next.
    fn swap(&mut self, small: &Path, large: &Path) -> Outcome<()> {
        let row = Row::new("swap", "out of memory", "times").exactly(0.0);
        let row = match self.load_and_swap(small, large) {
            Ok(()) => row.measured(0.0),
            Err(error) => row.broken(no_memory(error)?),
        };
        self.rows.push(row);
        self.backend.unload()?;
        self.reclaimed("swap")
    }

    fn load_and_swap(&mut self, small: &Path, large: &Path) -> Result<(), Error> {
        self.load(small)?;
        self.backend.generate(CLASSIFICATION, 10)?;
        let begun = Instant::now();
        self.load(large)?;
        let took_s = begun.elapsed().as_secs_f64();
        self.rows.push(Row::new("swap", "3B → 7B", "s").measured(took_s));
        self.backend.generate(CLASSIFICATION, 10).map(|_| ())
    }

    fn load(&mut self, path: &Path) -> Result<(), Error> {
        eprintln!("loading {}", path.display());
        self.backend.load(path, self.asked.n_gpu_layers, self.asked.n_ctx)
    }

    fn ask(
        &mut self,
        name: &str,
        what: &str,
        prompt: &str,
        max_tokens: u32,
        limit: Option<f64>,
    ) -> Outcome<()> {
        let begun = Instant::now();
        self.backend.generate(prompt, max_tokens)?;
        let took_ms = begun.elapsed().as_secs_f64() * 1000.0;
        self.rows.push(Row::new(name, what, "ms").measured(took_ms).below(limit));
        Ok(())
    }

    fn reclaimed(&mut self, name: &str) -> Outcome<()> {
        let (before, after) = (self.warm.ok_or("nothing was loaded")?, Reading::now());
        let rss = Row::new(name, "RSS after unload", "MB").within(RECLAIMED_MB);
        self.rows.push(rss.compared(before.rss, after.rss));
        let vram = Row::new(name, "VRAM after unload", "MB").within(RECLAIMED_MB);
        // Memory that nobody took cannot come back either.
        self.rows.push(match self.asked.n_gpu_layers {
            0 => vram.because("no layer was on a GPU"),
            _ => vram.compared(before.vram, after.vram).because("no GPU can be used here"),
        });
        Ok(())
    }
}

/// What a figure has to be.
#[derive(Clone, Copy)]
enum Target {
    Below(f64),
    Within(f64),
    Exactly(f64),
}

/// One figure. Without a value it was not measured, and then it never passes.
struct Row {
    name: String,
    unit: &'static str,
    value: Option<f64>,
    target: Option<Target>,
    is_broken: bool,
    note: String,
}

impl Row {
    fn new(phase: &str, what: &str, unit: &'static str) -> Row {
        let name = format!("{phase} {what}");
        Row { name, unit, value: None, target: None, is_broken: false, note: String::new() }
    }

    fn measured(self, value: f64) -> Row {
        Row { value: Some(value), ..self }
    }

    fn compared(self, before: Option<u64>, after: Option<u64>) -> Row {
        let grown = |(before, after)| (after as f64 - before as f64) / 1e6;
        Row { value: before.zip(after).map(grown), ..self }
    }

    fn below(self, limit: Option<f64>) -> Row {
        Row { target: limit.map(Target::Below), ..self }
    }

    fn within(self, limit: f64) -> Row {
        Row { target: Some(Target::Within(limit)), ..self }
    }

    fn exactly(self, wanted: f64) -> Row {
        Row { target: Some(Target::Exactly(wanted)), ..self }
    }

    fn broken(self, error: Error) -> Row {
        Row { is_broken: true, note: error.to_string(), ..self }
    }

    /// Why there is no value; where there is one nothing needs to be said.
    fn because(self, note: &str) -> Row {
        let note = if self.value.is_none() { note.into() } else { self.note };
        Row { note, ..self }
    }

    fn passed(&self) -> Option<bool> {
        let target = self.target?;
        if self.is_broken {
            return Some(false);
        }
        let value = self.value?;
        Some(match target {
            Target::Below(limit) => value < limit,
            Target::Within(limit) => value.abs() <= limit,
            Target::Exactly(wanted) => value == wanted,
        })
    }

    fn print(&self) {
        let value = match (self.value, self.is_broken) {
            (Some(value), _) => format!("{value:.1} {}", self.unit),
            (None, true) => "failed".into(),
            (None, false) => "not measured".into(),
        };
        let target = match self.target {
            Some(Target::Below(limit)) => format!("< {limit} {}", self.unit),
            Some(Target::Within(limit)) => format!("±{limit} {}", self.unit),
            Some(Target::Exactly(wanted)) => format!("= {wanted} {}", self.unit),
            None => String::new(),
        };
        let mark = match (self.target.is_some(), self.passed()) {
            (_, Some(true)) => "✓",
            (_, Some(false)) => "✗",
            (true, None) => "-",
            (false, None) => "",
        };
        let line = format!("{:22}  {value:>14}  {target:>10}  {mark:1}  {}", self.name, self.note);
        println!("{}", line.trim_end());
    }
}

/// The table, the verdict, and the exit code: 0 passed, 1 failed, 3 not decided.
fn conclude(rows: &[Row]) -> ExitCode {
    rows.iter().for_each(Row::print);
    let gates: Vec<Option<bool>> =
        rows.iter().filter(|row| row.target.is_some()).map(Row::passed).collect();
    let (verdict, code) = if gates.contains(&Some(false)) {
        ("SOME BENCHMARKS FAILED", 1)
    } else if gates.contains(&None) {
        ("NOT DECIDED", 3)
    } else {
        ("ALL BENCHMARKS PASSED", 0)
    };
    let count = |wanted| gates.iter().filter(|&&passed| passed == wanted).count();
    println!(
        "\n{verdict}: {} of {} passed, {} failed, {} not measured.",
        count(Some(true)),
        gates.len(),
        count(Some(false)),
        count(None)
    );
    ExitCode::from(code)
}

/// Bytes in use. None, never 0, where nobody tells.
#[derive(Clone, Copy)]
struct Reading {
    rss: Option<u64>,
    vram: Option<u64>,
}

impl Reading {
    fn now() -> Reading {
        let gpus: Vec<_> =
            model::backend_devices().into_iter().filter(|device| device.is_gpu).collect();
        let used =
            gpus.iter().map(|gpu| gpu.memory.map(|(total, free)| total.saturating_sub(free)));
        let vram = if gpus.is_empty() { None } else { used.sum() };
        Reading { rss: memory::resident_bytes(), vram }
    }
}

/// The errors that a row is about; any other ends the program.
fn no_memory(error: Error) -> Result<Error, Error> {
    match error {
        Error::OutOfMemory { .. } | Error::ContextCreation { .. } => Ok(error),
        other => Err(other),
    }
}

fn start(asked: &Asked) -> Outcome<()> {
    let libraries = Path::new(env!("TABAGENT_BUILT_LIBRARIES"));
    let best = modules::usable_modules(libraries)?.remove(0);
    model::start(libraries, &best.name)?;
    println!("module {}, llama.cpp {}", best.name, model::llama_version());
    if let Some(backend) = asked.backend.as_deref().filter(|_| asked.n_gpu_layers != 0) {
        model::load_gpu_backend(backend)?;
    }
    match model::backend_devices().iter().find(|device| device.is_gpu) {
        Some(found) => println!("GPU {}, {}", found.name, found.description),
        None => println!("no GPU: {}", asked.why_no_gpu()),
    }
    Ok(())
}

struct Asked {
    folder: PathBuf,
    /// A library of llama.cpp's that computes on a GPU.
    backend: Option<PathBuf>,
    n_gpu_layers: i32,
    n_ctx: u32,
    small: Option<PathBuf>,
    large: Option<PathBuf>,
}

impl Asked {
    fn read() -> Outcome<Asked> {
        let folder = PathBuf::from("./models");
        let (backend, small, large) = (None, None, None);
        let mut asked = Asked { folder, backend, n_gpu_layers: 99, n_ctx: 2048, small, large };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let value = words.next().ok_or_else(|| format!("`{word}` needs a value"))?;
            match word.as_str() {
                "--model-dir" => asked.folder = value.into(),
                "--backend" => asked.backend = Some(value.into()),
                "--n-gpu-layers" => asked.n_gpu_layers = number(&word, &value)?,
                "--n-ctx" => asked.n_ctx = number(&word, &value)?,
                "--model-3b" => asked.small = Some(value.into()),
                "--model-7b" => asked.large = Some(value.into()),
                _ => return Err(format!("there is no option `{word}`").into()),
            }
        }
        Ok(asked)
    }

    fn why_no_gpu(&self) -> String {
        let why = match &self.backend {
            Some(backend) => format!("the backend `{}` finds none", backend.display()),
            None => "no backend was named with `--backend FILE`".into(),
        };
        gpu::detect().reason.map_or_else(|| why.clone(), |reason| format!("{why} ({reason})"))
    }

    /// The file that was named, or the one in the folder with as many parameters, of 4 bits first.
    fn model(
        &self,
        named: &Option<PathBuf>,
        parameters: std::ops::RangeInclusive<f64>,
    ) -> Outcome<PathBuf> {
        let found = match named {
            Some(path) => gguf::inspect(path)?,
            None => self.found(&parameters)?,
        };
        let billions = found.n_params as f64 / 1e9;
        let path = found.path.display();
        println!("{path}: {billions:.1} billion parameters, {}", found.quantization);
        Ok(found.path)
    }

    fn found(&self, parameters: &std::ops::RangeInclusive<f64>) -> Outcome<Description> {
        let folder = self.folder.display();
        let files = std::fs::read_dir(&self.folder)
            .map_err(|error| format!("the folder `{folder}` cannot be read: {error}"))?;
        let paths = files.filter_map(|file| Some(file.ok()?.path()));
        let models = paths.filter(|path| path.extension().is_some_and(|end| end == "gguf"));
        // Parts of a model after the first are none by themselves.
        let sound = models.filter_map(|path| gguf::inspect(&path).ok());
        sound
            .filter(|model| parameters.contains(&(model.n_params as f64)) && !model.is_embedding)
            .min_by_key(|model| (!model.quantization.contains("Q4"), model.path.clone()))
            .ok_or_else(|| {
                let (least, most) = (parameters.start() / 1e9, parameters.end() / 1e9);
                format!("no model in `{folder}` has {least} to {most} billion parameters").into()
            })
    }
}

fn number<T: std::str::FromStr>(option: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("`{option}` must be a whole number, got `{value}`"))
}
