//! What a plan is made from: the CPUs and the NICs as they are now.

use super::natural;
use crate::bond;
use crate::change::Kernel;
use crate::config::Address;
use crate::cpulist::CpuSet;
use crate::error::Result;
use crate::ethtool::Channels;
use crate::host::{self, Host};
use crate::link::{self, Mac};
use crate::show::IrqReport;
use crate::topology::{self, Cpu};
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Debug, Serialize)]
pub struct Machine {
    kernel: Option<String>,
    pub online: CpuSet,
    pub offline: CpuSet,
    /// The CPUs of each core, of each last-level cache and of each NUMA node.
    pub cores: Vec<CpuSet>,
    pub caches: Vec<CpuSet>,
    pub nodes: BTreeMap<u32, CpuSet>,
    pub nics: Vec<Nic>,
    /// Ethernet devices that are none: bridges, tunnels, containers' ends.
    pub virtual_devices: Vec<String>,
}

/// An Ethernet device, one with hardware or one that was named.
#[derive(Debug, Serialize)]
pub struct Nic {
    pub name: String,
    pub driver: Option<String>,
    pub pci: Option<String>,
    /// The permanent address.
    pub mac: Option<Mac>,
    /// `null` if that is not known.
    pub node: Option<u32>,
    /// Megabits a second; `null` while there is no link.
    pub speed: Option<u32>,
    pub up: bool,
    pub carrier: bool,
    /// `null` if its driver does not tell.
    pub channels: Option<Channels>,
    pub irqs: Vec<IrqReport>,
    pub master: Option<String>,
    pub addresses: Vec<Address>,
    pub default_route: bool,
    /// Why it is no slave of the plan's; `null` if it is one.
    pub left_out: Option<String>,
}

impl Machine {
    /// `named`: devices that count as NICs whatever they are.
    pub fn look(host: &Host, kernel: &mut dyn Kernel, named: &[String]) -> Result<Self> {
        let online = topology::online(host)?;
        let possible: CpuSet = topology::possible(host)?.iter().map(|cpu| cpu.id).collect();
        let all: CpuSet = online.iter().map(|cpu| cpu.id).collect();
        let routes = default_routes(host);
        let mut names = host::names(&host.sys.join("class/net"));
        names.retain(|name| link::index(host, name).is_some() && link::is_ethernet(host, name));
        names.sort_by_key(|name| natural(name));
        let mut nics = Vec::new();
        let mut virtual_devices = Vec::new();
        for name in names {
            if host.link(&name).join("device").exists() || named.contains(&name) {
                nics.push(Nic::look(host, kernel, name, &routes)?);
            } else if !bond::is_bond(host, &name) {
                virtual_devices.push(name);
            }
        }
        let mut nodes: BTreeMap<u32, CpuSet> = BTreeMap::new();
        for cpu in &online {
            if let Some(node) = cpu.node {
                nodes.entry(node).or_default().insert(cpu.id);
            }
        }
        Ok(Self {
            kernel: host::read_if_any(&host.proc.join("sys/kernel/osrelease")),
            offline: possible.difference(&all),
            online: all,
            cores: groups(&online, |cpu| cpu.core),
            caches: groups(&online, |cpu| cpu.llc),
            nodes,
            nics,
            virtual_devices,
        })
    }

    pub fn nic(&self, name: &str) -> Option<&Nic> {
        self.nics.iter().find(|nic| nic.name == name)
    }

    pub fn has_nodes(&self) -> bool {
        self.nodes.len() > 1
    }

    pub fn has_threads(&self) -> bool {
        self.cores.len() < self.online.iter().count()
    }

    /// One line each, for people.
    pub fn facts(&self) -> Vec<String> {
        let mut facts = Vec::new();
        if let Some(kernel) = &self.kernel {
            facts.push(format!("Linux {kernel}"));
        }
        let mut cpus = format!(
            "CPUs {}: {} on {}",
            self.online,
            counted(self.online.iter().count(), "CPU"),
            counted(self.cores.len(), "core"),
        );
        if self.has_threads() {
            cpus = format!("{cpus} (threads of a core: {})", list(self.cores.iter()));
        }
        if !self.offline.is_empty() {
            cpus = format!("{cpus}; offline: {}", self.offline);
        }
        facts.push(cpus);
        if self.caches.len() < self.cores.len() {
            facts.push(format!(
                "last-level caches: CPUs {}",
                list(self.caches.iter())
            ));
        }
        for (node, cpus) in &self.nodes {
            facts.push(format!("NUMA node {node}: CPUs {cpus}"));
        }
        facts
    }
}

