//! `cpubond vm`: the lab. Two machines under QEMU, cabled NIC to NIC: `server` with
//! our modules, `peer` with the stock kernel as the switch's end of the aggregate.
//!
//! ```text
//! host: test, shell, demo ─ lab ─ machine (QEMU, monitor, console) × 2
//!                                 guest   (commands and calls, JSON lines)
//!                                   │ virtio-serial
//! guest: agent ───────────────────── ┘ ─ /run/cpubond.sock ─ cpubond vm call
//! ```

mod agent;
mod clients;
mod console;
mod demo;
pub mod guest;
pub mod image;
mod ktap;
pub mod lab;
pub mod machine;
mod mark;
mod micro;
pub mod setup;
mod shell;
mod test;
pub mod topology;
mod traffic;
mod wire;

use std::process::ExitCode;

/// Run things in the lab's virtual machines.
#[derive(clap::Subcommand)]
pub enum VmCommand {
    /// Run guest tests
    Test(test::Args),
    /// The paper's system under real TCP load, beside what is usual
    Demo(demo::Args),
    /// A shell in a machine of the lab
    Shell(shell::Args),
    /// In a guest: do what the host says
    #[command(hide = true)]
    Agent,
    /// In a guest: ask the host for something
    #[command(hide = true)]
    Call {
        /// `run server|peer CMD`, `link ethK on|off`, or `profile arm|status|show ARG`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// In a guest: open and close a region that the profiler counts
    #[command(subcommand, hide = true)]
    Mark(mark::MarkCommand),
    /// In a guest: a program with known figures, to test the profiler by
    #[command(hide = true)]
    Micro(micro::Args),
    /// In a guest: traffic that counts what becomes of it
    #[command(subcommand, hide = true)]
    Traffic(traffic::TrafficCommand),
}

/// Run one, with what went wrong on one line.
pub fn run(command: &VmCommand) -> ExitCode {
    let result = match command {
        VmCommand::Test(args) => test::run(args),
        VmCommand::Demo(args) => demo::run(args),
        VmCommand::Shell(args) => shell::run(args),
        VmCommand::Agent => agent::run(),
        VmCommand::Call { args } => agent::call(args),
        VmCommand::Mark(command) => mark::run(command),
        VmCommand::Micro(args) => micro::run(args),
        VmCommand::Traffic(command) => traffic::run(command),
    };
    result.unwrap_or_else(|error| {
        eprintln!("cpubond: error: {error:#}");
        ExitCode::FAILURE
    })
}
