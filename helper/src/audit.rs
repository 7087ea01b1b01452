//! `cpubond audit`: whether each TCP flow stays on one CPU and its slave, and why not. Changes
//! nothing; what it loads into the kernel goes when it ends.

mod judge;
mod probe;
mod report;
#[cfg(test)]
pub mod testing;

use crate::bond;
use crate::cpulist::CpuSet;
use crate::error::{Error, Exit, Result};
use crate::host::Host;
use crate::irq;
use crate::link;
use clap::Args;
use judge::{Binding, Tally};
use probe::{Options, Probe};
use report::{BondReport, CpuReport, Report, Source};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How soon a signal is noticed.
const NAP: Duration = Duration::from_millis(100);
/// How often the machine is looked at, and the kernel's events are taken.
const TICK: Duration = Duration::from_secs(1);
const PROGRESS: Duration = Duration::from_secs(5);
/// A connection's last packets, which may come after both FINs, are in by then.
const SETTLED: Duration = Duration::from_secs(5);

/// Prove of each live TCP flow that it stays on one CPU and its slave, or say why not
#[derive(Args, Debug)]
#[command(
    long_about = "Watch every TCP flow that goes through the bonds' slaves for a while, and tell at \
        which of its hops it is local, and why it is not at the others.\n\n\
        Local means:\n  \
          rx   every packet was received by one slave on one CPU, to which the slave is bound\n  \
          app  every accept, receive and send of the application was on the CPU of rx\n  \
          tx   every packet was sent by the CPU of rx, through one slave bound to it\n  \
          all  all three\n\
        Bound is what the bond's cpu_bound_map says (reasons set and irq); where the bond has no \
        such policy, and for a NIC that is named by itself, where its queue interrupts go. A hop of \
        which nothing was seen is not local. Received is on the CPU that RPS chose, sent is when the driver takes the packet.\n\n\
        Reasons:\n  \
          rx_rps              RPS moved packets to another CPU\n  \
          rx_other_slave      received on a CPU that the slave is not bound to\n  \
          rx_fallback_slave   the CPU has this slave only for want of one of its own\n  \
          rx_several_cpus, rx_several_slaves\n  \
          app_other_cpu       the application runs on another CPU than the one that receives\n  \
          app_several_cpus\n  \
          tx_other_cpu        sent by another CPU than the one that receives\n  \
          tx_several_cpus     (late ACKs and retransmissions too: timers of a CPU that sleeps may \
        run on another; --stacks tells)\n  \
          tx_other_slave      sent by a slave that is not the CPU's\n  \
          tx_fallback_slave, tx_several_slaves\n  \
          rx_unseen, app_unseen, tx_unseen\n\n\
        Connections seen from SYN to end are complete; those that were open before or are open \
        after are partial, and judged by what was seen. Nothing is lost silently: connections \
        that the map had no room for, packets whose headers were out of reach, probes that the \
        kernel left out are counted and told. TCP over IPv4 and IPv6, tagged or not; behind NAT \
        of this host too. Under a SYN flood (SYN cookies) what the application does before \
        the first answer is not seen.\n\n\
        A connection of which nothing moves meanwhile is not seen.\n\n\
        Overhead: seven BPF programs (two for every packet, after GRO and before the driver; \
        three for socket calls; two that run only where RPS is on) and kernel memory for 65,536 \
        flows (--map-flows). The report states what they cost: the kernel measures how long each \
        runs, which itself takes some tens of nanoseconds a run of any BPF program meanwhile, and \
        CAP_SYS_ADMIN.\n\n\
        Needs a kernel with type information (BTF), such as Debian's, and root or CAP_BPF and \
        CAP_PERFMON. Ctrl-C or SIGTERM ends it early, with the report so far. Exit codes: 0 \
        reported, whatever was found; 1 failed; 2 usage; 4 the kernel cannot do it.",
    after_long_help = "Examples:\n  \
        Ten seconds of all bonds:\n    \
          cpubond audit\n  \
        A minute of the web server, the 50 worst flows, as JSON:\n    \
          cpubond audit bond0 -d 1m --port 80 --flows 50 -j\n  \
        A NIC that is in no bond, for comparison:\n    \
          cpubond audit eth0\n  \
        For as long as a load runs:\n    \
          cpubond audit -d 10m -j >audit.json & load; kill -INT $!; wait\n  \
        Which kernel functions send on foreign CPUs:\n    \
          cpubond audit --stacks"
)]
pub struct Audit {
    /// The bonds to watch, or single NICs [default: all bonds]
    #[arg(value_name = "BOND")]
    pub bonds: Vec<String>,
    /// How long to watch, such as 500ms, 10s or 5m
    #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub duration: Duration,
    /// Print JSON (schema 1)
    #[arg(short, long)]
    pub json: bool,
    /// Only flows with this port at either end; may be repeated
    #[arg(long = "port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub ports: Vec<u16>,
    /// How many flows to list, the worst first
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub flows: usize,
    /// How many flows to have room for in the kernel at once
    #[arg(long, value_name = "N", default_value_t = 65536,
          value_parser = clap::value_parser!(u32).range(1..=4_194_304))]
    pub map_flows: u32,
    /// Tell by which kernel functions packets were sent on a CPU that does not receive their flow
    #[arg(long)]
    pub stacks: bool,
}

