//! The ways to send that are measured side by side, and setting each of them up on this
//! machine's NICs: in the lab's server, or where `cpubond bench native` runs.

use super::{queue_id, team};
use crate::cpulist::CpuSet;
use crate::host::{self, Host};
use crate::netlink::Rtnetlink;
use crate::{irq, link};
use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use netlink_packet_route::link::InfoKind;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// The bond or team of all peers that have one.
pub const DEVICE: &str = "bench0";
/// Its index, of our choice, as `create_bond` wants one.
const INDEX: u32 = 0x6265_6e63;
/// For links, LACP and the policy's map to settle, on an emulated machine.
const SETTLE: Duration = Duration::from_secs(120);

/// A way to send by several NICs from several CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
pub enum Peer {
    /// No bond; each CPU has a NIC to itself. The floor
    #[serde(rename = "raw-private")]
    RawPrivate,
    /// No bond; all CPUs send by one NIC
    #[serde(rename = "raw-shared")]
    RawShared,
    /// Packet by packet, each slave in turn
    #[serde(rename = "balance-rr")]
    BalanceRr,
    /// A slave for each flow, by the hash layer3+4
    #[serde(rename = "balance-xor")]
    BalanceXor,
    /// The same with LACP
    #[value(name = "802.3ad")]
    #[serde(rename = "802.3ad")]
    Lacp,
    /// One slave for all: what a bond costs that need not choose
    #[serde(rename = "active-backup")]
    ActiveBackup,
    /// The team driver, a port for each flow by a classic-BPF hash
    #[serde(rename = "team-hash")]
    TeamHash,
    /// The team driver with a classic-BPF "hash" that returns the CPU
    #[serde(rename = "team-cpu")]
    TeamCpu,
    /// Bonding's `queue_id`, set by a tc BPF program that looks at the CPU
    #[value(name = "queue_id-bpf")]
    #[serde(rename = "queue_id-bpf")]
    QueueId,
    /// No bond: one NIC with a queue for every CPU, and XPS
    #[serde(rename = "multiqueue")]
    Multiqueue,
    /// Ours, as a mode
    #[value(name = "cpu_bound")]
    #[serde(rename = "cpu_bound")]
    CpuBound,
    /// Ours, as the hash policy of 802.3ad
    #[value(name = "802.3ad+cpu_bound")]
    #[serde(rename = "802.3ad+cpu_bound")]
    LacpCpuBound,
}

/// Which of the far end's configurations a peer of ours needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FarEnd {
    /// Each NIC by itself, 10.1.K.2.
    Bare,
    /// A bond in this mode, 10.0.0.2.
    Bond(&'static str),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::options::name(*self))
    }
}

impl Peer {
    /// All, in the order of the tables.
    pub const ALL: [Self; 12] = [
        Self::RawPrivate,
        Self::RawShared,
        Self::BalanceRr,
        Self::BalanceXor,
        Self::Lacp,
        Self::ActiveBackup,
        Self::TeamHash,
        Self::TeamCpu,
        Self::QueueId,
        Self::Multiqueue,
        Self::CpuBound,
        Self::LacpCpuBound,
    ];

