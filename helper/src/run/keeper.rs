//! `cpubond keep`, started by `cpubond run` for each daemon: pins itself, so that all it starts is
//! pinned too, runs the daemon, and sees to it that nothing of it is left behind.
//!
//! It is a child subreaper: whatever descends from it ends up as its child, even if it has become
//! a daemon by forking twice. If `cpubond run` dies, however it does, the kernel sends SIGTERM to
//! the keeper, which then stops them all.

use super::signals::Signals;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::listeners;
use clap::Args;
use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process, set_child_subreaper,
    set_parent_process_death_signal, wait,
};
use rustix::thread::{CpuSet, sched_setaffinity};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How often SIGKILL is sent to what is still being forked.
const KILL_AGAIN: Duration = Duration::from_millis(50);

/// Run one daemon for "cpubond run"
#[derive(Args, Debug)]
#[command(hide = true)]
pub struct Keep {
    /// CPU to pin to
    #[arg(long)]
    cpu: u32,
    /// NUMA node to allocate memory on if it has any left
    #[arg(long)]
    node: Option<u32>,
    /// The process whose end is ours
    #[arg(long)]
    parent: u32,
    /// Seconds between SIGTERM and SIGKILL
    #[arg(long)]
    grace: u64,
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

impl Keep {
    /// The daemon's exit code, 128 + N if signal N ended it, as a shell has it.
    pub fn run(&self) -> Result<ExitCode> {
        let place = |what: &'static str| move |error| Error::new(what, io::Error::from(error));
        set_parent_process_death_signal(Some(Signal::TERM)).map_err(place("prctl"))?;
        // It may have died before that.
        if getppid().map_or(0, pid_number) != self.parent {
            return Err(Error::new("cpubond run", "has ended"));
        }
        set_child_subreaper(Some(getpid())).map_err(place("prctl"))?;
        let signals = Signals::catch(&[SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2])
            .map_err(|error| Error::new("signal handler", error))?;
        self.pin()?;
        if let Some(node) = self.node {
            prefer_memory_of(node)?;
        }
        let (program, words) = self.command.split_first().expect("clap requires one");
        let daemon = match Command::new(program)
            .args(words)
            .stdin(Stdio::null())
            .spawn()
        {
            Ok(child) => child,
            Err(error) => {
                eprintln!("cpubond: {program}: cannot be started: {error}");
                // As a shell has it.
                let missing = error.kind() == io::ErrorKind::NotFound;
                return Ok(ExitCode::from(if missing { 127 } else { 126 }));
            }
        };
        self.keep(&signals, pid(daemon.id()))
            .map_err(|error| Error::new(program, error))
    }

    /// Until nothing is left.
    fn keep(&self, signals: &Signals, daemon: Option<Pid>) -> io::Result<ExitCode> {
        let mut code = 0;
        let mut running = daemon;
        // When SIGKILL is due.
        let mut deadline: Option<Instant> = None;
        loop {
            loop {
                match wait(WaitOptions::NOHANG) {
                    Ok(Some((ended, status))) if Some(ended) == running => {
                        running = None;
                        code = exit_code(status);
                        // One that ends well may have made itself a daemon, which goes on. One
                        // that crashed is started again, and needs the port.
                        if code != 0 && deadline.is_none() {
                            deadline = Some(Instant::now());
                        }
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(rustix::io::Errno::CHILD) => return Ok(ExitCode::from(code)),
                    Err(error) => return Err(error.into()),
                }
            }
            // Both, so that neither stays behind for the next round.
            if signals.came(SIGTERM) | signals.came(SIGINT) && deadline.is_none() {
                signal_all(Signal::TERM);
                deadline = Some(Instant::now() + Duration::from_secs(self.grace));
            }
            for (number, signal) in [
                (SIGHUP, Signal::HUP),
                (SIGUSR1, Signal::USR1),
                (SIGUSR2, Signal::USR2),
            ] {
                if signals.came(number)
                    && let Some(daemon) = running
                {
                    kill_process(daemon, signal)?;
                }
            }
            let timeout = match deadline {
                Some(deadline) if deadline <= Instant::now() => {
                    signal_all(Signal::KILL);
                    Some(KILL_AGAIN)
                }
                Some(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
                None => None,
            };
            signals.wait(timeout, None)?;
        }
    }

    fn pin(&self) -> Result<()> {
        let place = format!("CPU {}", self.cpu);
        let cpu = usize::try_from(self.cpu).unwrap_or(usize::MAX);
        if cpu >= CpuSet::MAX_CPU {
            return Err(Error::new(
                place,
                format_args!("only CPUs below {} can be pinned to", CpuSet::MAX_CPU),
            ));
        }
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set).map_err(|error| {
            Error::new(
                place,
                format_args!("cannot be pinned to: {}", io::Error::from(error)),
            )
            .fix("it must be online, and in the cpuset of this process")
        })
    }
}

/// Memory of this process and of all it starts comes from the node, and only if that has none
/// left from another.
fn prefer_memory_of(node: u32) -> Result<()> {
    const MPOL_PREFERRED: libc::c_int = 1;
    const BITS: u32 = libc::c_ulong::BITS;
    let mut mask = vec![0 as libc::c_ulong; (node / BITS + 1) as usize];
    mask[(node / BITS) as usize] = 1 << (node % BITS);
    // The kernel takes one bit less than it is told of.
    let bits = mask.len() * BITS as usize + 1;
    // SAFETY: the kernel reads `bits - 1` bits from the mask, which has that many, and keeps no
    // pointer to it.
    let done =
        unsafe { libc::syscall(libc::SYS_set_mempolicy, MPOL_PREFERRED, mask.as_ptr(), bits) };
    match done {
        0 => Ok(()),
        _ => Err(Error::new(
            format_args!("NUMA node {node}"),
            format_args!(
                "memory policy cannot be set: {}",
                io::Error::last_os_error()
            ),
        )),
    }
}

/// To all that descend from this process.
fn signal_all(signal: Signal) {
    for number in listeners::descendants(&Host::default(), std::process::id()) {
        if let Some(pid) = pid(number) {
            // One that has just ended needs no signal.
            let _ = kill_process(pid, signal);
        }
    }
}

pub fn pid(number: u32) -> Option<Pid> {
    Pid::from_raw(number.cast_signed())
}

fn pid_number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().cast_unsigned()
}

fn exit_code(status: WaitStatus) -> u8 {
    code_of(ExitStatus::from_raw(status.as_raw()))
}

/// 128 + N if signal N ended it.
pub fn code_of(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(u8::MAX)
}