impl Audit {
    pub fn run(&self) -> Result<()> {
        let host = Host::default();
        if self.ports.len() > probe::MAX_PORTS {
            return Err(Error::new("--port", "more than 8 ports")
                .fix("audit all ports, or some of them at a time")
                .exit(Exit::Usage));
        }
        let bonds = self.watched(&host)?;
        let mut machine = Machine::read(&host, &bonds);
        if machine.slaves.is_empty() {
            return Err(Error::new(bonds.join(", "), "no slaves, so no flows")
                .fix("enslave NICs by \"cpubond up\""));
        }

        let stop = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&stop))
                .map_err(|error| Error::new("signal handler", error))?;
        }
        let mut probe = Probe::load(
            &host,
            &Options {
                flows: self.map_flows,
                ports: &self.ports,
                stacks: self.stacks,
            },
        )?;
        let mut tally = Tally::new(self.flows);
        let mut warnings = BTreeSet::new();
        let policy = policy_counters(&host, &machine);
        let start = Instant::now();
        probe.watch(&machine.indexes())?;
        eprintln!(
            "cpubond: audit: watching {} for {} s; Ctrl-C or SIGTERM ends it early, with the report so far",
            bonds.join(", "),
            self.duration.as_secs_f64()
        );

        let (mut ticked, mut told) = (start, start);
        while start.elapsed() < self.duration && !stop.load(Ordering::Relaxed) {
            thread::sleep(NAP.min(self.duration.saturating_sub(start.elapsed())));
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                machine.refresh(&host, &bonds, &mut warnings);
                probe.watch(&machine.indexes())?;
                for flow in probe.replaced().into_iter().chain(probe.sweep(SETTLED)?) {
                    tally.add(flow, &machine.binding);
                }
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                self.tell(start.elapsed(), &probe)?;
            }
        }
        let seconds = start.elapsed();
        probe.watch(&BTreeSet::new())?;
        machine.refresh(&host, &bonds, &mut warnings);
        for flow in probe.replaced().into_iter().chain(probe.flows()?) {
            tally.add(flow, &machine.binding);
        }

        let sent = policy_counters(&host, &machine);
        let report = Report::new(
            seconds,
            stop.load(Ordering::Relaxed),
            &machine.reports(&policy, &sent),
            &machine.names(),
            &mut tally,
            probe.counters()?,
            probe.overhead(seconds)?,
            self.stacks.then(|| probe.stacks()).transpose()?,
            warnings,
        );
        if self.json {
            let json = serde_json::to_string_pretty(&report)
                .map_err(|error| Error::new("cpubond audit", error))?;
            println!("{json}");
        } else {
            print!("{report}");
        }
        Ok(())
    }

    fn watched(&self, host: &Host) -> Result<Vec<String>> {
        let all = bond::all(host);
        for bond in &self.bonds {
            if !all.contains(bond) && !link::exists(host, bond) {
                return Err(
                    Error::new(bond, "no such bond or NIC").fix("\"cpubond show\" lists bonds")
                );
            }
        }
        match (self.bonds.is_empty(), all.is_empty()) {
            (true, true) => {
                Err(Error::new("cpubond audit", "there is no bond")
                    .fix("make one by \"cpubond up\""))
            }
            (true, false) => Ok(all),
            (false, _) => Ok(self.bonds.clone()),
        }
    }

    fn tell(&self, elapsed: Duration, probe: &Probe) -> Result<()> {
        let counters = probe.counters()?;
        eprintln!(
            "cpubond: audit: {} of {} s: {} flows, {} packets received, {} sent, {} connections lost",
            elapsed.as_secs(),
            self.duration.as_secs(),
            counters.flows,
            counters.rx_packets,
            counters.tx_packets,
            counters.lost_connections
        );
        Ok(())
    }
}

