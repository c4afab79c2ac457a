//! The command line: one short file per command.

mod arguments;
mod bench;
mod cache;
pub mod chart;
mod compare;
mod data;
mod decode;
mod doctor;
mod eval;
mod export;
mod finish;
mod forgetting;
mod generate;
mod inspect;
mod memory;
mod model;
mod plan;
pub mod printer;
mod sweep;
mod train;
mod validate;
mod verify_resume;

use arguments::{Arguments, Command};
use clap::Parser;
use printer::Printer;
use std::process::ExitCode;

/// How a command that ran ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Done,
    /// A check fell short: exit code 1.
    FellShort,
}

/// Parses the command line, runs the command, and turns the result into an exit code: 0 done, 1 a check fell short, 2 the user's mistake.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    keep_memory();
    refuse_large_files_with_an_error();
    let mut printer = Printer::new(arguments.quiet);
    let result = match arguments.command {
        Command::Train(command) => train::run(command, &mut printer),
        Command::Export(command) => export::run(&command, &printer),
        Command::Validate(command) => validate::run(&command, &printer),
        Command::Eval(command) => eval::run(&command, &printer),
        Command::Generate(command) => generate::run(&command, &printer),
        Command::Data(command) => data::run(&command, &printer),
        Command::Plan(command) => plan::run(&command, &printer),
        Command::Inspect(command) => inspect::run(&command, &printer),
        Command::Doctor(command) => doctor::run(&command, &printer),
        Command::Bench(command) => bench::run(&command, &printer),
    };
    match result {
        Ok(Status::Done) => ExitCode::SUCCESS,
        Ok(Status::FellShort) => ExitCode::from(1),
        Err(error) => {
            printer.finish();
            printer.error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Lets the allocator keep freed buffers. By default glibc returns each large one to the system, and the next step pays for fresh pages.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets allocator parameters and is called before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
}

/// A write beyond the limit on file sizes (`ulimit -f`) fails like one on a full disk; by default the system ends the program without a word.
fn refuse_large_files_with_an_error() {
    #[cfg(unix)]
    // SAFETY: only changes what one signal does, before any other thread exists.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Uses `threads` threads for all computation (every core when absent). Called once, before the first parallel work. This thread is one of
/// them: steps that ran now on one thread and now on another would each time allocate from that thread's own heap, and both would keep a
/// step's memory. Parallel work must therefore start here: a thread of its own would wait for this one.
fn start_threads(threads: Option<usize>) -> crate::error::Result<()> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).use_current_thread();
    builder.build_global().map_err(|error| crate::error::Error::input("run.threads", error))
}

/// Writes `value` as indented JSON to `path`, when there is one.
fn write_json(path: Option<&std::path::Path>, value: &impl serde::Serialize) -> crate::error::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(value).map_err(|error| crate::error::Error::file(path, error))?;
    std::fs::write(path, text + "\n").map_err(crate::error::Error::io("write", path))
}
