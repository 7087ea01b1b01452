//! The command line: one variant a subcommand, one file a subcommand.

use crate::apply::Apply;
use crate::audit::Audit;
use crate::bench::{self, BenchCommand};
use crate::confirm::Confirm;
use crate::down::Down;
use crate::error::Result;
use crate::man::Pages;
use crate::plan::Plan;
use crate::rollback::Rollback;
use crate::run::{Keep, Run};
use crate::show::Show;
use crate::steer::SteerCommand;
use crate::undo::Undo;
use crate::up::Up;
use crate::verify::Verify;
use crate::vm::{self, VmCommand};
use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// Keep every flow on one CPU and one NIC
#[derive(Parser)]
#[command(
    name = "cpubond",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 drift, 4 kernel or module unsupported, \
                  5 partly applied and rolled back."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Plan(Plan),
    Apply(Apply),
    Confirm(Confirm),
    Rollback(Rollback),
    Verify(Verify),
    Undo(Undo),
    Up(Up),
    Show(Show),
    Audit(Audit),
    Down(Down),
    Run(Run),
    #[command(subcommand)]
    Steer(SteerCommand),
    Keep(Keep),
    #[command(name = "man", hide = true)]
    Pages(Pages),
    /// Measure sending, beside every other way to do it
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Run things in the lab's virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
}

/// Parse the command line, run the subcommand, turn its result into an exit code.
pub fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Plan(plan) => plan.run(),
        Command::Apply(apply) => return exit_with(apply.run()),
        Command::Confirm(confirm) => confirm.run(),
        Command::Rollback(rollback) => rollback.run(),
        Command::Verify(verify) => return exit_with(verify.run()),
        Command::Undo(undo) => undo.run(),
        Command::Up(up) => up.run(),
        Command::Show(show) => show.run(),
        Command::Audit(audit) => audit.run(),
        Command::Down(down) => down.run(),
        Command::Run(run) => return exit_with(run.run()),
        Command::Steer(command) => command.run(),
        Command::Keep(keep) => return exit_with(keep.run()),
        Command::Pages(pages) => pages.run(Cli::command()),
        Command::Bench(command) => return bench::run(&command),
        Command::Vm(command) => return vm::run(&command),
    };
    exit_with(result.map(|()| ExitCode::SUCCESS))
}

fn exit_with(result: Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cpubond: {error}");
            ExitCode::from(error.exit as u8)
        }
    }
}
