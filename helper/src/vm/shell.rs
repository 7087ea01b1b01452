//! `cpubond vm shell`: a shell in one of two booted machines.

use super::image::{Host, Role};
use super::lab::Lab;
use super::machine;
use super::topology::Topology;
use anyhow::{Context, Result};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;

/// Boot the lab and give a shell in one of its machines.
#[derive(clap::Args)]
#[command(after_help = "\
Ctrl-] ends it. The peer has its bond up; tests are in /cpubond/tests, and
'cpubond vm call run peer CMD' runs a command in the other machine.")]
pub struct Args {
    /// Which machine
    #[arg(value_enum, default_value = "server")]
    machine: Which,
    /// CPUs of the server
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// NICs of both
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=24))]
    nics: u32,
    /// Queue pairs of each server NIC
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    queues: u32,
    /// Mode of the peer's bond
    #[arg(long, default_value = "balance-xor", value_parser = ["balance-xor", "802.3ad", "none"])]
    peer: String,
    /// Run the server on the stock bonding driver
    #[arg(long)]
    stock: bool,
    /// Where bonding.ko and bond_cpu_bound.ko are (default: target/modules)
    #[arg(long, value_name = "DIR", conflicts_with = "stock")]
    modules: Option<PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Which {
    Server,
    Peer,
}

/// Ctrl-], as in telnet.
const ESCAPE: u8 = 0x1d;

/// Boot, connect, hand over the terminal.
pub fn run(args: &Args) -> Result<ExitCode> {
    let host = Host::prepare(args.modules.clone(), args.stock)?;
    let topology = Topology {
        cpus: args.cpus,
        nics: args.nics,
        queues: args.queues,
        ..Topology::default()
    };
    eprintln!("cpubond: boot server and peer");
    let lab = Lab::boot(&host, &topology, machine::probe(&host), true)?;
    lab.make_peer(&args.peer)?;
    let role = match args.machine {
        Which::Server => Role::Server,
        Which::Peer => Role::Peer,
    };
    let mut shell = UnixStream::connect(lab.shell_socket(role)).context("no shell there")?;
    eprintln!("cpubond: shell in the {}; Ctrl-] ends it", role.name());
    let _raw = RawTerminal::enter();
    // The shell was started before anybody listened: ask for a new prompt.
    shell.write_all(b"\n")?;

    let mut from = shell.try_clone()?;
    let output = thread::spawn(move || {
        let mut out = io::stdout();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if out
                .write_all(&buffer[..n])
                .and_then(|()| out.flush())
                .is_err()
            {
                break;
            }
        }
    });
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = io::stdin().read(&mut buffer) {
        if let Some(end) = buffer[..n].iter().position(|&byte| byte == ESCAPE) {
            shell.write_all(&buffer[..end])?;
            break;
        }
        if output.is_finished() {
            break;
        }
        shell.write_all(&buffer[..n])?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Keys go to the guest one by one; put back when dropped.
struct RawTerminal;

impl RawTerminal {
    fn enter() -> Option<Self> {
        let raw = io::stdin().is_terminal() && stty(&["raw", "-echo"]);
        raw.then_some(Self)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        stty(&["sane"]);
    }
}

fn stty(args: &[&str]) -> bool {
    Command::new("stty")
        .args(args)
        .status()
        .is_ok_and(|status| status.success())
}