    /// Our own.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::CpuBound | Self::LacpCpuBound)
    }

    /// Sends a flow, not a CPU, by one slave: these have every CPU on every NIC.
    pub fn spreads_flows(self) -> bool {
        matches!(
            self,
            Self::BalanceRr | Self::BalanceXor | Self::Lacp | Self::TeamHash
        )
    }

    /// Has neither bond nor team.
    pub fn is_raw(self) -> bool {
        matches!(self, Self::RawPrivate | Self::RawShared | Self::Multiqueue)
    }

    /// The kernel function that a packet enters the bond by, where there is one.
    pub fn entry(self) -> Option<&'static str> {
        match self {
            _ if self.is_raw() => None,
            Self::TeamHash | Self::TeamCpu => Some("team_xmit"),
            _ => Some("bond_start_xmit"),
        }
    }

    /// What the other end of the cables must be.
    pub fn far_end(self) -> FarEnd {
        match self {
            _ if self.is_raw() => FarEnd::Bare,
            Self::Lacp | Self::LacpCpuBound => FarEnd::Bond("802.3ad"),
            Self::ActiveBackup => FarEnd::Bond("active-backup"),
            _ => FarEnd::Bond("balance-xor"),
        }
    }

    fn mode(self) -> Option<(&'static str, Option<&'static str>)> {
        Some(match self {
            // Only this mode and active-backup look at queue_id.
            Self::BalanceRr | Self::QueueId => ("balance-rr", None),
            Self::BalanceXor => ("balance-xor", Some("layer3+4")),
            Self::Lacp => ("802.3ad", Some("layer3+4")),
            Self::ActiveBackup => ("active-backup", None),
            Self::CpuBound => ("cpu_bound", None),
            Self::LacpCpuBound => ("802.3ad", Some("cpu_bound")),
            _ => return None,
        })
    }
}

/// The NICs and CPUs to set a peer up on.
#[derive(Clone, Debug)]
pub struct Site {
    /// In order: which CPU has which NIC follows from it.
    pub nics: Vec<String>,
    /// CPUs that send, from 0.
    pub cpus: u32,
    /// Transmit queues of each NIC.
    pub queues: u32,
}

impl Site {
    /// The NIC that is the CPU's own where each CPU has one, or a queue of one.
    pub fn nic_of(&self, cpu: u32) -> usize {
        let slot = if self.queues >= self.cpus {
            cpu
        } else {
            cpu / self.queues.max(1)
        };
        slot as usize % self.nics.len().max(1)
    }

    /// The CPU that a queue's interrupts go to.
    fn cpu_of(&self, nic: usize, queue: u32) -> u32 {
        let nic = u32::try_from(nic).unwrap_or(0);
        let slot = match self.queues {
            1 => nic,
            queues if queues >= self.cpus => queue,
            queues => nic * queues + queue,
        };
        slot % self.cpus
    }

    /// CPUs shifted by this are NICs, for the peers that compute one from the other.
    fn shift(&self) -> Result<u32> {
        if self.queues >= self.cpus {
            return Ok(0);
        }
        if !self.queues.is_power_of_two() {
            bail!(
                "{} queues a NIC: want a power of two, or a queue for every CPU",
                self.queues
            );
        }
        Ok(self.queues.trailing_zeros())
    }

    /// By which device a CPU sends.
    pub fn device(&self, peer: Peer, cpu: u32) -> &str {
        match peer {
            Peer::RawPrivate => &self.nics[self.nic_of(cpu)],
            _ if peer.is_raw() => &self.nics[0],
            _ => DEVICE,
        }
    }

    /// Where in the lab a CPU sends to: address and hardware address.
    pub fn target(&self, peer: Peer, cpu: u32) -> (Ipv4Addr, String) {
        let nic = match peer {
            Peer::RawPrivate => self.nic_of(cpu),
            _ if peer.is_raw() => 0,
            _ => return (Ipv4Addr::new(10, 0, 0, 2), far_mac(0)),
        };
        let nic = u8::try_from(nic).unwrap_or(u8::MAX);
        (Ipv4Addr::new(10, 1, nic, 2), far_mac(nic))
    }

    /// All addresses that a CPU may send to, that of `target` first. A bond at the far end has
    /// more, and sends to each of its flows by the NIC that goes with both addresses.
    pub fn addresses(&self, peer: Peer, cpu: u32) -> Vec<Ipv4Addr> {
        let mut addresses = vec![self.target(peer, cpu).0];
        if !peer.is_raw() {
            addresses.extend((11..=18).map(|last| Ipv4Addr::new(10, 0, 0, last)));
        }
        addresses
    }

    /// Whether the peer makes sense here.
    pub fn suits(&self, peer: Peer) -> bool {
        peer != Peer::Multiqueue || self.queues > 1 && self.queues >= self.cpus
    }
}

