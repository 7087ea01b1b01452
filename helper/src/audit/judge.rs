//! From what the probe counted of a flow to whether it is local, and why not. Pure.

use serde::{Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

/// A CPU and, where a device has a part in it, the slave by its ifindex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub cpu: u32,
    pub slave: Option<u32>,
}

/// Where the packets or calls of a flow were at one hop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    pub first: Option<Place>,
    /// The last place that was not the first.
    pub elsewhere: Option<Place>,
    pub total: u64,
    /// Of these, on another CPU than the first.
    pub other_cpu: u64,
    /// Of these, on the first CPU, but by another slave.
    pub other_slave: u64,
}

/// Who sent the SYN, if it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Opened {
    Incoming,
    Outgoing,
}

/// A TCP connection, or the part of it that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// What the socket calls its local end; `None` if no socket was seen to send.
    pub socket: Option<SocketAddr>,
    pub opened: Option<Opened>,
    /// FINs of both sides, or a reset, were seen.
    pub closed: bool,
    pub rx: Hop,
    pub app: Hop,
    pub tx: Hop,
    /// Packets received that RPS had moved to another CPU.
    pub rps: u64,
}

impl Flow {
    /// Seen from its first packet to its end.
    pub fn is_complete(&self) -> bool {
        self.opened.is_some() && self.closed
    }

    /// The port of the service: of the side that did not open the connection; where that was not
    /// seen, the lower port, which is most likely it.
    pub fn service_port(&self) -> u16 {
        let (local, remote) = (self.local.port(), self.remote.port());
        match self.opened {
            Some(Opened::Incoming) => local,
            Some(Opened::Outgoing) => remote,
            None => local.min(remote),
        }
    }
}

/// Which slaves each CPU is bound to, and which it sends by for want of one of its own. By CPU,
/// slaves by ifindex.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    pub bound: BTreeMap<u32, BTreeSet<u32>>,
    pub fallback: BTreeMap<u32, BTreeSet<u32>>,
}

impl Binding {
    fn has(side: &BTreeMap<u32, BTreeSet<u32>>, place: Place) -> bool {
        place.slave.is_some_and(|slave| {
            side.get(&place.cpu)
                .is_some_and(|slaves| slaves.contains(&slave))
        })
    }

    fn binds(&self, place: Place) -> bool {
        Self::has(&self.bound, place)
    }

    fn falls_back(&self, place: Place) -> bool {
        Self::has(&self.fallback, place)
    }
}

/// Why a hop is not local: the first that applies, in this order within each hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Nothing was received while the audit looked.
    RxUnseen,
    /// RPS moved packets from the CPU of the interrupt to another.
    RxRps,
    /// Received on several CPUs.
    RxSeveralCpus,
    /// Received by several slaves.
    RxSeveralSlaves,
    /// Received on a CPU that uses this slave only because it has none of its own.
    RxFallbackSlave,
    /// Received on a CPU that is bound to another slave, or to none.
    RxOtherSlave,
    /// The application did not accept, receive or send.
    AppUnseen,
    /// The application used the connection on several CPUs.
    AppSeveralCpus,
    /// The application runs on another CPU than the one that receives.
    AppOtherCpu,
    /// Nothing was sent.
    TxUnseen,
    /// Sent by several CPUs.
    TxSeveralCpus,
    /// Sent by another CPU than the one that receives.
    TxOtherCpu,
    /// Sent by several slaves.
    TxSeveralSlaves,
    /// Sent by a slave that the CPU uses only because it has none of its own.
    TxFallbackSlave,
    /// Sent by a slave that is not the CPU's.
    TxOtherSlave,
}

impl Reason {
    /// As in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::RxUnseen => "rx_unseen",
            Self::RxRps => "rx_rps",
            Self::RxSeveralCpus => "rx_several_cpus",
            Self::RxSeveralSlaves => "rx_several_slaves",
            Self::RxFallbackSlave => "rx_fallback_slave",
            Self::RxOtherSlave => "rx_other_slave",
            Self::AppUnseen => "app_unseen",
            Self::AppSeveralCpus => "app_several_cpus",
            Self::AppOtherCpu => "app_other_cpu",
            Self::TxUnseen => "tx_unseen",
            Self::TxSeveralCpus => "tx_several_cpus",
            Self::TxOtherCpu => "tx_other_cpu",
            Self::TxSeveralSlaves => "tx_several_slaves",
            Self::TxFallbackSlave => "tx_fallback_slave",
            Self::TxOtherSlave => "tx_other_slave",
        }
    }
}

