//! `cpubond show`: per CPU and per slave, what the kernel does now. Writes nothing.

use crate::bond::{self, MapLine};
use crate::cpulist::CpuSet;
use crate::error::{Error, Result};
use crate::host::{self, Host};
use crate::irq;
use crate::link;
use crate::rivals::irqbalance::{self, Irqs};
use crate::rivals::{self, Rival};
use crate::topology;
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

const SCHEMA: u32 = 1;

/// Show bonds: each CPU's slave and packets, each slave's interrupts and queues
#[derive(Args, Debug)]
#[command(
    long_about = "Show bonds: for each CPU the slave it sends through and why, the interrupts it \
        serves, and the packets it has sent through slaves bound to it (local) and through others \
        (remote); for each slave its state, interrupts and queues.\n\n\
        Reasons: set (by hand, in bonding_slave/cpus), irq (the slave's interrupts are on this \
        CPU), smt, llc, node, any (the nearest slave by topology).\n\n\
        Warnings: an interrupt is not where the map thinks; something else on the machine moves \
        interrupts or takes packets to other CPUs (irqbalance unless it was told to leave these \
        alone, tuned, systemd .link files, NetworkManager, systemd-networkd, RPS, RFS). Needs no \
        privilege, but only root can ask irqbalance what it leaves alone.",
    after_long_help = "Examples:\n  cpubond show\n  cpubond show bond0 -j | jq '.bonds[0].cpus[] | {cpu, local, remote}'"
)]
pub struct Show {
    /// The bond to show [default: all]
    pub bond: Option<String>,
    /// Print JSON (schema 1)
    #[arg(short, long)]
    pub json: bool,
}

impl Show {
    pub fn run(&self) -> Result<()> {
        let host = Host::default();
        let bonds = match &self.bond {
            Some(bond) if !bond.contains('/') && host.link(bond).join("bonding").exists() => {
                vec![bond.clone()]
            }
            Some(bond) => {
                return Err(Error::new(bond, "no such bond").fix("\"cpubond show\" lists them"));
            }
            None => bond::all(&host),
        };
        let report = Report::new(&host, &bonds)?;
        if self.json {
            let json = serde_json::to_string_pretty(&report)
                .map_err(|error| Error::new("cpubond show", error))?;
            println!("{json}");
        } else {
            print!("{report}");
        }
        Ok(())
    }
}

