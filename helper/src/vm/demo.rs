//! `cpubond vm demo`: the same TCP load over `cpu_bound` and over `balance-rr`, and
//! by which NIC each CPU's packets left.

use super::image::Host;
use super::lab::Lab;
use super::machine;
use super::topology::Topology;
use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Show where each CPU's packets leave, under real TCP load.
#[derive(clap::Args)]
#[command(after_help = "\
The server (4 CPUs, 4 NICs) runs one lighttpd on each CPU; ApacheBench in the peer
sends a new connection for each request from 8 source addresses. The kernel counts,
by CPU and NIC, what is sent. The result is also in target/results/demo.json.
Exit code 1 when a request failed, when less than 99 % of the packets left by their
CPU's own NIC under cpu_bound, or when two counts of the kernel disagree.")]
pub struct Args {
    /// Requests over each mode
    #[arg(long, default_value_t = 2400, value_parser = clap::value_parser!(u64).range(8..=1_000_000))]
    requests: u64,
    /// Where bonding.ko and bond_cpu_bound.ko are (default: target/modules)
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
}

/// Clients in the peer, each with an address of its own.
const CLIENTS: u64 = 8;
/// What the demo promises.
const LOCAL: f64 = 0.99;
/// A NIC counts a packet when it completes, the tracepoint when it starts: a few may
/// be between the two.
const IN_FLIGHT: u64 = 16;
const LOAD: Duration = Duration::from_secs(600);
const SETUP: Duration = Duration::from_secs(60);

/// The file's schema is fixed: other tools read it.
#[derive(Serialize)]
struct Report {
    schema: u32,
    kernel: String,
    cpus: u32,
    runs: Vec<Run>,
}

#[derive(Serialize)]
struct Run {
    mode: &'static str,
    requests: u64,
    failed: u64,
    tx_packets: u64,
    tx_local: f64,
    per_cpu: Vec<PerCpu>,
}

#[derive(Serialize)]
struct PerCpu {
    cpu: u32,
    slave: String,
    tx_packets: u64,
    local: f64,
}

/// What the kernel has counted up to some moment.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    /// The NIC whose interrupts are on the CPU.
    own: BTreeMap<u32, String>,
    /// Packets a CPU gave to a NIC.
    xmit: BTreeMap<(u32, String), u64>,
    /// Packets a NIC says it sent.
    tx: BTreeMap<String, u64>,
    /// The policy's own counters of a NIC: local, remote.
    policy: BTreeMap<String, (u64, u64)>,
}

/// Run it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let host = Host::prepare(args.modules.clone(), false)?;
    let topology = Topology::default();
    let accel = machine::probe(&host);
    eprintln!("cpubond: boot server (4 CPUs, 4 NICs) and peer ({accel:?})");
    let mut lab = Lab::boot(&host, &topology, accel, false)?;

    let mut report = Report {
        schema: 1,
        kernel: host.kernel.clone(),
        cpus: topology.cpus,
        runs: Vec::new(),
    };
    let mut problems = Vec::new();
    println!("kernel {}, {} CPUs, 4 NICs", host.kernel, topology.cpus);
    for mode in ["cpu_bound", "balance-rr"] {
        let (run, mut wrong) =
            one(&lab, mode, args.requests).with_context(|| format!("mode {mode}"))?;
        problems.append(&mut wrong);
        report.runs.push(run);
    }
    problems.extend(lab.complaints()?);

    let path = host.checkout.join("target/results/demo.json");
    let mut json = serde_json::to_string_pretty(&report)?;
    json.push('\n');
    fs::write(&path, json).with_context(|| path.display().to_string())?;
    println!("\nwritten to target/results/demo.json");
    for problem in &problems {
        eprintln!("cpubond: error: {problem}");
    }
    Ok(ExitCode::from(u8::from(!problems.is_empty())))
}

/// One mode, from nothing; also what is wrong with its result.
fn one(lab: &Lab, mode: &'static str, requests: u64) -> Result<(Run, Vec<String>)> {
    lab.reset("balance-xor")?;
    let server = lab.server();
    server.output(&format!("/cpubond/guest/demo.sh start {mode}"), SETUP)?;
    let read = || -> Result<Counts> {
        Counts::parse(&server.output("/cpubond/guest/demo.sh read", SETUP)?)
    };
    let before = read()?;
    let start = Instant::now();
    // Each client writes its own report; all are shown when all have ended.
    let each = requests.div_ceil(CLIENTS);
    let cpus = lab.topology().cpus;
    let clients = format!(
        "for i in {{0..{last}}}; do
            ab -q -n {each} -c 4 -B 10.0.0.$((11 + i)) \
                http://10.0.0.1:$((8000 + i % {cpus}))/ >/tmp/ab-$i 2>&1 &
            pids[i]=$!
        done
        rc=0
        for i in {{0..{last}}}; do wait ${{pids[i]}} || rc=$?; cat /tmp/ab-$i; done
        exit $rc",
        last = CLIENTS - 1
    );
    let load = lab
        .peer()
        .output(&clients, LOAD)
        .map_err(|error| anyhow!("the load in the peer failed: {error:#}"))?;
    let seconds = start.elapsed().as_secs_f64();
    // Connections are still being closed.
    server.output("sleep 1", SETUP)?;
    let counts = read()?.since(&before);

    let (requests, failed) = parse_ab(&load);
    let run = counts.run(mode, requests, failed, cpus)?;
    show(&run, &counts, seconds);
    let problems = counts.problems(&run, each * CLIENTS);
    Ok((run, problems))
}

