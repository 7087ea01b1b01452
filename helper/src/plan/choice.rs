//! The choices for each slave, and why: how it is written, which CPUs, how many channels.

use super::machine::{Machine, Nic, counted};
use super::{SlaveProposal, Why};
use crate::bind;
use crate::config::{Resolved, Slave, SlaveId};
use crate::cpulist::CpuSet;
use crate::host::{self, Host};
use crate::link;
use crate::predict;
use crate::topology::Cpu;
use std::collections::BTreeSet;

/// What the choices for one slave are made from.
pub struct Choices<'a> {
    pub host: &'a Host,
    pub machine: &'a Machine,
    pub online: &'a [Cpu],
    pub shares: &'a [Vec<u32>],
    pub slaves: &'a [Resolved],
}

impl Choices<'_> {
    /// The slave with all that was open, and what the map will depend on.
    pub fn slave(
        &self,
        slave: &Resolved,
        share: &[u32],
        warnings: &mut Vec<String>,
    ) -> (SlaveProposal, predict::Slave) {
        let mut proposed = slave.slave.clone();
        let mut why = Why::new();
        let nic = self.machine.nic(&slave.link);
        if let (SlaveId::Name(_), Some(nic)) = (slave.slave.id(), nic) {
            proposed = self.identify(nic, &mut why);
            proposed.cpus = slave.slave.cpus.clone();
            proposed.channels = slave.slave.channels;
            proposed = proposed.set_cpus(slave.slave.set_cpus);
        }
        if proposed.cpus.is_none() {
            proposed.cpus = Some(share.iter().copied().collect());
            why.insert("cpus", self.cpus_reason(&slave.link, nic, share));
        }
        if let Some(nic) = nic.filter(|_| proposed.channels.is_none()) {
            proposed.channels = self.channels(nic, share, &mut why, warnings);
        }
        let queues = self.queues(&slave.link, nic, proposed.channels);
        let by_hand = proposed.set_cpus || queues.is_empty();
        if by_hand && !proposed.set_cpus {
            warnings.push(format!(
                "{}: has no interrupts of its own to bind it by: \"cpubond apply\" sets its CPUs by \
                 hand",
                slave.link
            ));
        }
        let cpus = match by_hand {
            true => share.iter().copied().collect(),
            false => queues
                .iter()
                .filter_map(|queue| bind::cpu_of_queue(share, *queue))
                .collect(),
        };
        let bound = predict::Slave {
            name: slave.link.clone(),
            node: link::numa_node(self.host, &slave.link),
            cpus,
            by_hand,
        };
        let proposal = SlaveProposal {
            device: Some(slave.link.clone()),
            slave: proposed,
            why,
        };
        (proposal, bound)
    }

    /// By what is least likely to change.
    fn identify(&self, nic: &Nic, why: &mut Why) -> Slave {
        let is_only = |same: &dyn Fn(&Nic) -> bool| {
            self.machine.nics.iter().filter(|nic| same(nic)).count() == 1
        };
        if let Some(mac) = nic.mac.filter(|_| is_only(&|other| other.mac == nic.mac)) {
            why.insert(
                "mac",
                "its permanent address: names and PCI places may change with the next card".into(),
            );
            return Slave::with_mac(mac);
        }
        let pci = nic.pci.as_ref().and_then(|pci| pci.parse().ok());
        if let Some(pci) = pci.filter(|_| is_only(&|other| other.pci == nic.pci)) {
            why.insert(
                "pci",
                "its place: it has no permanent address of its own, and its name may change".into(),
            );
            return Slave::at_pci(pci);
        }
        why.insert(
            "name",
            "it has neither a permanent address nor a PCI place of its own".into(),
        );
        Slave::named(&nic.name)
    }

    fn cpus_reason(&self, link: &str, nic: Option<&Nic>, share: &[u32]) -> String {
        let mut reasons = Vec::new();
        let sharers: Vec<&str> = self
            .slaves
            .iter()
            .zip(self.shares)
            .filter(|(slave, other)| {
                slave.link != link && other.iter().any(|cpu| share.contains(cpu))
            })
            .map(|(slave, _)| slave.link.as_str())
            .collect();
        match sharers.is_empty() {
            false => reasons.push(format!(
                "shared with {}: there are more NICs than CPUs",
                sharers.join(", ")
            )),
            true => {
                let all: usize = self.shares.iter().map(Vec::len).sum();
                let part = match self.slaves.len() {
                    1 => "all, for it is the only NIC".to_string(),
                    nics => format!("{} of {all}, its part among {nics} NICs", share.len()),
                };
                reasons.push(part);
            }
        }
        if self.machine.has_nodes() {
            let places: BTreeSet<Option<u32>> = self
                .online
                .iter()
                .filter(|cpu| share.contains(&cpu.id))
                .map(|cpu| cpu.node)
                .collect();
            let on = places
                .iter()
                .map(|node| node.map_or("none".into(), |node| node.to_string()))
                .collect::<Vec<_>>()
                .join(",");
            reasons.push(match nic.and_then(|nic| nic.node) {
                None => format!("on node {on}: where the NIC is nobody knows"),
                Some(node) if places.iter().all(|on| *on == Some(node)) => {
                    format!("all on its own node {node}")
                }
                Some(node) if places.contains(&Some(node)) => {
                    format!("on nodes {on}, queues on {node}, its own, first: it has too few for an even part")
                }
                Some(node) => format!(
                    "on node {on}, which has too few NICs: the CPUs of node {node}, its own, are \
                     the others'"
                ),
            });
        }
        if self.machine.has_threads() {
            let is_whole = self.machine.cores.iter().all(|core| {
                let threads = core.iter().filter(|cpu| share.contains(cpu)).count();
                threads == 0 || threads == core.iter().count()
            });
            reasons.push(match is_whole {
                true => "all threads of each core".to_string(),
                false => "cores are cut, or there would be too few CPUs".to_string(),
            });
        }
        reasons.join("; ")
    }

    /// A channel for each CPU of the share, as far as there are so many.
    fn channels(
        &self,
        nic: &Nic,
        share: &[u32],
        why: &mut Why,
        warnings: &mut Vec<String>,
    ) -> Option<u32> {
        let channels = nic.channels?;
        if channels.combined_max == 0 {
            if channels.rx + channels.tx > 0 {
                warnings.push(format!(
                    "{}: has {} receive and {} transmit channels, none that do both: they are left \
                     as they are",
                    nic.name, channels.rx, channels.tx
                ));
            }
            return None;
        }
        let wanted = u32::try_from(share.len()).unwrap_or(u32::MAX);
        let count = channels.combined_max.min(wanted).max(1);
        let reason = match count == wanted {
            true => format!("one for each CPU ({} at most)", channels.combined_max),
            false => {
                let (own, rest) = share.split_at(share.len().min(count as usize));
                let set = |cpus: &[u32]| cpus.iter().copied().collect::<CpuSet>();
                format!(
                    "all it has, fewer than CPUs: interrupts go to {}, and {} will send by the \
                     nearest slave",
                    set(own),
                    set(rest)
                )
            }
        };
        why.insert("channels", reason);
        Some(count)
    }

    /// The queues whose interrupts will be bound; none if it will have none.
    fn queues(&self, link: &str, nic: Option<&Nic>, channels: Option<u32>) -> Vec<u32> {
        let Some(nic) = nic else {
            return Vec::new();
        };
        let now = nic.channels.map(|channels| channels.combined);
        let there = nic.queues();
        if !there.is_empty() && (channels.is_none() || channels == now) {
            return there;
        }
        // Many drivers request interrupts only when the device is opened.
        if there.is_empty() && nic.pci.is_none() {
            return Vec::new();
        }
        let count = channels
            .or(now)
            .filter(|count| *count > 0)
            .unwrap_or_else(|| {
                let queues = host::numbered(&self.host.link(link).join("queues"), "rx-").len();
                u32::try_from(queues).unwrap_or(1).max(1)
            });
        (0..count).collect()
    }

    /// What is odd about the machine or the NICs taken together.
    pub fn warn(&self, warnings: &mut Vec<String>) {
        let mut warn = |text: String| warnings.push(text);
        let machine = self.machine;
        let nics: Vec<&Nic> = self
            .slaves
            .iter()
            .filter_map(|slave| machine.nic(&slave.link))
            .collect();
        if let [nic] = nics[..] {
            warn(format!(
                "{}: the only NIC: a bond of one has every CPU send by it, and nothing to fall \
                 back on",
                nic.name
            ));
        }
        if self.shares.len() > machine.online.iter().count() {
            warn(format!(
                "{} for {}: some share a CPU; fewer NICs would do",
                counted(self.shares.len(), "NIC"),
                counted(machine.online.iter().count(), "CPU")
            ));
        }
        if !machine.offline.is_empty() {
            warn(format!(
                "CPUs {} are offline and have no part in the plan; plan anew when they are online",
                machine.offline
            ));
        }
        let lost: Vec<&str> = nics
            .iter()
            .filter(|nic| machine.has_nodes() && nic.node.is_none())
            .map(|nic| nic.name.as_str())
            .collect();
        if !lost.is_empty() {
            warn(format!(
                "{}: the firmware does not say on which NUMA node, so their CPUs may be far; the \
                 board's manual knows, and cpus= says it",
                lost.join(", ")
            ));
        }
        let speeds: BTreeSet<u32> = nics.iter().filter_map(|nic| nic.speed).collect();
        if speeds.len() > 1 {
            let speeds: Vec<String> = speeds.iter().map(u32::to_string).collect();
            warn(format!(
                "links of different speed ({} Mb/s): shares are even, and an aggregate by LACP has \
                 links of one speed only",
                speeds.join(", ")
            ));
        }
        for nic in nics.iter().filter(|nic| nic.up && !nic.carrier) {
            warn(format!(
                "{}: no carrier: see to its cable and its switch port",
                nic.name
            ));
        }
        for nic in nics.iter().filter(|nic| nic.default_route) {
            warn(format!(
                "{}: carries a default route: apply from a console, or with --rollback-after, and \
                 see that the route goes by the bond then",
                nic.name
            ));
        }
    }
}