#[derive(Debug, Serialize)]
pub struct Report {
    schema: u32,
    bonds: Vec<BondReport>,
    /// `null` if it does not run.
    irqbalance: Option<BalancerReport>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct BalancerReport {
    pid: u32,
    /// The interrupts it leaves alone; `null` if it does not say.
    banned: Option<Irqs>,
}

#[derive(Debug, Serialize)]
struct BondReport {
    bond: String,
    up: bool,
    mode: Option<String>,
    /// Only in modes that hash.
    xmit_hash_policy: Option<String>,
    /// `null` under the stock driver.
    policy_in_use: Option<bool>,
    cpus: Vec<CpuReport>,
    slaves: Vec<SlaveReport>,
}

#[derive(Debug, Serialize)]
struct CpuReport {
    cpu: u32,
    slaves: Vec<String>,
    reason: Option<String>,
    /// Queue interrupts of the bond's slaves that go to this CPU now.
    irqs: Vec<u32>,
    local: u64,
    remote: u64,
}

#[derive(Debug, Serialize)]
struct SlaveReport {
    slave: String,
    mii_status: Option<String>,
    state: Option<String>,
    /// Set by hand; `null` when binding is automatic.
    cpus: Option<CpuSet>,
    irqs: Vec<IrqReport>,
    xps: BTreeMap<u32, CpuSet>,
    rps: BTreeMap<u32, CpuSet>,
    local: u64,
    remote: u64,
    tx_packets: Option<u64>,
}

#[derive(Debug, Serialize)]
pub struct IrqReport {
    irq: u32,
    name: String,
    /// `null` for vectors that serve no queue.
    pub queue: Option<u32>,
    affinity: Option<CpuSet>,
    pub effective: Option<CpuSet>,
}

impl IrqReport {
    /// Of all of a device's interrupts.
    pub fn of_link(host: &Host, link: &str) -> Vec<Self> {
        irq::of_link(host, link)
            .into_iter()
            .map(|irq| Self {
                irq: irq.number,
                queue: irq.queue,
                affinity: irq::affinity(host, irq.number).ok(),
                effective: irq::effective_affinity(host, irq.number).ok(),
                name: irq.name,
            })
            .collect()
    }
}

impl Report {
    pub fn new(host: &Host, bonds: &[String]) -> Result<Self> {
        let online: CpuSet = topology::online(host)?.iter().map(|cpu| cpu.id).collect();
        let slaves: Vec<String> = bonds
            .iter()
            .flat_map(|bond| bond::slaves(host, bond))
            .collect();
        let mut warnings = rivals::find(host, &slaves)
            .iter()
            .map(Rival::to_string)
            .collect();
        let bonds = bonds
            .iter()
            .map(|bond| BondReport::new(host, bond, &online, &mut warnings))
            .collect();
        let irqbalance = irqbalance::running(host).map(|irqbalance| BalancerReport {
            pid: irqbalance.pid,
            banned: irqbalance.banned().ok(),
        });
        Ok(Self {
            schema: SCHEMA,
            bonds,
            irqbalance,
            warnings,
        })
    }
}

impl BondReport {
    fn new(host: &Host, bond: &str, online: &CpuSet, warnings: &mut Vec<String>) -> Self {
        let map = bond::map(host, bond);
        let slaves: Vec<SlaveReport> = bond::slaves(host, bond)
            .iter()
            .map(|slave| SlaveReport::new(host, slave))
            .collect();
        let stats: Vec<bond::Stats> = slaves
            .iter()
            .map(|slave| bond::stats(host, &slave.slave).unwrap_or_default())
            .collect();

        // Every CPU in the map, else every online one; an offline one only if it has sent.
        let mut cpus: CpuSet = online.clone();
        stats
            .iter()
            .flat_map(|stats| &stats.cpus)
            .for_each(|(cpu, counts)| {
                if *counts != (0, 0) {
                    cpus.insert(*cpu);
                }
            });
        let lines: BTreeMap<u32, &MapLine> =
            map.iter().flatten().map(|line| (line.cpu, line)).collect();
        let cpus = cpus
            .iter()
            .map(|cpu| {
                let line = lines.get(&cpu);
                let sum = |pick: fn(&(u64, u64)) -> u64| {
                    stats
                        .iter()
                        .filter_map(|stats| stats.cpus.get(&cpu))
                        .map(pick)
                        .sum()
                };
                CpuReport {
                    cpu,
                    slaves: line.map(|line| line.slaves.clone()).unwrap_or_default(),
                    reason: line.map(|line| line.reason.clone()),
                    irqs: slaves.iter().flat_map(|slave| slave.irqs_on(cpu)).collect(),
                    local: sum(|counts| counts.0),
                    remote: sum(|counts| counts.1),
                }
            })
            .collect();

        let usable = |slave: &SlaveReport| bond::is_usable(host, &slave.slave);
        for slave in &slaves {
            slave.warn(&lines, usable(slave), warnings);
        }
        for line in lines.values().filter(|line| line.reason == "irq") {
            for name in &line.slaves {
                let there = slaves
                    .iter()
                    .any(|slave| slave.slave == *name && slave.may_interrupt(line.cpu));
                if !there {
                    warnings.push(format!(
                        "{name}: the map binds it to CPU {} by interrupt, but none of its queue interrupts goes there",
                        line.cpu
                    ));
                }
            }
        }
        let mode = bond::option_name(host, bond, "mode");
        let hashes = ["balance-xor", "802.3ad", "balance-tlb"];
        Self {
            bond: bond.to_string(),
            up: link::is_up(host, bond),
            xmit_hash_policy: bond::option_name(host, bond, "xmit_hash_policy")
                .filter(|_| mode.as_deref().is_some_and(|mode| hashes.contains(&mode))),
            mode,
            policy_in_use: map.as_ref().map(|map| !map.is_empty()),
            cpus,
            slaves,
        }
    }
}

impl SlaveReport {
    fn new(host: &Host, slave: &str) -> Self {
        let stats = bond::stats(host, slave).unwrap_or_default();
        let by_queue = |queues: Vec<link::QueueCpus>| {
            queues
                .into_iter()
                .map(|queue| (queue.queue, queue.cpus))
                .collect()
        };
        Self {
            slave: slave.to_string(),
            mii_status: bond::slave_option(host, slave, "mii_status"),
            state: bond::slave_option(host, slave, "state"),
            cpus: bond::cpus_by_hand(host, slave).filter(|cpus| !cpus.is_empty()),
            irqs: IrqReport::of_link(host, slave),
            xps: by_queue(link::xps(host, slave)),
            rps: by_queue(link::rps(host, slave)),
            local: stats.local,
            remote: stats.remote,
            tx_packets: host::read_if_any(&host.link(slave).join("statistics/tx_packets"))
                .and_then(|count| count.parse().ok()),
        }
    }

    fn irqs_on(&self, cpu: u32) -> Vec<u32> {
        self.queue_irqs()
            .filter(|irq| {
                irq.effective
                    .as_ref()
                    .is_some_and(|cpus| cpus.contains(cpu))
            })
            .map(|irq| irq.irq)
            .collect()
    }

