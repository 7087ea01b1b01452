//! What `cpubond audit` says, as JSON (schema 1) and as text.

use super::judge::{Counts, Flow, Hop, Opened, Reason, Share, Tally, Verdict};
use super::probe::{Counters, Overhead, Stack};
use crate::show::table;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

const SCHEMA: u32 = 1;

/// Part of the JSON, so that its figures explain themselves.
#[derive(Debug, Serialize)]
pub struct Definition {
    rx_local: &'static str,
    app_local: &'static str,
    tx_local: &'static str,
    all_local: &'static str,
}

const DEFINITION: Definition = Definition {
    rx_local: "every packet was received by one slave on one CPU, to which the slave is bound",
    app_local: "every accept, receive and send of the application was on the CPU of rx",
    tx_local: "every packet was sent by the CPU of rx, through one slave that is bound to it",
    all_local: "rx_local, app_local and tx_local",
};

#[derive(Debug, Serialize)]
pub struct Report {
    schema: u32,
    definition: Definition,
    seconds: f64,
    /// `time` or `signal`
    ended_by: &'static str,
    bonds: Vec<BondReport>,
    totals: Totals,
    /// By service port.
    groups: Vec<Group>,
    /// The worst first.
    flows: Vec<FlowReport>,
    flows_left_out: u64,
    /// Packets sent on another CPU than the one that received their flow; `null` without --stacks.
    foreign_senders: Option<Vec<Stack>>,
    overhead: Overhead,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Totals {
    #[serde(flatten)]
    counts: Counts,
    /// Connections that the map had no room for: not judged.
    lost: u64,
    /// Packets of flows that the map had no room for.
    lost_packets: u64,
    /// Connections behind NAT of which the application's calls could not be told.
    lost_sockets: u64,
    /// TCP packets whose headers could not be read: not counted anywhere else.
    unparsed_packets: u64,
    /// Runs of probes that the kernel left out.
    missed: u64,
    /// Flows that no socket here sent for (refused, forwarded), and their packets: not judged.
    no_socket: u64,
    no_socket_packets: u64,
    /// TCP packets that the slaves received and sent, whatever flow they are of.
    seen_rx_packets: u64,
    seen_tx_packets: u64,
}

#[derive(Debug, Serialize)]
struct Group {
    port: u16,
    #[serde(flatten)]
    counts: Counts,
}

#[derive(Clone, Debug, Serialize)]
pub struct BondReport {
    pub bond: String,
    pub mode: Option<String>,
    pub bound_by: Source,
    pub cpus: Vec<CpuReport>,
    /// What the policy counted meanwhile, of all frames; `null` if there is none.
    pub policy_local: Option<u64>,
    pub policy_remote: Option<u64>,
}

/// What says which CPU a slave is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    CpuBoundMap,
    /// The bond has no policy: where the slaves' interrupts go.
    Irq,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CpuReport {
    pub cpu: u32,
    pub slaves: Vec<String>,
    /// By hand or by interrupt; otherwise they are substitutes.
    pub bound: bool,
}

#[derive(Debug, Serialize)]
struct FlowReport {
    local: SocketAddr,
    remote: SocketAddr,
    /// The socket's own end where NAT makes it another.
    socket: Option<SocketAddr>,
    /// `null` if the start was not seen.
    opened: Option<Opened>,
    complete: bool,
    rx: HopReport,
    /// Of `rx.total`, moved by RPS.
    rps: u64,
    app: HopReport,
    tx: HopReport,
    rx_local: bool,
    app_local: bool,
    tx_local: bool,
    all_local: bool,
    reasons: Vec<Reason>,
}

#[derive(Debug, Serialize)]
struct HopReport {
    cpu: Option<u32>,
    slave: Option<String>,
    /// Packets, or calls of the application.
    total: u64,
    other_cpu: u64,
    other_slave: u64,
    /// The last place that was another one.
    elsewhere_cpu: Option<u32>,
    elsewhere_slave: Option<String>,
}

impl HopReport {
    fn new(hop: &Hop, names: &BTreeMap<u32, String>) -> Self {
        let name = |slave: u32| {
            names
                .get(&slave)
                .cloned()
                .unwrap_or_else(|| format!("if{slave}"))
        };
        Self {
            cpu: hop.first.map(|place| place.cpu),
            slave: hop.first.and_then(|place| place.slave).map(name),
            total: hop.total,
            other_cpu: hop.other_cpu,
            other_slave: hop.other_slave,
            elsewhere_cpu: hop.elsewhere.map(|place| place.cpu),
            elsewhere_slave: hop.elsewhere.and_then(|place| place.slave).map(name),
        }
    }
}

impl FlowReport {
    fn new(flow: &Flow, verdict: &Verdict, names: &BTreeMap<u32, String>) -> Self {
        Self {
            local: flow.local,
            remote: flow.remote,
            socket: flow.socket.filter(|socket| *socket != flow.local),
            opened: flow.opened,
            complete: flow.is_complete(),
            rx: HopReport::new(&flow.rx, names),
            rps: flow.rps,
            app: HopReport::new(&flow.app, names),
            tx: HopReport::new(&flow.tx, names),
            rx_local: verdict.rx.is_none(),
            app_local: verdict.app.is_none(),
            tx_local: verdict.tx.is_none(),
            all_local: verdict.is_local(),
            reasons: verdict.reasons().collect(),
        }
    }
}

impl Report {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a part of the report, and used once"
    )]
    pub fn new(
        elapsed: Duration,
        by_signal: bool,
        bonds: &[BondReport],
        names: &BTreeMap<u32, String>,
        tally: &mut Tally,
        counters: Counters,
        overhead: Overhead,
        foreign_senders: Option<Vec<Stack>>,
        mut warnings: BTreeSet<String>,
    ) -> Self {
        let flows: Vec<FlowReport> = tally
            .worst()
            .iter()
            .map(|(flow, verdict)| FlowReport::new(flow, verdict, names))
            .collect();
        let totals = Totals {
            counts: tally.totals.clone(),
            lost: counters.lost_connections,
            lost_packets: counters.lost_packets,
            lost_sockets: counters.lost_sockets,
            unparsed_packets: counters.unparsed,
            missed: overhead.probes.iter().map(|probe| probe.missed).sum(),
            no_socket: tally.no_socket,
            no_socket_packets: tally.no_socket_packets,
            seen_rx_packets: counters.rx_packets,
            seen_tx_packets: counters.tx_packets,
        };
        warnings.extend(totals.warnings());
        if overhead.cpu_share.is_none() {
            warnings.insert(
                "how long the probes ran is not known: measuring it takes CAP_SYS_ADMIN"
                    .to_string(),
            );
        }
        Self {
            schema: SCHEMA,
            definition: DEFINITION,
            seconds: elapsed.as_secs_f64(),
            ended_by: if by_signal { "signal" } else { "time" },
            bonds: bonds.to_vec(),
            flows_left_out: totals.counts.connections - flows.len() as u64,
            flows,
            groups: tally
                .groups
                .iter()
                .map(|(port, counts)| Group {
                    port: *port,
                    counts: counts.clone(),
                })
                .collect(),
            totals,
            foreign_senders,
            overhead,
            warnings: warnings.into_iter().collect(),
        }
    }
}

