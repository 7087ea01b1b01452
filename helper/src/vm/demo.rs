//! `cpubond vm demo`: the paper's system in the lab, beside what is usual.

mod counts;
mod mode;
mod system;

use super::image::Host;
use super::lab::Lab;
use super::machine;
use super::setup::Setup;
use super::topology::Topology;
use anyhow::{Context, Result};
use mode::ModeRun;
use serde::Serialize;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use system::{SetupRun, Table};

/// Show the paper's system under real TCP load, beside what is usual.
#[derive(clap::Args)]
#[command(after_help = "\
The server has 4 CPUs and 4 NICs. ApacheBench in the peer sends a new connection for each
request from 8 source addresses.

First the bond alone: a lighttpd on each CPU, asked at a port of its own, under cpu_bound and
under balance-rr. The kernel counts, by CPU and NIC, what is sent.

Then the whole system, at one address and one port: a bond set up by \"cpubond up\", a server
pinned on each CPU by \"cpubond run\", in its three ways to steer; beside the usual set-up, one
NIC, one listener, a worker for each CPU. \"cpubond audit\" follows each request: received,
served and answered on which CPU, by which NIC.

The result is also in target/results/demo.json. Exit code 1 when a promise is not kept: all
requests are served; under cpu_bound 99 % of the packets leave by their CPU's own NIC, and of
the whole system's requests, at least 5,000 each, 99 % stay on one CPU from receive to transmit;
the clients, the audit and the kernel's own counters agree.")]
pub struct Args {
    /// Requests over each mode of the bond
    #[arg(long, default_value_t = 2400, value_parser = clap::value_parser!(u64).range(8..=1_000_000))]
    requests: u64,
    /// Requests to each set-up of the whole system; fewer than 5000 do not keep the promise
    #[arg(long, value_name = "REQUESTS", default_value_t = REQUESTS,
          value_parser = clap::value_parser!(u64).range(8..=1_000_000))]
    system_requests: u64,
    /// Where bonding.ko and bond_cpu_bound.ko are (default: target/modules)
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
}

/// What the demo promises: shares that are local, and of how many requests.
const LOCAL: f64 = 0.99;
const REQUESTS: u64 = 5000;

/// The file's schema is fixed: other tools read it.
#[derive(Serialize)]
struct Report {
    schema: u32,
    kernel: String,
    cpus: u32,
    runs: Vec<Run>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Run {
    /// Has `mode`.
    Mode(ModeRun),
    /// Has `setup` and `steer`.
    Setup(SetupRun),
}

/// Run it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    let host = Host::prepare(args.modules.clone(), false)?;
    let topology = Topology::default();
    let accel = machine::probe(&host);
    eprintln!("cpubond: boot server (4 CPUs, 4 NICs) and peer ({accel:?})");
    let mut lab = Lab::boot(&host, &topology, accel, false)?;

    let mut problems = Vec::new();
    println!("kernel {}, {} CPUs, 4 NICs", host.kernel, topology.cpus);
    let mut modes = Vec::new();
    for mode in ["cpu_bound", "balance-rr"] {
        eprintln!("cpubond: mode {mode}: {} requests", args.requests);
        let (run, wrong) =
            ModeRun::make(&lab, mode, args.requests).with_context(|| format!("mode {mode}"))?;
        problems.extend(wrong);
        modes.push(run);
    }
    println!();
    let mut setups = Vec::new();
    for setup in Setup::ALL {
        let (run, wrong) = SetupRun::make(&lab, setup, args.system_requests)
            .with_context(|| format!("set-up {}, {}", setup.name(), setup.steer()))?;
        problems.extend(wrong);
        setups.push(run);
    }
    problems.extend(lab.complaints()?);

    println!("\nThe whole system, one address and port; requests that stayed on one CPU:");
    print!("{}", Table(&setups));
    let runs = modes.into_iter().map(Run::Mode);
    let report = Report {
        schema: 1,
        kernel: host.kernel.clone(),
        cpus: topology.cpus,
        runs: runs.chain(setups.into_iter().map(Run::Setup)).collect(),
    };
    let path = host.checkout.join("target/results/demo.json");
    let mut json = serde_json::to_string_pretty(&report)?;
    json.push('\n');
    fs::write(&path, json).with_context(|| path.display().to_string())?;
    println!(
        "\nwritten to target/results/demo.json, after {} s",
        start.elapsed().as_secs()
    );
    for problem in &problems {
        eprintln!("cpubond: error: {problem}");
    }
    Ok(ExitCode::from(u8::from(!problems.is_empty())))
}