/// Sums over the reports of all clients: complete, failed.
fn parse_ab(text: &str) -> (u64, u64) {
    let sum = |label: &str| -> u64 {
        text.lines()
            .filter_map(|line| line.strip_prefix(label)?.trim().parse::<u64>().ok())
            .sum()
    };
    (
        sum("Complete requests:"),
        sum("Failed requests:") + sum("Non-2xx responses:"),
    )
}

impl Counts {
    fn parse(text: &str) -> Result<Self> {
        let mut counts = Self::default();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |word: &str| -> Result<u64> {
                word.parse()
                    .map_err(|_| anyhow!("'{line}': '{word}' is not a number"))
            };
            let cpu = |word: &str| -> Result<u32> {
                word.parse()
                    .map_err(|_| anyhow!("'{line}': '{word}' is not one CPU"))
            };
            match words[..] {
                ["own", on, dev] => {
                    counts.own.insert(cpu(on)?, dev.to_owned());
                }
                ["xmit", on, dev, count] => {
                    counts
                        .xmit
                        .insert((cpu(on)?, dev.to_owned()), number(count)?);
                }
                ["tx", dev, count] => {
                    counts.tx.insert(dev.to_owned(), number(count)?);
                }
                ["policy", dev, local, remote] => {
                    let both = (number(local)?, number(remote)?);
                    counts.policy.insert(dev.to_owned(), both);
                }
                _ => bail!("the server's counts: not understood: '{line}'"),
            }
        }
        Ok(counts)
    }

    /// What was counted in between. Who owns what is as it is now.
    fn since(mut self, before: &Self) -> Self {
        for (key, count) in &mut self.xmit {
            *count = count.saturating_sub(before.xmit.get(key).copied().unwrap_or(0));
        }
        for (key, count) in &mut self.tx {
            *count = count.saturating_sub(before.tx.get(key).copied().unwrap_or(0));
        }
        for (key, (local, remote)) in &mut self.policy {
            let (local_before, remote_before) = before.policy.get(key).copied().unwrap_or((0, 0));
            *local = local.saturating_sub(local_before);
            *remote = remote.saturating_sub(remote_before);
        }
        self
    }

    fn sent(&self, cpu: u32, dev: &str) -> u64 {
        self.xmit.get(&(cpu, dev.to_owned())).copied().unwrap_or(0)
    }

    fn run(&self, mode: &'static str, requests: u64, failed: u64, cpus: u32) -> Result<Run> {
        let mut per_cpu = Vec::new();
        let (mut all, mut own) = (0, 0);
        for cpu in 0..cpus {
            let slave = self
                .own
                .get(&cpu)
                .ok_or_else(|| anyhow!("no NIC has its interrupts on CPU {cpu}"))?;
            let total: u64 = self.tx.keys().map(|dev| self.sent(cpu, dev)).sum();
            let local = self.sent(cpu, slave);
            all += total;
            own += local;
            per_cpu.push(PerCpu {
                cpu,
                slave: slave.clone(),
                tx_packets: total,
                local: share(local, total),
            });
        }
        Ok(Run {
            mode,
            requests,
            failed,
            tx_packets: all,
            tx_local: share(own, all),
            per_cpu,
        })
    }

    /// What the demo promises and did not keep.
    fn problems(&self, run: &Run, requests: u64) -> Vec<String> {
        let mut problems = Vec::new();
        let mode = run.mode;
        if run.requests != requests || run.failed != 0 {
            problems.push(format!(
                "{mode}: of {requests} requests, {} were complete and {} failed",
                run.requests, run.failed
            ));
        }
        // A request is at least SYN-ACK, reply and FIN from the server.
        if run.tx_packets < 3 * run.requests {
            problems.push(format!(
                "{mode}: {} packets are too few for {} requests",
                run.tx_packets, run.requests
            ));
        }
        if mode == "cpu_bound" {
            for cpu in &run.per_cpu {
                if cpu.tx_packets == 0 {
                    problems.push(format!("{mode}: CPU {} sent nothing", cpu.cpu));
                }
            }
            if run.tx_local < LOCAL {
                problems.push(format!(
                    "{mode}: only {:.4} of the packets left by their CPU's own NIC (at least {LOCAL} is promised)",
                    run.tx_local
                ));
            }
        }
        for (dev, &tx) in &self.tx {
            let traced: u64 = (0..)
                .zip(&run.per_cpu)
                .map(|(cpu, _)| self.sent(cpu, dev))
                .sum();
            if !close(traced, tx) {
                problems.push(format!(
                    "{mode}: {dev}: the tracepoint counted {traced} packets, the device {tx}"
                ));
            }
            let Some(&(local, remote)) = self.policy.get(dev) else {
                if mode == "cpu_bound" {
                    problems.push(format!("{mode}: {dev} has no cpu_bound_stats"));
                }
                continue;
            };
            let own = self
                .own
                .iter()
                .find(|(_, owned)| *owned == dev)
                .map_or(0, |(&cpu, _)| self.sent(cpu, dev));
            if mode == "cpu_bound" && !(close(local, own) && close(local + remote, traced)) {
                problems.push(format!(
                    "{mode}: {dev}: the policy counted {local} local and {remote} remote packets, the tracepoint {own} and {}",
                    traced.saturating_sub(own)
                ));
            }
        }
        problems
    }
}