impl Totals {
    /// What was not counted.
    fn warnings(&self) -> Vec<String> {
        [
            (
                self.lost,
                "connections were not judged, for the map was full: give it more room by --map-flows",
            ),
            (
                self.lost_packets,
                "packets were of flows that the map had no room for",
            ),
            (
                self.lost_sockets,
                "connections behind NAT: their application's calls could not be told",
            ),
            (
                self.unparsed_packets,
                "TCP packets had headers that could not be read",
            ),
            (self.missed, "runs of probes were left out by the kernel"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, text)| format!("{count} {text}"))
        .collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let totals = &self.totals;
        let names: Vec<String> = self
            .bonds
            .iter()
            .map(|bond| match &bond.mode {
                Some(mode) => format!("{} ({mode})", bond.bond),
                None => bond.bond.clone(),
            })
            .collect();
        writeln!(
            f,
            "{}: {:.1} s, {} connections: {} complete, {} partial, {} lost; {} TCP packets received, {} sent",
            names.join(", "),
            self.seconds,
            totals.counts.connections,
            totals.counts.complete,
            totals.counts.partial,
            totals.lost,
            totals.seen_rx_packets,
            totals.seen_tx_packets
        )?;
        for bond in &self.bonds {
            if let (Some(local), Some(remote)) = (bond.policy_local, bond.policy_remote) {
                writeln!(
                    f,
                    "{}: the policy sent {local} frames by the CPU's own slave, {remote} by another",
                    bond.bond
                )?;
            }
        }
        if totals.no_socket > 0 {
            writeln!(
                f,
                "{} flows more had no socket here (refused or forwarded)",
                totals.no_socket
            )?;
        }
        writeln!(f)?;
        let mut rows = vec![
            [
                "PORT",
                "CONNECTIONS",
                "RX LOCAL",
                "APP LOCAL",
                "TX LOCAL",
                "ALL LOCAL",
                "WHY NOT",
            ]
            .map(String::from),
        ];
        rows.extend(
            self.groups
                .iter()
                .map(|group| row(group.port.to_string(), &group.counts)),
        );
        rows.push(row("all".to_string(), &totals.counts));
        table(f, &rows)?;

        if !self.flows.is_empty() {
            let some = match self.flows_left_out {
                0 => String::new(),
                _ => format!(", the worst {} of them", self.flows.len()),
            };
            writeln!(
                f,
                "\nThe flows{some} (CPU:slave, packets or calls; + elsewhere):"
            )?;
            let mut rows =
                vec![["LOCAL", "REMOTE", "RX", "APP", "TX", "WHY NOT"].map(String::from)];
            rows.extend(self.flows.iter().map(|flow| {
                [
                    flow.local.to_string(),
                    flow.remote.to_string(),
                    flow.rx.to_string(),
                    flow.app.to_string(),
                    flow.tx.to_string(),
                    flow.reasons
                        .iter()
                        .map(|reason| reason.name())
                        .collect::<Vec<_>>()
                        .join(" "),
                ]
            }));
            table(f, &rows)?;
        }
        if let Some(stacks) = &self.foreign_senders {
            writeln!(f, "\nSent on a CPU that does not receive the flow:")?;
            for stack in stacks {
                writeln!(
                    f,
                    "  {} packets: {}",
                    stack.packets,
                    stack.functions.join(" < ")
                )?;
            }
            if stacks.is_empty() {
                writeln!(f, "  nothing")?;
            }
        }
        writeln!(f, "\n{}", self.overhead)?;
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Overhead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Overhead: {} BPF programs", self.probes.len())?;
        if let Some(runs) = self
            .probes
            .iter()
            .map(|probe| probe.runs)
            .sum::<Option<u64>>()
        {
            write!(f, " ran {runs} times")?;
        }
        if let Some(ns) = self.ns_per_packet {
            write!(f, ", {ns:.0} ns a packet")?;
        }
        if let Some(share) = self.cpu_share {
            write!(f, ", {:.2} % of one CPU's time", share * 100.0)?;
        }
        write!(f, "; {} kB of kernel memory", self.map_bytes / 1024)
    }
}

