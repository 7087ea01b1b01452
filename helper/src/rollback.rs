//! `cpubond rollback`, and the guard that does it when an apply is not confirmed in time.
//!
//! The guard is a process of its own, in a session of its own, and has nothing but the journal to
//! go by. It waits for the lock: when it gets it, the apply has ended, one way or another.
//!
//! - The apply failed and took its changes back, or was confirmed, or undone: nothing to do.
//! - It was killed: its changes are taken back at once.
//! - It waits to be confirmed: so does the guard. Then it takes the lock and looks again: whoever
//!   has the lock first, the guard or a `confirm`, decides, and the other finds nothing to do.
//! - The guard was killed: what is journalled stays as it is. `confirm` keeps it, `rollback` takes
//!   it back, `undo` undoes everything; no other apply is let in before.

use crate::check::check_privilege;
use crate::error::{Error, Exit, Result};
use crate::host::Host;
use crate::journal::{Journal, Lock, State};
use crate::netlink::Rtnetlink;
use clap::Args;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// Take back an apply that waits to be confirmed
#[derive(Args, Debug)]
#[command(
    long_about = "Take back the changes of an apply that waits to be confirmed, without waiting \
        for its time to run out; or those of one that was killed, or whose own rollback failed or \
        was killed. The machine is then as it was before that apply.",
    after_long_help = "Example:\n  cpubond apply --rollback-after 5m; cpubond rollback"
)]
pub struct Rollback {
    /// Wait for the apply with this number, and for its time to run out
    #[arg(long, hide = true, value_name = "ID")]
    guard: Option<u64>,
}

impl Rollback {
    pub fn run(&self) -> Result<()> {
        let host = Host::default();
        match self.guard {
            Some(id) => guard(&host, id),
            None => {
                check_privilege(&host, "cpubond rollback")?;
                let _lock = Lock::wait(&host)?;
                let mut journal = Journal::open(&host)?;
                if journal.pending.is_none() {
                    return Err(nothing(&host, "there is nothing to roll back"));
                }
                roll_back(&host, &mut journal)
            }
        }
    }
}

fn roll_back(host: &Host, journal: &mut Journal) -> Result<()> {
    let undoing = journal.roll_back(host, &mut Rtnetlink::open()?);
    undoing.report();
    match undoing.errors.len() {
        0 => {
            println!("rolled back, {} changes taken back", undoing.restored);
            Ok(())
        }
        errors => Err(Error::new(
            "cpubond rollback",
            format_args!("{errors} changes could not be taken back"),
        )
        .fix("run it again once the cause is gone, or \"cpubond undo\"")
        .exit(Exit::RolledBack)),
    }
}

/// The error for a command that finds no apply pending, with what became of the last one.
pub fn nothing(host: &Host, found: &str) -> Error {
    let error = Error::new("cpubond", found);
    let log = fs::read_to_string(log_path(host)).unwrap_or_default();
    match log.lines().last() {
        Some(line) => error.fix(format_args!("the last one: {line}")),
        None => error,
    }
}

/// What guards have said.
fn log_path(host: &Host) -> PathBuf {
    host.run.join("rollback.log")
}

/// A process that waits to roll an apply back.
pub struct Guard {
    /// Of the apply it waits for.
    pub id: u64,
}

impl Guard {
    /// Start one, and wait until the end of this session can do it no harm.
    pub fn start(host: &Host) -> Result<Self> {
        let id = host.uptime()?;
        let start = || -> std::io::Result<String> {
            fs::create_dir_all(&host.run)?;
            let log = OpenOptions::new()
                .create(true)
                .append(true)
                .open(log_path(host))?;
            let mut child = Command::new(std::env::current_exe()?)
                .args(["rollback", "--guard", &id.to_string()])
                .current_dir("/")
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(log)
                .spawn()?;
            let mut line = String::new();
            if let Some(stdout) = child.stdout.take() {
                BufReader::new(stdout).read_line(&mut line)?;
            }
            Ok(line)
        };
        match start() {
            Ok(line) if line.trim() == READY => Ok(Self { id }),
            Ok(_) => Err(Error::new("guard", "did not start")
                .fix(format_args!("{} may say why", log_path(host).display()))),
            Err(error) => Err(Error::new("guard", error)),
        }
    }
}

const READY: &str = "ready";

fn guard(host: &Host, id: u64) -> Result<()> {
    // Fails only if this is a session of its own already.
    let _ = rustix::process::setsid();
    let ready = writeln!(std::io::stdout(), "{READY}");
    ready.map_err(|error| Error::new("guard", error))?;
    loop {
        let lock = Lock::wait(host)?;
        let mut journal = Journal::open(host)?;
        let Some(pending) = journal
            .pending
            .as_ref()
            .filter(|pending| pending.guard == Some(id))
        else {
            return Ok(());
        };
        let rest = match (pending.state, pending.deadline) {
            (State::Unconfirmed, Some(deadline)) => deadline.saturating_sub(host.uptime()?),
            _ => 0,
        };
        if rest == 0 {
            let why = match pending.state {
                State::Unconfirmed => "was not confirmed in time",
                State::Applying => "was killed",
                State::RollingBack => "was not rolled back in full",
            };
            let undoing = journal.roll_back(host, &mut Rtnetlink::open()?);
            undoing.report();
            eprintln!(
                "it {why} and was rolled back: {} changes taken back, {} errors",
                undoing.restored,
                undoing.errors.len()
            );
            return Ok(());
        }
        drop(lock);
        // Time goes on while the machine sleeps, but no sleep does: look again now and then, also
        // for whether there is anything left to wait for.
        thread::sleep(Duration::from_millis(rest.min(500)));
    }
}