/// `500ms`, `10s`, `5m`, `1h`, `2.5s`; a bare number is seconds.
fn duration(text: &str) -> std::result::Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("not a time, such as 500ms, 10s or 5m".to_string()),
    };
    number
        .parse::<f64>()
        .ok()
        .map(|number| number * unit)
        .filter(|seconds| (0.001..=604_800.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "not a time from 1ms to 168h, such as 500ms, 10s or 5m".to_string())
}

/// What the kernel says about the bonds now.
struct Machine {
    bonds: Vec<Bond>,
    /// Of all bonds watched, by ifindex. Slaves that have left stay, for flows that used them.
    slaves: BTreeMap<u32, String>,
    present: BTreeSet<u32>,
    binding: Binding,
}

#[derive(Clone, PartialEq, Eq)]
struct Bond {
    name: String,
    mode: Option<String>,
    source: Source,
    slaves: Vec<String>,
    cpus: Vec<CpuReport>,
}

impl Machine {
    fn read(host: &Host, names: &[String]) -> Self {
        let bonds: Vec<Bond> = names.iter().map(|name| Bond::read(host, name)).collect();
        let index: BTreeMap<&String, u32> = bonds
            .iter()
            .flat_map(|bond| &bond.slaves)
            .filter_map(|slave| Some((slave, link::index(host, slave)?)))
            .collect();
        let mut binding = Binding::default();
        for line in bonds.iter().flat_map(|bond| &bond.cpus) {
            let side = match line.bound {
                true => &mut binding.bound,
                false => &mut binding.fallback,
            };
            side.entry(line.cpu)
                .or_default()
                .extend(line.slaves.iter().filter_map(|slave| index.get(slave)));
        }
        let slaves: BTreeMap<u32, String> = index
            .into_iter()
            .map(|(slave, index)| (index, slave.clone()))
            .collect();
        Self {
            present: slaves.keys().copied().collect(),
            slaves,
            binding,
            bonds,
        }
    }

    /// Look again. Flows are judged by the latest binding, so a change must be told.
    fn refresh(&mut self, host: &Host, names: &[String], warnings: &mut BTreeSet<String>) {
        let mut now = Self::read(host, names);
        if now.binding != self.binding {
            warnings.insert(
                "which slaves CPUs are bound to has changed: flows are judged by the latest"
                    .to_string(),
            );
        }
        if now.present != self.present {
            warnings.insert("slaves have come or gone".to_string());
        }
        let had = std::mem::take(&mut self.slaves);
        for (index, name) in had {
            now.slaves.entry(index).or_insert(name);
        }
        *self = now;
    }

    fn indexes(&self) -> BTreeSet<u32> {
        self.present.clone()
    }

    fn names(&self) -> BTreeMap<u32, String> {
        self.slaves.clone()
    }

    fn reports(&self, before: &Policy, after: &Policy) -> Vec<BondReport> {
        self.bonds
            .iter()
            .map(|bond| {
                let sum = |pick: fn(&(u64, u64)) -> u64| -> Option<u64> {
                    if bond.source != Source::CpuBoundMap {
                        return None;
                    }
                    bond.slaves
                        .iter()
                        .map(|slave| {
                            let then = before.get(slave).map_or(0, pick);
                            Some(pick(after.get(slave)?).saturating_sub(then))
                        })
                        .sum()
                };
                BondReport {
                    bond: bond.name.clone(),
                    mode: bond.mode.clone(),
                    bound_by: bond.source,
                    cpus: bond.cpus.clone(),
                    policy_local: sum(|counts| counts.0),
                    policy_remote: sum(|counts| counts.1),
                }
            })
            .collect()
    }
}

impl Bond {
    /// A NIC by itself is as a bond of it alone.
    fn read(host: &Host, name: &str) -> Self {
        let slaves = match bond::all(host).iter().any(|bond| bond == name) {
            true => bond::slaves(host, name),
            false => vec![name.to_string()],
        };
        let map = bond::map(host, name).filter(|map| !map.is_empty());
        let (source, cpus) = match map {
            Some(map) => (
                Source::CpuBoundMap,
                map.into_iter()
                    .map(|line| CpuReport {
                        cpu: line.cpu,
                        bound: line.is_bound(),
                        slaves: line.slaves,
                    })
                    .collect(),
            ),
            None => (Source::Irq, bound_by_irq(host, &slaves)),
        };
        Self {
            name: name.to_string(),
            mode: bond::option_name(host, name, "mode"),
            source,
            slaves,
            cpus,
        }
    }
}