impl Nic {
    fn look(
        host: &Host,
        kernel: &mut dyn Kernel,
        name: String,
        default_routes: &[String],
    ) -> Result<Self> {
        let number = |file: &str| {
            host::read_if_any(&host.link(&name).join(file))?
                .parse()
                .ok()
        };
        let driver = std::fs::read_link(host.link(&name).join("device/driver")).ok();
        let driver = driver.and_then(|path| Some(path.file_name()?.to_str()?.to_string()));
        Ok(Self {
            pci: link::pci(host, &name),
            mac: kernel.permanent_mac(&name)?,
            node: link::numa_node(host, &name),
            // -1, "not known", does not parse.
            speed: number("speed").filter(|speed| *speed > 0),
            up: link::is_up(host, &name),
            carrier: link::has_carrier(host, &name),
            channels: kernel.channels(&name)?,
            irqs: IrqReport::of_link(host, &name),
            master: link::master(host, &name),
            addresses: kernel.addresses(&name)?.into_iter().map(Address).collect(),
            default_route: default_routes.contains(&name),
            left_out: None,
            driver,
            name,
        })
    }

    /// The queues that interrupts serve, each once.
    pub fn queues(&self) -> Vec<u32> {
        let mut queues: Vec<u32> = self.irqs.iter().filter_map(|irq| irq.queue).collect();
        queues.sort_unstable();
        queues.dedup();
        queues
    }

    /// One line for people: what it is, and how it is now.
    pub fn fact(&self, machine: &Machine) -> String {
        let mut is = vec![self.driver.clone().unwrap_or_else(|| "no driver".into())];
        is.extend(self.pci.as_ref().map(|pci| format!("at {pci}")));
        is.extend(self.mac.map(|mac| mac.to_string()));
        is.extend(self.speed.map(|speed| format!("{speed} Mb/s")));
        if !machine.nodes.is_empty() {
            is.push(match self.node {
                Some(node) => format!("NUMA node {node}"),
                None => "NUMA node not known".to_string(),
            });
        }
        let mut now = Vec::new();
        if let Some(channels) = self.channels {
            now.push(format!(
                "{} of {}",
                channels.combined,
                counted(channels.combined_max as usize, "combined channel")
            ));
        }
        let cpus: CpuSet = self
            .irqs
            .iter()
            .filter(|irq| irq.queue.is_some())
            .filter_map(|irq| irq.effective.as_ref())
            .flat_map(|cpus| cpus.iter().collect::<Vec<_>>())
            .collect();
        now.push(match cpus.is_empty() {
            true => "no interrupts while it is closed".to_string(),
            false => format!("queue interrupts on CPUs {cpus}"),
        });
        format!("{}: {}. Now: {}", self.name, is.join(", "), now.join(", "))
    }
}

/// The CPUs in groups by a number that they have in common.
fn groups(cpus: &[Cpu], of: impl Fn(&Cpu) -> u32) -> Vec<CpuSet> {
    let mut groups: BTreeMap<u32, CpuSet> = BTreeMap::new();
    for cpu in cpus {
        groups.entry(of(cpu)).or_default().insert(cpu.id);
    }
    groups.into_values().collect()
}

/// `0,4 1,5`
fn list<'a>(groups: impl Iterator<Item = &'a CpuSet>) -> String {
    groups.map(CpuSet::to_string).collect::<Vec<_>>().join(" ")
}

/// `1 core`, `2 cores`
pub fn counted(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    }
}

/// The devices that default routes of the main table go by.
fn default_routes(host: &Host) -> Vec<String> {
    let read = |file: &str| host::read_if_any(&host.proc.join("net").join(file));
    let v4 = read("route").unwrap_or_default();
    let v6 = read("ipv6_route").unwrap_or_default();
    let mut devices = Vec::new();
    for line in v4.lines().skip(1) {
        // Iface Destination Gateway Flags RefCnt Use Metric Mask …
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [device, "00000000", _, _, _, _, _, "00000000", ..] = fields[..] {
            devices.push(device.to_string());
        }
    }
    for line in v6.lines() {
        // Destination, its prefix length, …, device
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [destination, "00", .., device] = fields[..]
            && destination.bytes().all(|digit| digit == b'0')
            // The kernel's own "no route".
            && device != "lo"
        {
            devices.push(device.to_string());
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fake;

    #[test]
    fn default_routes_are_those_to_everywhere() {
        let fake = Fake::new();
        assert_eq!(default_routes(&fake.host()), [] as [&str; 0]);
        fake.file(
            "proc/net/route",
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
             eth3\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
             eth1\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n",
        );
        let zero = "0".repeat(32);
        fake.file(
            "proc/net/ipv6_route",
            &format!(
                "{zero} 00 {zero} 00 fe80 00000400 1 0 00000003 eth4\n\
                 {zero} 00 {zero} 00 {zero} ffffffff 1 0 00200200 lo\n\
                 fe80{} 40 {zero} 00 {zero} 00000100 1 0 00000001 eth1\n",
                &zero[4..]
            ),
        );
        assert_eq!(default_routes(&fake.host()), ["eth3", "eth4"]);
    }
}
