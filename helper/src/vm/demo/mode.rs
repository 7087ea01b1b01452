//! One bonding mode under load: by which NIC each CPU's packets left.

use super::LOCAL;
use super::counts::{Counts, PerCpu, share};
use crate::vm::clients::{self, Load};
use crate::vm::lab::Lab;
use anyhow::{Result, anyhow};
use serde::Serialize;
use std::time::Duration;

const SETUP: Duration = Duration::from_secs(60);

/// As in `demo.json`.
#[derive(Debug, Serialize)]
pub struct ModeRun {
    mode: &'static str,
    requests: u64,
    failed: u64,
    tx_packets: u64,
    /// Share of the packets.
    tx_local: f64,
    per_cpu: Vec<PerCpu>,
}

impl ModeRun {
    /// From nothing; also what is wrong with its result.
    pub fn make(lab: &Lab, mode: &'static str, requests: u64) -> Result<(Self, Vec<String>)> {
        lab.reset("balance-xor")?;
        let server = lab.server();
        server.output(&format!("/cpubond/guest/demo.sh start {mode}"), SETUP)?;
        let before = Counts::read(server)?;
        let cpus = lab.topology().cpus;
        let ports: Vec<u16> = (8000..).zip(0..cpus).map(|(port, _)| port).collect();
        let load = clients::load(lab, requests, 4, &ports)?;
        // Connections are still being closed.
        server.output("sleep 1", SETUP)?;
        let counts = Counts::read(server)?.since(&before);
        let run = Self::new(mode, &load, &counts, cpus)?;
        run.show(&counts, load.seconds);
        let problems = run.problems(&load, &counts);
        Ok((run, problems))
    }

    fn new(mode: &'static str, load: &Load, counts: &Counts, cpus: u32) -> Result<Self> {
        let per_cpu = counts.per_cpu(cpus);
        if let Some(bare) = per_cpu.iter().find(|cpu| cpu.slave.is_none()) {
            return Err(anyhow!("no NIC has its interrupts on CPU {}", bare.cpu));
        }
        Ok(Self {
            mode,
            requests: load.complete,
            failed: load.failed,
            tx_packets: counts.sent_in_all(),
            tx_local: share(counts.sent_local(), counts.sent_in_all()),
            per_cpu,
        })
    }

    /// What the demo promises and did not keep.
    fn problems(&self, load: &Load, counts: &Counts) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(load.problem());
        // A request is at least SYN-ACK, reply and FIN from the server.
        if self.tx_packets < 3 * self.requests {
            problems.push(format!(
                "{} packets are too few for {} requests",
                self.tx_packets, self.requests
            ));
        }
        let policy = self.mode == "cpu_bound";
        if policy {
            for cpu in &self.per_cpu {
                if cpu.tx_packets == 0 {
                    problems.push(format!("CPU {} sent nothing", cpu.cpu));
                }
            }
            if self.tx_local < LOCAL {
                problems.push(format!(
                    "only {:.4} of the packets left by their CPU's own NIC (at least {LOCAL} is promised)",
                    self.tx_local
                ));
            }
        }
        problems.extend(counts.problems(policy));
        problems
            .into_iter()
            .map(|problem| format!("{}: {problem}", self.mode))
            .collect()
    }

    fn show(&self, counts: &Counts, seconds: f64) {
        println!(
            "\n{}: {} requests, {} failed, {:.0} s; {} packets sent, {:.2} % by their CPU's own NIC",
            self.mode,
            self.requests,
            self.failed,
            seconds,
            self.tx_packets,
            100.0 * self.tx_local
        );
        print!("  CPU  own NIC  packets  own share ");
        for dev in counts.tx.keys() {
            print!(" {dev:>8}");
        }
        println!();
        for cpu in &self.per_cpu {
            print!(
                "  {:>3}  {:<7}  {:>7}  {:>7.2} % ",
                cpu.cpu,
                cpu.slave.as_deref().unwrap_or("-"),
                cpu.tx_packets,
                100.0 * cpu.local
            );
            for dev in counts.tx.keys() {
                print!(" {:>8}", counts.sent(cpu.cpu, dev));
            }
            println!();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::counts::tests::counts;
    use super::*;

    fn load(failed: u64) -> Load {
        Load {
            asked: 50,
            complete: 50,
            failed,
            seconds: 1.0,
        }
    }

    fn problems(mode: &'static str, failed: u64, counts: &Counts) -> Vec<String> {
        let run = ModeRun::new(mode, &load(failed), counts, 2).expect("complete");
        run.problems(&load(failed), counts)
    }

    #[test]
    fn a_kept_promise_is_no_problem() {
        assert!(problems("cpu_bound", 0, &counts()).is_empty());
    }

    #[test]
    fn a_cpu_without_a_nic_is_refused() {
        assert!(ModeRun::new("cpu_bound", &load(0), &counts(), 3).is_err());
    }

    #[test]
    fn a_broken_promise_is_a_problem() {
        let mut counts = counts();
        counts.xmit.insert((0, "eth1".to_owned()), 40);
        counts.tx.insert("eth1".to_owned(), 139);
        counts.policy.insert("eth1".to_owned(), (99, 40));
        let found = problems("cpu_bound", 1, &counts);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(problems("balance-rr", 0, &counts).is_empty());
    }
}
