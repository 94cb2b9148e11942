//! The `postbox` program: see `postbox help`.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