    /// Now, or when an interrupt sent to this CPU alone fires next.
    fn may_interrupt(&self, cpu: u32) -> bool {
        let alone = CpuSet::from_iter([cpu]);
        !self.irqs_on(cpu).is_empty()
            || self
                .queue_irqs()
                .any(|irq| irq.affinity.as_ref() == Some(&alone))
    }

    fn queue_irqs(&self) -> impl Iterator<Item = &IrqReport> {
        self.irqs.iter().filter(|irq| irq.queue.is_some())
    }

    fn warn(&self, map: &BTreeMap<u32, &MapLine>, usable: bool, warnings: &mut Vec<String>) {
        let slave = &self.slave;
        let mut pending = Vec::new();
        for irq in self.queue_irqs() {
            let (Some(affinity), Some(effective)) = (&irq.affinity, &irq.effective) else {
                continue;
            };
            let number = irq.irq;
            if !effective.is_subset(affinity) {
                pending.push(format!("{number} (from CPU {effective} to {affinity})"));
                // The map is ahead of it.
                continue;
            }
            if map.is_empty() || !usable {
                continue;
            }
            for cpu in effective.iter() {
                let line = map.get(&cpu);
                if !line.is_some_and(|line| line.is_bound() && line.slaves.contains(slave)) {
                    let found = line.map_or("no slave".to_string(), |line| {
                        format!("{} ({})", line.slaves.join(","), line.reason)
                    });
                    warnings.push(format!(
                        "{slave}: IRQ {number} is on CPU {cpu}, but the map has {found} there"
                    ));
                }
            }
        }
        if !pending.is_empty() {
            warnings.push(format!(
                "{slave}: these interrupts move when they next fire: {}",
                pending.join(", ")
            ));
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bonds.is_empty() {
            writeln!(f, "no bonds")?;
        }
        for (index, bond) in self.bonds.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{bond}")?;
        }
        if let Some(BalancerReport {
            banned: Some(irqs), ..
        }) = &self.irqbalance
        {
            writeln!(
                f,
                "irqbalance leaves alone: {}",
                irqbalance::list(irqs, ",")
            )?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        Ok(())
    }
}

impl fmt::Display for BondReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.bond, self.mode.as_deref().unwrap_or("?"))?;
        if let Some(policy) = &self.xmit_hash_policy {
            write!(f, ", {policy}")?;
        }
        writeln!(f, ", {}", if self.up { "up" } else { "down" })?;

        let mut rows =
            vec![["CPU", "SLAVE", "REASON", "IRQS", "LOCAL", "REMOTE"].map(String::from)];
        rows.extend(self.cpus.iter().map(|cpu| {
            [
                cpu.cpu.to_string(),
                or_dash(cpu.slaves.join(",")),
                or_dash(cpu.reason.clone().unwrap_or_default()),
                or_dash(cpu.irqs.iter().copied().collect::<CpuSet>().to_string()),
                cpu.local.to_string(),
                cpu.remote.to_string(),
            ]
        }));
        table(f, &rows)?;

        let mut rows = vec![
            [
                "SLAVE", "STATE", "LINK", "CPUS", "IRQ:CPU", "XPS", "RPS", "LOCAL", "REMOTE",
            ]
            .map(String::from),
        ];
        rows.extend(self.slaves.iter().map(|slave| {
            let queues = |queues: &BTreeMap<u32, CpuSet>| {
                let set = queues.iter().filter(|(_, cpus)| !cpus.is_empty());
                or_dash(
                    set.map(|(queue, cpus)| format!("{queue}:{cpus}"))
                        .collect::<Vec<_>>()
                        .join(" "),
                )
            };
            let irqs: Vec<String> = slave
                .queue_irqs()
                .map(|irq| match &irq.effective {
                    Some(cpus) => format!("{}:{cpus}", irq.irq),
                    None => format!("{}:?", irq.irq),
                })
                .collect();
            [
                slave.slave.clone(),
                or_dash(slave.state.clone().unwrap_or_default()),
                or_dash(slave.mii_status.clone().unwrap_or_default()),
                match &slave.cpus {
                    Some(cpus) => cpus.to_string(),
                    None if self.policy_in_use == Some(true) => "auto".to_string(),
                    None => "-".to_string(),
                },
                or_dash(irqs.join(" ")),
                queues(&slave.xps),
                queues(&slave.rps),
                slave.local.to_string(),
                slave.remote.to_string(),
            ]
        }));
        table(f, &rows)
    }
}

fn or_dash(text: String) -> String {
    if text.is_empty() {
        "-".to_string()
    } else {
        text
    }
}

