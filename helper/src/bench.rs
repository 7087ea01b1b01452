//! `cpubond bench`: what can be counted exactly without a performance monitoring unit.
//!
//! | subcommand | what |
//! |---|---|
//! | `tx` | the transmit path, by each peer |
//! | `system` | a whole server, in each set-up |
//! | `all` | everything, and the report |
//! | `report` | figures and `docs/results.md` from what was measured |
//! | `prof` | one load under the profiler, function by function |
//! | `native` | the same peers on real NICs, by the clock |
//! | `ask` | the client of that, on another machine |

mod all;
mod ask;
mod figures;
mod gate;
mod load;
mod model;
mod native;
mod peer;
mod prof;
pub mod profile;
mod progress;
mod queue_id;
mod report;
mod results;
mod state;
mod system;
mod team;
mod tx;

use crate::vm::image::Host;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Measure, beside every other way to send.
#[derive(clap::Subcommand)]
pub enum BenchCommand {
    Tx(tx::Args),
    System(system::Args),
    All(all::All),
    Report(report::Report),
    Prof(prof::Prof),
    Native(native::Native),
    Ask(ask::Ask),
    /// In the lab's server: set a peer up
    #[command(hide = true)]
    SetUp(load::SetUp),
    /// In the lab's server: send
    #[command(hide = true)]
    Send(load::Send),
    /// In the lab's peer: answer requests
    #[command(hide = true)]
    Answer(load::Answer),
}

/// Run one, with what went wrong on one line.
pub fn run(command: &BenchCommand) -> ExitCode {
    let result = match command {
        BenchCommand::Tx(args) => tx::run(args),
        BenchCommand::System(args) => system::run(args),
        BenchCommand::All(all) => all.run(),
        BenchCommand::Report(report) => report.run(),
        BenchCommand::Prof(prof) => prof.run(),
        BenchCommand::Native(native) => native.run(),
        BenchCommand::SetUp(set_up) => set_up.run(),
        BenchCommand::Send(send) => send.run(),
        BenchCommand::Answer(answer) => answer.run(),
        BenchCommand::Ask(ask) => ask.run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("cpubond: error: {error:#}");
        ExitCode::FAILURE
    })
}

/// The commit that is checked out, and whether something is not in it; empty without git.
fn commit(host: &Host) -> String {
    let output = Command::new("git")
        .arg("-C")
        .arg(&host.checkout)
        .args(["describe", "--always", "--dirty"])
        .output();
    match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => String::new(),
    }
}

/// What a measurement depends on: the kernel, our modules, this program, the profiler.
fn key(host: &Host) -> Result<String> {
    let mut files = host.modules()?;
    files.push(std::env::current_exe().context("cannot find this program's own file")?);
    files.push(host.profiler()?);
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    Ok(format!("{} {}", host.kernel, state::hash(&files)?))
}

/// The checkout that we are in.
fn checkout() -> Result<PathBuf> {
    let here = std::env::current_dir().context("the current directory is gone")?;
    here.ancestors()
        .find(|dir| dir.join("scripts/guest-image.sh").is_file())
        .map(Path::to_owned)
        .with_context(|| {
            format!(
                "{}: not inside a cpubond checkout; cd there",
                here.display()
            )
        })
}

/// Write a file, whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let what = || path.display().to_string();
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).with_context(what)?;
    let file = tempfile::NamedTempFile::new_in(dir).with_context(what)?;
    std::fs::write(file.path(), bytes).with_context(what)?;
    let file = file.persist(path).with_context(what)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.set_permissions(mode).with_context(what)
}
