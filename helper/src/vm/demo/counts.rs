//! What the server's kernel counts of what is sent, by CPU and NIC.

use crate::vm::guest::Guest;
use anyhow::{Result, anyhow, bail};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
/// A NIC counts a packet when it completes, the tracepoint when it starts: a few may
/// be between the two.
const IN_FLIGHT: u64 = 16;

/// What the kernel has counted up to some moment.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// The NIC whose interrupts are on the CPU.
    pub own: BTreeMap<u32, String>,
    /// Packets a CPU gave to a NIC.
    pub xmit: BTreeMap<(u32, String), u64>,
    /// Packets a NIC says it sent.
    pub tx: BTreeMap<String, u64>,
    /// The policy's own counters of a NIC: local, remote.
    pub policy: BTreeMap<String, (u64, u64)>,
}

/// What a CPU sent.
#[derive(Debug, PartialEq, Serialize)]
pub struct PerCpu {
    pub cpu: u32,
    /// The NIC whose interrupts are on it; `None` if there is none.
    pub slave: Option<String>,
    pub tx_packets: u64,
    /// Of these, by that NIC.
    pub local: f64,
}

impl Counts {
    /// As they are now.
    pub fn read(server: &Guest) -> Result<Self> {
        Self::parse(&server.output("/cpubond/guest/demo.sh read", LIMIT)?)
    }

    pub fn parse(text: &str) -> Result<Self> {
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
    pub fn since(mut self, before: &Self) -> Self {
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

    pub fn sent(&self, cpu: u32, dev: &str) -> u64 {
        self.xmit.get(&(cpu, dev.to_owned())).copied().unwrap_or(0)
    }

    /// Packets of all CPUs by one NIC, as the tracepoint has them.
    pub fn traced(&self, dev: &str) -> u64 {
        self.xmit
            .iter()
            .filter(|((_, by), _)| by == dev)
            .map(|(_, count)| count)
            .sum()
    }

    /// Packets of all CPUs by all NICs.
    pub fn sent_in_all(&self) -> u64 {
        self.xmit.values().sum()
    }

    /// Of these, by the NIC of the CPU.
    pub fn sent_local(&self) -> u64 {
        self.own.iter().map(|(&cpu, dev)| self.sent(cpu, dev)).sum()
    }

    /// By CPU.
    pub fn per_cpu(&self, cpus: u32) -> Vec<PerCpu> {
        (0..cpus)
            .map(|cpu| {
                let slave = self.own.get(&cpu).cloned();
                let tx_packets = self
                    .xmit
                    .iter()
                    .filter(|((on, _), _)| *on == cpu)
                    .map(|(_, count)| count)
                    .sum();
                let own = slave.as_ref().map_or(0, |slave| self.sent(cpu, slave));
                PerCpu {
                    cpu,
                    slave,
                    tx_packets,
                    local: share(own, tx_packets),
                }
            })
            .collect()
    }

    /// Where two counts of the kernel disagree. Under the policy it has counts of its own.
    pub fn problems(&self, policy: bool) -> Vec<String> {
        let mut problems = Vec::new();
        for (dev, &tx) in &self.tx {
            let traced = self.traced(dev);
            if !close(traced, tx) {
                problems.push(format!(
                    "{dev}: the tracepoint counted {traced} packets, the device {tx}"
                ));
            }
            if !policy {
                continue;
            }
            let Some(&(local, remote)) = self.policy.get(dev) else {
                problems.push(format!("{dev} has no cpu_bound_stats"));
                continue;
            };
            let own = self
                .own
                .iter()
                .find(|(_, owned)| *owned == dev)
                .map_or(0, |(&cpu, _)| self.sent(cpu, dev));
            if !(close(local, own) && close(local + remote, traced)) {
                problems.push(format!(
                    "{dev}: the policy counted {local} local and {remote} remote packets, the tracepoint {own} and {}",
                    traced.saturating_sub(own)
                ));
            }
        }
        problems
    }
}

/// Equal but for packets in flight, or 1 %.
pub fn close(a: u64, b: u64) -> bool {
    a.abs_diff(b) <= IN_FLIGHT.max(a.max(b) / 100)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "packet counts of one run are far below 2^52"
)]
pub fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    const READ: &str = "own 0 eth0\nown 1 eth1\ntx eth0 110\ntx eth1 100\n\
        policy eth0 110 0\npolicy eth1 99 1\n\
        xmit 0 eth0 110\nxmit 0 eth1 1\nxmit 1 eth1 99\n";

    /// Two CPUs, two NICs; one of 210 packets left by the other's.
    pub fn counts() -> Counts {
        Counts::parse(READ).expect("parses")
    }

    #[test]
    fn shares_come_from_the_tracepoint() {
        let counts = counts();
        assert_eq!((counts.sent_in_all(), counts.sent_local()), (210, 209));
        let cpus = counts.per_cpu(3);
        assert_eq!(cpus[0].tx_packets, 111);
        assert!((cpus[0].local - 110.0 / 111.0).abs() < 1e-9);
        assert_eq!((&cpus[2].slave, cpus[2].tx_packets), (&None, 0));
        assert!(counts.problems(true).is_empty());
    }

    #[test]
    fn counts_that_disagree_are_a_problem() {
        let mut counts = counts();
        counts.tx.insert("eth0".to_owned(), 150);
        assert!(counts.problems(false)[0].contains("the device 150"));
        let mut counts = self::counts();
        counts.policy.insert("eth1".to_owned(), (59, 41));
        assert!(counts.problems(false).is_empty());
        assert!(counts.problems(true)[0].contains("59 local"));
        counts.policy.clear();
        assert_eq!(counts.problems(true).len(), 2);
    }

    #[test]
    fn only_what_came_in_between_counts() {
        let delta = counts().since(&counts());
        assert!(delta.xmit.values().all(|&count| count == 0));
        assert_eq!(delta.own, counts().own);
    }
}