/// Left-aligned columns, each as wide as its widest cell.
pub fn table<const N: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        writeln!(f, "  {}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fake, FakeIrqbalance};

    fn machine() -> Fake {
        let fake = Fake::with_cpus(2);
        fake.virtio_nic("eth0", 24, 1);
        fake.file("sys/class/net/eth0/queues/rx-0/rps_cpus", "0\n");
        fake.file("sys/class/net/bonding_masters", "bond0\n");
        fake.file("sys/class/net/bond0/flags", "0x1403\n");
        fake.file("sys/class/net/bond0/bonding/mode", "cpu_bound 7\n");
        fake.file("sys/class/net/bond0/bonding/slaves", "eth0\n");
        fake.file(
            "sys/class/net/bond0/bonding/cpu_bound_map",
            "0 eth0 irq\n1 eth0 any\n",
        );
        std::os::unix::fs::symlink(
            fake.path("sys/class/net/bond0"),
            fake.path("sys/class/net/eth0/master"),
        )
        .unwrap();
        fake.file("sys/class/net/eth0/bonding_slave/mii_status", "up\n");
        fake.file("sys/class/net/eth0/bonding_slave/state", "active\n");
        fake.file("sys/class/net/eth0/bonding_slave/cpus", "\n");
        fake.file(
            "sys/class/net/eth0/bonding_slave/cpu_bound_stats",
            "local 30\nremote 2\ncpu0 local 30 remote 0\ncpu1 local 0 remote 2\n",
        );
        fake
    }

    fn report(fake: &Fake) -> Report {
        let host = fake.host();
        Report::new(&host, &bond::all(&host)).unwrap()
    }

    #[test]
    fn shows_a_bond() {
        let report = report(&machine());
        assert_eq!(report.warnings, [] as [String; 0]);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["schema"], 1);
        let cpu = &json["bonds"][0]["cpus"][0];
        assert_eq!(
            *cpu,
            serde_json::json!({
                "cpu": 0, "slaves": ["eth0"], "reason": "irq", "irqs": [25, 26], "local": 30, "remote": 0
            })
        );
        assert_eq!(json["bonds"][0]["cpus"][1]["remote"], 2);
        assert_eq!(
            json["bonds"][0]["slaves"][0]["irqs"][0]["queue"],
            serde_json::Value::Null
        );
        assert_eq!(json["bonds"][0]["slaves"][0]["irqs"][1]["effective"], "0");

        let text = report.to_string();
        assert!(text.starts_with("bond0: cpu_bound, up\n"), "{text}");
        assert!(
            text.contains("  0    eth0   irq     25-26  30     0\n"),
            "{text}"
        );
    }

    #[test]
    fn warns() {
        let fake = machine();
        fake.file("proc/17/comm", "irqbalance\n");
        fake.file("proc/irq/25/smp_affinity_list", "1\n");
        fake.file("sys/class/net/eth0/queues/rx-0/rps_cpus", "2\n");
        let warnings = report(&fake).warnings;
        for expected in [
            "irqbalance: runs",
            "IRQ 25 is on CPU 1, but the map has eth0 (any)",
            "RPS: queue 0",
        ] {
            assert!(
                warnings.iter().any(|warning| warning.contains(expected)),
                "{expected}: {warnings:?}"
            );
        }
        // And the other way round: the map still binds CPU 0 when nothing is left there.
        fake.file("proc/irq/26/smp_affinity_list", "1\n");
        let warnings = report(&fake).warnings;
        assert!(
            warnings
                .iter()
                .any(|warning| warning.contains("binds it to CPU 0")),
            "{warnings:?}"
        );
    }

    #[test]
    fn shows_what_irqbalance_leaves_alone() {
        let fake = machine();
        let _stub = FakeIrqbalance::start(&fake, 500, [7, 25, 26].into());
        let report = report(&fake);
        assert_eq!(report.warnings, [] as [String; 0]);
        assert_eq!(
            serde_json::to_value(&report).unwrap()["irqbalance"],
            serde_json::json!({"pid": 17, "banned": [7, 25, 26]})
        );
        assert!(
            report
                .to_string()
                .ends_with("irqbalance leaves alone: 7,25,26\n")
        );
    }

    #[test]
    fn the_stock_driver_has_no_map() {
        let fake = machine();
        std::fs::remove_file(fake.path("sys/class/net/bond0/bonding/cpu_bound_map")).unwrap();
        let report = report(&fake);
        assert_eq!(report.bonds[0].policy_in_use, None);
        assert_eq!(report.bonds[0].cpus[0].reason, None);
        assert_eq!(report.warnings, [] as [String; 0]);
    }
}