impl fmt::Display for HopReport {
    /// `0:eth0 5`, `0:eth0 5+1`, `-` if nothing was seen.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(cpu) = self.cpu else {
            return f.write_str("-");
        };
        let other = self.other_cpu + self.other_slave;
        write!(f, "{cpu}")?;
        if let Some(slave) = &self.slave {
            write!(f, ":{slave}")?;
        }
        write!(f, " {}", self.total - other.min(self.total))?;
        if other > 0 {
            write!(f, "+{other}")?;
        }
        Ok(())
    }
}

fn row(name: String, counts: &Counts) -> [String; 7] {
    let percent = |share: Share| match share.ratio() {
        // Rounded down: 100 % is all of them.
        Some(ratio) => format!("{:.2} %", (ratio * 10_000.0).floor() / 100.0),
        None => "-".to_string(),
    };
    let reasons: Vec<String> = counts
        .reasons
        .iter()
        .map(|(reason, count)| format!("{} {count}", reason.name()))
        .collect();
    [
        name,
        counts.connections.to_string(),
        percent(counts.rx_local),
        percent(counts.app_local),
        percent(counts.tx_local),
        percent(counts.all_local),
        reasons.join(", "),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::judge::{Binding, Place};
    use super::super::probe::ProbeCost;
    use super::*;

    fn report(counters: Counters, measured: bool) -> Report {
        let hop = |slave| Hop {
            first: Some(Place { cpu: 0, slave }),
            total: 3,
            ..Hop::default()
        };
        let flow = |port: u16| Flow {
            local: SocketAddr::from(([10, 0, 0, 1], 80)),
            remote: SocketAddr::from(([10, 0, 0, 11], port)),
            socket: Some(SocketAddr::from(([10, 0, 0, 1], 8000))),
            opened: Some(Opened::Incoming),
            closed: true,
            rx: hop(Some(7)),
            app: hop(None),
            tx: hop(Some(7)),
            rps: 0,
        };
        let binding = Binding {
            bound: [(0, [7].into())].into(),
            ..Binding::default()
        };
        let mut tally = Tally::new(1);
        tally.add(flow(1), &binding);
        let mut bad = flow(2);
        bad.tx.other_slave = 1;
        tally.add(bad, &binding);
        Report::new(
            Duration::from_secs(2),
            true,
            &[],
            &[(7, "eth0".to_string())].into(),
            &mut tally,
            counters,
            Overhead {
                map_bytes: 4096,
                probes: vec![ProbeCost {
                    probe: "netif_receive_skb",
                    instructions: 100,
                    missed: 0,
                    runs: measured.then_some(8),
                    ns_per_run: measured.then_some(500.0),
                }],
                ns_per_packet: measured.then_some(1000.0),
                cpu_share: measured.then_some(0.0012),
            },
            None,
            BTreeSet::new(),
        )
    }

    #[test]
    fn json_has_totals_flows_and_what_was_left_out() {
        let json = serde_json::to_value(report(Counters::default(), true)).unwrap();
        assert_eq!(json["schema"], 1);
        assert_eq!(json["ended_by"], "signal");
        assert_eq!(json["totals"]["connections"], 2);
        assert_eq!(json["totals"]["lost"], 0);
        assert_eq!(json["totals"]["tx_local"], 0.5);
        assert_eq!(json["totals"]["reasons"]["tx_several_slaves"], 1);
        assert_eq!(json["groups"][0]["port"], 80);
        let flow = &json["flows"][0];
        assert_eq!(flow["remote"], "10.0.0.11:2");
        assert_eq!(flow["socket"], "10.0.0.1:8000");
        assert_eq!(flow["tx"]["slave"], "eth0");
        assert_eq!(flow["reasons"][0], "tx_several_slaves");
        assert_eq!(json["flows_left_out"], 1);
        assert_eq!(json["warnings"], serde_json::json!([]));
    }

    #[test]
    fn text_has_the_table_and_the_flows() {
        let text = report(Counters::default(), true).to_string();
        assert!(
            text.contains(
                "80    2            100.00 %  100.00 %   50.00 %   50.00 %    tx_several_slaves 1\n"
            ),
            "{text}"
        );
        assert!(text.contains("0:eth0 2+1  tx_several_slaves\n"), "{text}");
        assert!(!text.contains("10.0.0.11:1 "), "{text}");
        assert!(!text.contains("warning"), "{text}");
        assert!(text.contains("The flows, the worst 1 of them ("), "{text}");
    }

    #[test]
    fn overhead_is_stated_as_far_as_it_is_known() {
        let text = report(Counters::default(), true).to_string();
        let line = "Overhead: 1 BPF programs ran 8 times, 1000 ns a packet, \
                    0.12 % of one CPU's time; 4 kB of kernel memory\n";
        assert!(text.contains(line), "{text}");
        let text = report(Counters::default(), false).to_string();
        assert!(
            text.contains("Overhead: 1 BPF programs; 4 kB of kernel memory\nwarning: how long"),
            "{text}"
        );
    }

    #[test]
    fn what_is_lost_is_told() {
        let counters = Counters {
            lost_connections: 3,
            unparsed: 2,
            ..Counters::default()
        };
        let report = report(counters, true);
        assert_eq!(report.warnings.len(), 2);
        assert!(
            report
                .to_string()
                .contains("warning: 3 connections were not judged")
        );
    }
}