/// Of each hop: `None` if it is local, else why not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub rx: Option<Reason>,
    pub app: Option<Reason>,
    pub tx: Option<Reason>,
}

impl Verdict {
    /// A hop is local only if every packet and call of the flow was.
    pub fn of(flow: &Flow, binding: &Binding) -> Self {
        Self {
            rx: rx(flow, binding),
            app: app(flow),
            tx: tx(flow, binding),
        }
    }

    pub fn reasons(&self) -> impl Iterator<Item = Reason> {
        [self.rx, self.app, self.tx].into_iter().flatten()
    }

    pub fn is_local(&self) -> bool {
        self.reasons().next().is_none()
    }
}

fn rx(flow: &Flow, binding: &Binding) -> Option<Reason> {
    let hop = &flow.rx;
    let Some(place) = hop.first else {
        return Some(Reason::RxUnseen);
    };
    let binds = binding.binds(place);
    // RPS that picks the CPU of the interrupt anyway moves nothing.
    if flow.rps > 0 && (!binds || hop.other_cpu > 0) {
        Some(Reason::RxRps)
    } else if hop.other_cpu > 0 {
        Some(Reason::RxSeveralCpus)
    } else if hop.other_slave > 0 {
        Some(Reason::RxSeveralSlaves)
    } else if binds {
        None
    } else if binding.falls_back(place) {
        Some(Reason::RxFallbackSlave)
    } else {
        Some(Reason::RxOtherSlave)
    }
}

fn app(flow: &Flow) -> Option<Reason> {
    let hop = &flow.app;
    let Some(place) = hop.first else {
        return Some(Reason::AppUnseen);
    };
    if hop.other_cpu > 0 {
        Some(Reason::AppSeveralCpus)
    } else if flow.rx.first.is_none_or(|rx| rx.cpu != place.cpu) {
        Some(Reason::AppOtherCpu)
    } else {
        None
    }
}

fn tx(flow: &Flow, binding: &Binding) -> Option<Reason> {
    let hop = &flow.tx;
    let Some(place) = hop.first else {
        return Some(Reason::TxUnseen);
    };
    if hop.other_cpu > 0 {
        Some(Reason::TxSeveralCpus)
    } else if flow.rx.first.is_none_or(|rx| rx.cpu != place.cpu) {
        Some(Reason::TxOtherCpu)
    } else if hop.other_slave > 0 {
        Some(Reason::TxSeveralSlaves)
    } else if binding.binds(place) {
        None
    } else if binding.falls_back(place) {
        Some(Reason::TxFallbackSlave)
    } else {
        Some(Reason::TxOtherSlave)
    }
}

/// Counts of flows. Shares are of `connections`, 0 to 1, `null` if there are none.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Flows that were judged.
    pub connections: u64,
    /// Of these, seen from their first packet to their end.
    pub complete: u64,
    /// Of these, open before the audit began or still open at its end.
    pub partial: u64,
    #[serde(serialize_with = "ratio")]
    pub rx_local: Share,
    #[serde(serialize_with = "ratio")]
    pub app_local: Share,
    #[serde(serialize_with = "ratio")]
    pub tx_local: Share,
    #[serde(serialize_with = "ratio")]
    pub all_local: Share,
    /// Packets received, as the stack takes them (after GRO).
    pub rx_packets: u64,
    /// Calls of accept, receive and send.
    pub app_calls: u64,
    /// Packets sent, as the driver takes them (before TSO).
    pub tx_packets: u64,
    /// Why flows are not local; a flow has at most one reason a hop.
    pub reasons: BTreeMap<Reason, u64>,
}

/// So many of so many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    pub part: u64,
    pub whole: u64,
}

impl Share {
    #[expect(
        clippy::cast_precision_loss,
        reason = "there are far fewer than 2^52 connections"
    )]
    pub fn ratio(self) -> Option<f64> {
        (self.whole > 0).then(|| self.part as f64 / self.whole as f64)
    }

    fn add(&mut self, local: bool) {
        self.part += u64::from(local);
        self.whole += 1;
    }
}

fn ratio<S: Serializer>(share: &Share, serializer: S) -> Result<S::Ok, S::Error> {
    share.ratio().serialize(serializer)
}

