//! The command line: one variant a subcommand, one file a subcommand.

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Keep every flow on one CPU and one NIC.
#[derive(Parser)]
#[command(name = "cpubond", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {}

/// Parse the command line, run the subcommand, turn its result into an exit code.
pub fn run() -> ExitCode {
    match Cli::parse().command {}
}
