//! `cpubond vm traffic`: traffic of the guest tests' own, for what stock tools do not
//! count. Each prints one line of JSON.
//!
//! | sends | receives | what it is for |
//! |---|---|---|
//! | `send` | `receive` | numbered datagrams at a steady pace: lost, duplicated, reordered, gaps |
//! | `ask` | `answer` | requests by TCP or UDP from and to several addresses: which are answered, and on which CPU |
//! | `bulk` | `drain` | one TCP stream by a thread that hops CPUs: what arrives out of order |

mod bulk;
mod count;
mod stream;
mod talk;

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, Protocol, SocketType};
use rustix::thread::CpuSet;
use serde::Serialize;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

/// Traffic of the guest tests.
#[derive(clap::Subcommand)]
pub enum TrafficCommand {
    /// Send numbered datagrams at a steady pace, pulling a cable now and then
    Send(stream::Send),
    /// Count what arrives of them
    Receive(stream::Receive),
    /// Send requests, and count what becomes of them
    Ask(talk::Ask),
    /// Answer requests until killed
    Answer(talk::Answer),
    /// Send one TCP stream, from one CPU after the other
    Bulk(bulk::Bulk),
    /// Take one TCP stream to its end
    Drain(bulk::Drain),
}

/// Run one.
pub fn run(command: &TrafficCommand) -> Result<ExitCode> {
    // What `reset.sh` knows it by: the agent has the same program name.
    rustix::thread::set_name(c"traffic").context("cannot set this thread's name")?;
    match command {
        TrafficCommand::Send(send) => send.run(),
        TrafficCommand::Receive(receive) => receive.run(),
        TrafficCommand::Ask(ask) => ask.run(),
        TrafficCommand::Answer(answer) => answer.run(),
        TrafficCommand::Bulk(bulk) => bulk.run(),
        TrafficCommand::Drain(drain) => drain.run(),
    }
}

/// Versioned, as all JSON of ours.
#[derive(Serialize)]
struct Versioned<T> {
    schema: u32,
    #[serde(flatten)]
    report: T,
}

/// Print the one line.
fn tell(report: impl Serialize) -> Result<()> {
    let line = serde_json::to_string(&Versioned { schema: 1, report })?;
    println!("{line}");
    Ok(())
}

/// Have the calling thread, or the one given, run on one CPU.
fn pin(thread: Option<rustix::thread::Pid>, cpu: u32) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(usize::try_from(cpu)?);
    rustix::thread::sched_setaffinity(thread, &set)
        .with_context(|| format!("CPU {cpu}: cannot run there"))
}

/// A socket bound to `from`, on a port of the kernel's choice; std's can be bound or
/// connected, not both.
fn bound_socket(kind: SocketType, protocol: Protocol, from: IpAddr) -> Result<OwnedFd> {
    let family = match from {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = rustix::net::socket(family, kind, Some(protocol)).context("socket")?;
    rustix::net::bind(&socket, &SocketAddr::new(from, 0))
        .with_context(|| format!("{from}: not an address of this machine"))?;
    Ok(socket)
}