/// The NICs of the lab's other machine.
fn far_mac(nic: u8) -> String {
    format!("52:54:00:00:02:{nic:02x}")
}

/// Take down what an earlier peer had.
pub fn tear_down(host: &Host, site: &Site) -> Result<()> {
    queue_id::detach()?;
    let mut netlink = Rtnetlink::open()?;
    if link::exists(host, DEVICE) {
        netlink.set_up(DEVICE, false)?;
        netlink.delete(DEVICE)?;
    }
    for nic in &site.nics {
        for address in netlink.addresses(nic)? {
            netlink.delete_address(nic, address)?;
        }
    }
    Ok(())
}

/// Set the peer up in place of whatever there is, and wait until it can send.
pub fn set_up(host: &Host, peer: Peer, site: &Site) -> Result<()> {
    tear_down(host, site)?;
    let mut netlink = Rtnetlink::open()?;
    match peer.mode() {
        Some((mode, policy)) => {
            make_bond(host, &mut netlink, site, mode, policy)?;
            if peer == Peer::QueueId {
                for (nic, cpu) in site.nics.iter().zip(1..) {
                    write(host, DEVICE, "bonding/queue_id", &format!("{nic}:{cpu}"))?;
                }
                queue_id::attach(DEVICE, site.shift()?)?;
            }
        }
        None if peer.is_raw() => {
            for nic in &site.nics {
                netlink.set_up(nic, true)?;
            }
        }
        None => {
            modprobe(&["team_mode_loadbalance"])?;
            // As a bond does: so that who knew the last peer knows this one.
            let mac = netlink
                .permanent_mac(&site.nics[0])?
                .with_context(|| format!("{}: has no address of its own", site.nics[0]))?;
            netlink.create(DEVICE, InfoKind::Team, mac)?;
            let hash = match peer {
                Peer::TeamCpu => team::cpu_hash(site.shift()?),
                _ => team::flow_hash(),
            };
            team::load_balance(netlink.index(DEVICE)?, &hash)?;
            netlink.set_up(DEVICE, true)?;
            // One after the other: in this order they get their numbers.
            for nic in &site.nics {
                netlink.set_up(nic, false)?;
                netlink.set_master(nic, Some(DEVICE))?;
                // As teamd does it, and the driver takes it back: in this mode it leaves ports
                // their own.
                netlink.set_mac(nic, mac)?;
                netlink.set_up(nic, true)?;
                wait(&format!("{nic}: no carrier"), || {
                    Ok(link::has_carrier(host, nic))
                })?;
            }
        }
    }
    if !peer.is_raw() {
        netlink.set_up(DEVICE, true)?;
    }
    // Now that all are up: a NIC that is down need not have interrupts.
    bind(host, site)?;
    settle(host, peer, site)
}

/// The lab's, for a peer that is set up, and who is where: no ARP is among what is counted.
pub fn give_addresses(peer: Peer, site: &Site) -> Result<()> {
    let mut netlink = Rtnetlink::open()?;
    if peer.is_raw() {
        for (nic, name) in site.nics.iter().enumerate() {
            netlink.add_address(name, format!("10.1.{nic}.1/24").parse()?)?;
        }
    } else {
        netlink.add_address(DEVICE, "10.0.0.1/24".parse()?)?;
    }
    for cpu in 0..site.cpus {
        let (_, mac) = site.target(peer, cpu);
        let mac = mac.parse().map_err(|error| anyhow!("{mac}: {error}"))?;
        for address in site.addresses(peer, cpu) {
            netlink.set_neighbour(site.device(peer, cpu), address, mac)?;
        }
    }
    Ok(())
}

/// The NICs as they were: up or down, where interrupts go, who sends on which queue.
pub struct Before {
    /// Each, and whether it was up.
    nics: Vec<(String, bool)>,
    files: Vec<(PathBuf, String)>,
}