/// Equal but for packets in flight, or 1 %.
fn close(a: u64, b: u64) -> bool {
    a.abs_diff(b) <= IN_FLIGHT.max(a.max(b) / 100)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "packet counts of one run are far below 2^52"
)]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

fn show(run: &Run, counts: &Counts, seconds: f64) {
    println!(
        "\n{}: {} requests, {} failed, {:.0} s; {} packets sent, {:.2} % by their CPU's own NIC",
        run.mode,
        run.requests,
        run.failed,
        seconds,
        run.tx_packets,
        100.0 * run.tx_local
    );
    print!("  CPU  own NIC  packets  own share ");
    for dev in counts.tx.keys() {
        print!(" {dev:>8}");
    }
    println!();
    for cpu in &run.per_cpu {
        print!(
            "  {:>3}  {:<7}  {:>7}  {:>7.2} % ",
            cpu.cpu,
            cpu.slave,
            cpu.tx_packets,
            100.0 * cpu.local
        );
        for dev in counts.tx.keys() {
            print!(" {:>8}", counts.sent(cpu.cpu, dev));
        }
        println!();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: &str = "own 0 eth0\nown 1 eth1\ntx eth0 110\ntx eth1 100\n\
        policy eth0 110 0\npolicy eth1 99 1\n\
        xmit 0 eth0 110\nxmit 0 eth1 1\nxmit 1 eth1 99\n";

    fn counts() -> Counts {
        Counts::parse(READ).expect("parses")
    }

    #[test]
    fn shares_come_from_the_tracepoint() {
        let run = counts().run("cpu_bound", 50, 0, 2).expect("complete");
        assert_eq!(run.tx_packets, 210);
        assert!((run.tx_local - 209.0 / 210.0).abs() < 1e-9);
        assert_eq!(run.per_cpu[0].tx_packets, 111);
        assert!(counts().problems(&run, 50).is_empty());
    }

    #[test]
    fn counts_that_disagree_are_a_problem() {
        let mut counts = counts();
        counts.tx.insert("eth0".to_owned(), 150);
        let run = counts.run("cpu_bound", 50, 0, 2).expect("complete");
        assert!(counts.problems(&run, 50)[0].contains("the device 150"));
    }

    #[test]
    fn a_broken_promise_is_a_problem() {
        let mut counts = counts();
        counts.xmit.insert((0, "eth1".to_owned()), 40);
        counts.tx.insert("eth1".to_owned(), 139);
        counts.policy.insert("eth1".to_owned(), (99, 40));
        let run = counts.run("cpu_bound", 50, 1, 2).expect("complete");
        let problems = counts.problems(&run, 50);
        assert_eq!(problems.len(), 2, "{problems:?}");
        let run = counts.run("balance-rr", 50, 0, 2).expect("complete");
        assert!(counts.problems(&run, 50).is_empty());
    }

    #[test]
    fn only_what_came_in_between_counts() {
        let delta = counts().since(&counts());
        assert!(delta.xmit.values().all(|&count| count == 0));
        assert_eq!(delta.own, counts().own);
    }

    #[test]
    fn all_clients_are_summed() {
        let text = "Complete requests:      300\nFailed requests:        0\n\
            Complete requests:      300\nFailed requests:        2\nNon-2xx responses:      1\n";
        assert_eq!(parse_ab(text), (600, 3));
    }
}
