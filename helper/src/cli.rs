//! The command line: one variant a subcommand, one file a subcommand.

use crate::vm::{self, VmCommand};
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
enum Command {
    /// Run things in the lab's virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
}

/// Parse the command line, run the subcommand, turn its result into an exit code.
pub fn run() -> ExitCode {
    match &Cli::parse().command {
        Command::Vm(command) => vm::run(command),
    }
}
