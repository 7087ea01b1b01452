//! `cpubond bench`: what can be counted exactly without a performance monitoring unit.

mod prof;
pub mod profile;

use std::process::ExitCode;

/// Count what the network path costs, in the lab.
#[derive(clap::Subcommand)]
pub enum BenchCommand {
    Prof(prof::Prof),
}

/// Run one, with what went wrong on one line.
pub fn run(command: &BenchCommand) -> ExitCode {
    let result = match command {
        BenchCommand::Prof(prof) => prof.run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("cpubond: error: {error:#}");
        ExitCode::FAILURE
    })
}