impl Before {
    /// As it is now. All are up from here on: one that is down need not have interrupts.
    pub fn read(host: &Host, site: &Site) -> Result<Self> {
        let nic = |nic: &String| (nic.clone(), link::is_up(host, nic));
        let mut before = Self {
            nics: site.nics.iter().map(nic).collect(),
            files: Vec::new(),
        };
        match before.read_files(host) {
            Ok(()) => Ok(before),
            Err(error) => before.put_back().and(Err(error)),
        }
    }

    fn read_files(&mut self, host: &Host) -> Result<()> {
        let mut netlink = Rtnetlink::open()?;
        for (nic, _) in &self.nics {
            netlink.set_up(nic, true)?;
            let irqs = irq::of_link(host, nic).into_iter();
            let queues = link::xps(host, nic).into_iter().map(|queue| queue.path);
            for path in irqs
                .map(|irq| irq::affinity_path(host, irq.number))
                .chain(queues)
            {
                let value = host::read(&path)?;
                self.files.push((path, value));
            }
        }
        Ok(())
    }

    /// Put it back, all of it; the first that fails is told.
    pub fn put_back(&self) -> Result<()> {
        let mut netlink = Rtnetlink::open()?;
        let mut first = Ok(());
        let mut then =
            |result: Result<()>| first = std::mem::replace(&mut first, Ok(())).and(result);
        for (nic, _) in &self.nics {
            then(netlink.set_up(nic, true).map_err(Into::into));
        }
        for (path, value) in &self.files {
            then(fs::write(path, value).with_context(|| path.display().to_string()));
        }
        for (nic, _) in self.nics.iter().filter(|(_, up)| !up) {
            then(netlink.set_up(nic, false).map_err(Into::into));
        }
        first
    }
}

fn make_bond(
    host: &Host,
    netlink: &mut Rtnetlink,
    site: &Site,
    mode: &str,
    policy: Option<&str>,
) -> Result<()> {
    // queue_id needs a queue of the bond for every slave, and one for "none".
    modprobe(&["bonding", "max_bonds=0", "tx_queues=64"])?;
    netlink.create_bond(DEVICE, INDEX)?;
    let set = |name: &str, value: &str| write(host, DEVICE, &format!("bonding/{name}"), value);
    set("mode", mode)?;
    set("miimon", "50")?;
    if let Some(policy) = policy {
        set("xmit_hash_policy", policy)?;
    }
    if mode == "802.3ad" {
        set("lacp_rate", "fast")?;
    }
    for nic in &site.nics {
        netlink.set_up(nic, false)?;
        netlink.set_master(nic, Some(DEVICE))?;
    }
    if mode == "active-backup" {
        set("primary", &site.nics[0])?;
    }
    Ok(())
}

/// Each queue's interrupts to one CPU, and where there is a choice of queues, each CPU to one:
/// the same for every peer.
fn bind(host: &Host, site: &Site) -> Result<()> {
    for (nic, name) in site.nics.iter().enumerate() {
        for irq in irq::of_link(host, name) {
            if let Some(queue) = irq.queue {
                let path = irq::affinity_path(host, irq.number);
                fs::write(&path, site.cpu_of(nic, queue).to_string())
                    .with_context(|| path.display().to_string())?;
            }
        }
        for queue in link::xps(host, name) {
            let mut cpus = CpuSet::default();
            (0..site.cpus)
                .filter(|cpu| cpu % site.queues == queue.queue)
                .for_each(|cpu| cpus.insert(cpu));
            fs::write(&queue.path, cpus.to_mask())
                .with_context(|| queue.path.display().to_string())?;
        }
    }
    Ok(())
}

