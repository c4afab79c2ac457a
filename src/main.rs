//! The `osprey` command: runs it, prints what went wrong, and returns the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    osprey::cli::main()
}