impl Counts {
    fn add(&mut self, flow: &Flow, verdict: &Verdict) {
        self.connections += 1;
        if flow.is_complete() {
            self.complete += 1;
        } else {
            self.partial += 1;
        }
        self.rx_local.add(verdict.rx.is_none());
        self.app_local.add(verdict.app.is_none());
        self.tx_local.add(verdict.tx.is_none());
        self.all_local.add(verdict.is_local());
        self.rx_packets += flow.rx.total;
        self.app_calls += flow.app.total;
        self.tx_packets += flow.tx.total;
        for reason in verdict.reasons() {
            *self.reasons.entry(reason).or_default() += 1;
        }
    }
}

/// What has been judged up to now; its size does not grow with the number of flows.
#[derive(Debug)]
pub struct Tally {
    pub totals: Counts,
    /// By service port.
    pub groups: BTreeMap<u16, Counts>,
    /// Flows that no socket of this host has sent a packet of: refused, answered by nobody,
    /// forwarded. Not in the totals.
    pub no_socket: u64,
    pub no_socket_packets: u64,
    worst: Vec<(Flow, Verdict)>,
    keep: usize,
}

impl Tally {
    /// Keep the `keep` worst flows for the report.
    pub fn new(keep: usize) -> Self {
        Self {
            totals: Counts::default(),
            groups: BTreeMap::new(),
            no_socket: 0,
            no_socket_packets: 0,
            worst: Vec::new(),
            keep,
        }
    }

    pub fn add(&mut self, flow: Flow, binding: &Binding) {
        if flow.socket.is_none() {
            self.no_socket += 1;
            self.no_socket_packets += flow.rx.total + flow.tx.total;
            return;
        }
        let verdict = Verdict::of(&flow, binding);
        self.totals.add(&flow, &verdict);
        self.groups
            .entry(flow.service_port())
            .or_default()
            .add(&flow, &verdict);
        self.worst.push((flow, verdict));
        if self.worst.len() >= 2 * self.keep.max(512) {
            self.shorten();
        }
    }

    /// The worst flows, the worst of them first: by hops that are not local, then by packets.
    pub fn worst(&mut self) -> &[(Flow, Verdict)] {
        self.shorten();
        &self.worst
    }