fn settle(host: &Host, peer: Peer, site: &Site) -> Result<()> {
    for nic in &site.nics {
        wait(&format!("{nic}: no carrier"), || {
            Ok(link::has_carrier(host, nic))
        })?;
    }
    if peer.is_raw() {
        return Ok(());
    }
    wait(&format!("{DEVICE}: no carrier"), || {
        Ok(link::has_carrier(host, DEVICE))
    })?;
    if matches!(peer, Peer::TeamHash | Peer::TeamCpu) {
        return Ok(());
    }
    let at = host.link(DEVICE).join("bonding");
    let slaves = site.nics.len().to_string();
    if let FarEnd::Bond("802.3ad") = peer.far_end() {
        wait("LACP: not all slaves are in one aggregate", || {
            Ok(host::read_if_any(&at.join("ad_num_ports")).is_some_and(|n| n == slaves))
        })?;
    }
    wait("the bond: not all slaves are up", || {
        Ok(site.nics.iter().all(|nic| crate::bond::has_link(host, nic)))
    })
}

/// Whether the policy's map is what the bindings say; an interrupt moves when it next fires,
/// so somebody has to send meanwhile.
pub fn map_settled(host: &Host, site: &Site) -> Result<bool> {
    let map = crate::bond::map(host, DEVICE)
        .ok_or_else(|| anyhow!("{DEVICE}: the bonding driver is not the patched one"))?;
    Ok(map.iter().filter(|line| line.cpu < site.cpus).all(|line| {
        let own = &site.nics[site.nic_of(line.cpu)];
        line.is_bound()
            && line.slaves.contains(own)
            && (site.queues >= site.cpus && site.queues > 1 || line.slaves.len() == 1)
    }))
}

/// Until `ready` says so, or for long enough: whether it did.
pub fn wait_until(mut ready: impl FnMut() -> Result<bool>) -> Result<bool> {
    let end = Instant::now() + SETTLE;
    while !ready()? {
        if Instant::now() > end {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(true)
}

/// The same, where it must.
pub fn wait(what: &str, ready: impl FnMut() -> Result<bool>) -> Result<()> {
    if !wait_until(ready)? {
        bail!("{what}, after {} s", SETTLE.as_secs());
    }
    Ok(())
}

fn write(host: &Host, link: &str, file: &str, value: &str) -> Result<()> {
    let path = host.link(link).join(file);
    fs::write(&path, value).with_context(|| format!("{}: '{value}' refused", path.display()))
}

/// Load a module.
pub fn modprobe(words: &[&str]) -> Result<()> {
    let output = Command::new("modprobe")
        .args(words)
        .output()
        .context("modprobe: cannot run")?;
    if !output.status.success() {
        bail!(
            "modprobe {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(cpus: u32, nics: u32, queues: u32) -> Site {
        Site {
            nics: (0..nics).map(|nic| format!("eth{nic}")).collect(),
            cpus,
            queues,
        }
    }

    #[test]
    fn names_are_those_of_the_data() {
        for peer in Peer::ALL {
            let name = serde_json::to_value(peer).expect("JSON");
            assert_eq!(name.as_str(), Some(peer.to_string().as_str()));
        }
        assert_eq!(Peer::ALL.len(), Peer::value_variants().len());
    }

    #[test]
    fn every_cpu_has_a_queue_of_its_own() {
        for (cpus, nics, queues) in [(1, 1, 1), (8, 8, 1), (8, 4, 2), (8, 8, 8), (4, 4, 4)] {
            let site = site(cpus, nics, queues);
            for cpu in 0..cpus {
                let nic = site.nic_of(cpu);
                let queue = (0..queues).find(|queue| site.cpu_of(nic, *queue) == cpu);
                // And XPS has the CPU on that very queue.
                assert_eq!(queue, Some(cpu % queues), "{cpu} of {site:?}");
            }
        }
    }

    #[test]
    fn cpus_shifted_are_nics() {
        for (cpus, nics, queues) in [(8, 8, 1), (8, 4, 2), (8, 2, 4)] {
            let site = site(cpus, nics, queues);
            let shift = site.shift().expect("a power of two");
            for cpu in 0..cpus {
                assert_eq!(site.nic_of(cpu), (cpu >> shift) as usize);
            }
        }
        assert!(site(9, 3, 3).shift().is_err());
    }
}