/// Where the slaves' queue interrupts go now.
fn bound_by_irq(host: &Host, slaves: &[String]) -> Vec<CpuReport> {
    let mut by_cpu: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for slave in slaves {
        let cpus: CpuSet = irq::of_link(host, slave)
            .into_iter()
            .filter(|irq| irq.queue.is_some())
            .filter_map(|irq| irq::effective_affinity(host, irq.number).ok())
            .flat_map(|cpus| cpus.iter().collect::<Vec<_>>())
            .collect();
        for cpu in cpus.iter() {
            by_cpu.entry(cpu).or_default().push(slave.clone());
        }
    }
    by_cpu
        .into_iter()
        .map(|(cpu, slaves)| CpuReport {
            cpu,
            slaves,
            bound: true,
        })
        .collect()
}

/// By slave: packets that the policy has counted as local and remote.
type Policy = BTreeMap<String, (u64, u64)>;

fn policy_counters(host: &Host, machine: &Machine) -> Policy {
    machine
        .slaves
        .values()
        .filter_map(|slave| {
            let stats = bond::stats(host, slave)?;
            Some((slave.clone(), (stats.local, stats.remote)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fake;

    #[test]
    fn reads_durations() {
        for (text, ms) in [
            ("500ms", 500),
            ("10s", 10_000),
            ("10", 10_000),
            ("2.5s", 2500),
            ("5m", 300_000),
            ("1h", 3_600_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in [
            "", "s", "0s", "-1s", "1d", "1 s", "1.2.3s", "1e3s", "NaN", "9999h",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    fn machine() -> Fake {
        let fake = Fake::with_cpus(2);
        fake.nic("eth0", &[(24, "virtio0-config"), (25, "virtio0-input.0")]);
        fake.nic("eth1", &[(26, "virtio1-input.0")]);
        fake.file("sys/class/net/eth0/ifindex", "2\n");
        fake.file("sys/class/net/eth1/ifindex", "3\n");
        fake.file("sys/class/net/bonding_masters", "bond0\n");
        fake.file("sys/class/net/bond0/bonding/slaves", "eth0 eth1\n");
        fake
    }

    #[test]
    fn binding_is_the_map_where_there_is_one() {
        let fake = machine();
        fake.file(
            "sys/class/net/bond0/bonding/cpu_bound_map",
            "0 eth1 irq\n1 eth0 any\n",
        );
        let mut machine = Machine::read(&fake.host(), &["bond0".to_string()]);
        assert_eq!(machine.binding.bound, [(0, [3].into())].into());
        assert_eq!(machine.binding.fallback, [(1, [2].into())].into());
        assert_eq!(machine.indexes(), [2, 3].into());

        let mut warnings = BTreeSet::new();
        let mut look = |machine: &mut Machine| {
            machine.refresh(&fake.host(), &["bond0".to_string()], &mut warnings);
            warnings.len()
        };
        assert_eq!(look(&mut machine), 0);
        fake.file(
            "sys/class/net/bond0/bonding/cpu_bound_map",
            "0 eth1 irq\n1 eth0 irq\n",
        );
        assert_eq!(look(&mut machine), 1);
        fake.file("sys/class/net/bond0/bonding/slaves", "eth0\n");
        assert_eq!(look(&mut machine), 2);
        assert_eq!(machine.indexes(), [2].into());
        assert_eq!(machine.names()[&3], "eth1");
    }

    #[test]
    fn binding_is_the_interrupts_elsewhere() {
        let fake = machine();
        for (irq, cpu) in [(24, "0"), (25, "1"), (26, "0-1")] {
            fake.file(
                &format!("proc/irq/{irq}/effective_affinity_list"),
                &format!("{cpu}\n"),
            );
        }
        // Present but empty: the driver is ours, and the policy not in use.
        fake.file("sys/class/net/bond0/bonding/cpu_bound_map", "");
        let machine = Machine::read(&fake.host(), &["bond0".to_string()]);
        assert!(machine.bonds[0].source == Source::Irq);
        assert_eq!(
            machine.binding.bound,
            [(0, [3].into()), (1, [2, 3].into())].into()
        );
    }

    #[test]
    fn a_nic_is_watched_by_itself() {
        let fake = machine();
        fake.file("proc/irq/25/effective_affinity_list", "1\n");
        let machine = Machine::read(&fake.host(), &["eth0".to_string()]);
        assert_eq!(machine.indexes(), [2].into());
        assert_eq!(machine.binding.bound, [(1, [2].into())].into());
        assert!(machine.bonds[0].mode.is_none());
        // One that is gone has nothing to watch.
        let machine = Machine::read(&fake.host(), &["eth7".to_string()]);
        assert!(machine.indexes().is_empty());
    }
}