    fn shorten(&mut self) {
        self.worst.sort_by_key(|(flow, verdict)| {
            std::cmp::Reverse((verdict.reasons().count(), flow.rx.total + flow.tx.total))
        });
        self.worst.truncate(self.keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETH0: u32 = 10;
    const ETH1: u32 = 11;

    /// CPU 0 has eth0, CPU 1 has eth1, CPU 2 has none and sends by eth0.
    fn binding() -> Binding {
        Binding {
            bound: [(0, [ETH0].into()), (1, [ETH1].into())].into(),
            fallback: [(2, [ETH0].into())].into(),
        }
    }

    fn hop(cpu: u32, slave: Option<u32>) -> Hop {
        Hop {
            first: Some(Place { cpu, slave }),
            total: 5,
            ..Hop::default()
        }
    }

    /// A complete connection to port 80, all of it on CPU 0.
    fn local() -> Flow {
        let local = "10.0.0.1:80".parse().unwrap();
        Flow {
            local,
            remote: "10.0.0.11:40000".parse().unwrap(),
            socket: Some(local),
            opened: Some(Opened::Incoming),
            closed: true,
            rx: hop(0, Some(ETH0)),
            app: hop(0, None),
            tx: hop(0, Some(ETH0)),
            rps: 0,
        }
    }

    fn verdict(change: impl FnOnce(&mut Flow)) -> Vec<Reason> {
        let mut flow = local();
        change(&mut flow);
        Verdict::of(&flow, &binding()).reasons().collect()
    }

    #[test]
    fn a_flow_on_one_cpu_is_local() {
        assert_eq!(verdict(|_| ()), []);
    }

    #[test]
    fn receive_has_its_reasons() {
        assert_eq!(
            verdict(|flow| flow.rx = Hop::default()),
            [Reason::RxUnseen, Reason::AppOtherCpu, Reason::TxOtherCpu]
        );
        assert_eq!(
            verdict(|flow| flow.rx.other_cpu = 1),
            [Reason::RxSeveralCpus]
        );
        assert_eq!(
            verdict(|flow| flow.rx.other_slave = 1),
            [Reason::RxSeveralSlaves]
        );
        assert_eq!(
            verdict(|flow| flow.rx = hop(0, Some(ETH1))),
            [Reason::RxOtherSlave]
        );
        // CPU 2 has no slave of its own, so what it does is never local.
        assert_eq!(
            verdict(|flow| {
                flow.rx = hop(2, Some(ETH0));
                flow.app = hop(2, None);
                flow.tx = hop(2, Some(ETH0));
            }),
            [Reason::RxFallbackSlave, Reason::TxFallbackSlave]
        );
    }

    #[test]
    fn rps_is_named_only_where_it_moved_packets() {
        assert_eq!(verdict(|flow| flow.rps = 5), []);
        assert_eq!(
            verdict(|flow| {
                flow.rps = 5;
                flow.rx = hop(1, Some(ETH0));
            }),
            [Reason::RxRps, Reason::AppOtherCpu, Reason::TxOtherCpu]
        );
        assert_eq!(
            verdict(|flow| {
                flow.rps = 1;
                flow.rx.other_cpu = 1;
            }),
            [Reason::RxRps]
        );
    }

    #[test]
    fn the_application_has_its_reasons() {
        assert_eq!(
            verdict(|flow| flow.app = Hop::default()),
            [Reason::AppUnseen]
        );
        assert_eq!(
            verdict(|flow| flow.app.other_cpu = 1),
            [Reason::AppSeveralCpus]
        );
        assert_eq!(
            verdict(|flow| flow.app = hop(1, None)),
            [Reason::AppOtherCpu]
        );
    }

    #[test]
    fn transmit_has_its_reasons() {
        for (change, reason) in [
            (Hop::default(), Reason::TxUnseen),
            (
                Hop {
                    other_cpu: 1,
                    ..hop(0, Some(ETH0))
                },
                Reason::TxSeveralCpus,
            ),
            // By its own slave, but on another CPU than the one that receives.
            (hop(1, Some(ETH1)), Reason::TxOtherCpu),
            (
                Hop {
                    other_slave: 3,
                    ..hop(0, Some(ETH0))
                },
                Reason::TxSeveralSlaves,
            ),
            (hop(0, Some(ETH1)), Reason::TxOtherSlave),
        ] {
            assert_eq!(verdict(|flow| flow.tx = change), [reason]);
        }
    }

    #[test]
    fn names_are_those_of_the_json() {
        for reason in [
            Reason::RxUnseen,
            Reason::RxRps,
            Reason::RxSeveralCpus,
            Reason::RxSeveralSlaves,
            Reason::RxFallbackSlave,
            Reason::RxOtherSlave,
            Reason::AppUnseen,
            Reason::AppSeveralCpus,
            Reason::AppOtherCpu,
            Reason::TxUnseen,
            Reason::TxSeveralCpus,
            Reason::TxOtherCpu,
            Reason::TxSeveralSlaves,
            Reason::TxFallbackSlave,
            Reason::TxOtherSlave,
        ] {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
        }
    }

    #[test]
    fn groups_are_services() {
        let mut flow = local();
        assert_eq!(flow.service_port(), 80);
        flow.opened = Some(Opened::Outgoing);
        assert_eq!(flow.service_port(), 40000);
        flow.opened = None;
        assert_eq!(flow.service_port(), 80);
    }

    #[test]
    fn totals_count_each_flow_once() {
        let mut tally = Tally::new(2);
        let binding = binding();
        for _ in 0..3 {
            tally.add(local(), &binding);
        }
        let mut open = local();
        open.closed = false;
        open.app = hop(1, None);
        tally.add(open.clone(), &binding);
        let mut refused = local();
        refused.socket = None;
        tally.add(refused, &binding);

        let totals = &tally.totals;
        assert_eq!(
            (totals.connections, totals.complete, totals.partial),
            (4, 3, 1)
        );
        assert_eq!(tally.no_socket, 1);
        assert_eq!(totals.rx_local.ratio(), Some(1.0));
        assert_eq!(totals.app_local.ratio(), Some(0.75));
        assert_eq!(totals.all_local.ratio(), Some(0.75));
        assert_eq!(totals.reasons, [(Reason::AppOtherCpu, 1)].into());
        assert_eq!(tally.groups[&80], *totals);
        let worst = tally.worst();
        assert_eq!(worst.len(), 2);
        assert_eq!(worst[0].0, open);
        assert_eq!(Counts::default().rx_local.ratio(), None);
    }
}
