//! The map that the kernel will come to, by the very code that it decides by.

use crate::bond::MapLine;
use crate::cpulist::CpuSet;
use crate::error::Result;
use crate::host::Host;
use crate::topology::{self, Cpu};

#[expect(
    dead_code,
    reason = "what the packet path needs of it is not needed here"
)]
#[path = "../../module/map.rs"]
mod map;

/// What the map depends on, of a slave.
pub struct Slave {
    pub name: String,
    pub node: Option<u32>,
    /// The CPUs it is bound to.
    pub cpus: CpuSet,
    /// By hand, that is, rather than by its interrupts.
    pub by_hand: bool,
}

/// `cpu_bound_map` of a bond that has these slaves, in this order, all of them usable.
pub fn map(host: &Host, slaves: &[Slave]) -> Result<Vec<MapLine>> {
    let online = topology::online(host)?;
    let possible = topology::possible(host)?;
    let size = possible.iter().map(|cpu| cpu.id + 1).max().unwrap_or(0) as usize;
    let absent = map::Cpu {
        possible: false,
        smt: 0,
        llc: 0,
        node_first: 0,
        node: -1,
    };
    let mut cpus = vec![absent; size];
    for cpu in &possible {
        cpus[cpu.id as usize] = place(cpu, &online);
    }
    let mut set = vec![0u64; size];
    let mut irq = set.clone();
    let (mut usable, mut by_hand) = (0, 0);
    for (slave, index) in slaves.iter().zip(0..map::MAX_SLAVES) {
        let bit = 1 << index;
        usable |= bit;
        by_hand |= if slave.by_hand { bit } else { 0 };
        let bound = if slave.by_hand { &mut set } else { &mut irq };
        for cpu in slave.cpus.iter() {
            if let Some(slaves) = bound.get_mut(cpu as usize) {
                *slaves |= bit;
            }
        }
    }
    let nodes: Vec<i32> = slaves.iter().map(|slave| node(slave.node)).collect();
    let input = map::Input {
        cpus: &cpus,
        set: &set,
        irq: &irq,
        nodes: &nodes,
        usable,
        by_hand,
    };
    let (mut smt, mut llc, mut near) = (vec![0; size], vec![0; size], vec![0; size]);
    let mut scratch = map::Scratch {
        smt: &mut smt,
        llc: &mut llc,
        node: &mut near,
    };
    let mut lines = Vec::new();
    map::build(&input, &mut scratch, |cpu, entry, reason| {
        let slaves = slaves
            .iter()
            .zip(0..map::MAX_SLAVES)
            .filter(|(_, index)| entry.mask() >> index & 1 == 1)
            .map(|(slave, _)| slave.name.clone())
            .collect();
        lines.push(MapLine {
            cpu,
            slaves,
            reason: reason.name().to_string(),
        });
    });
    Ok(lines)
}

/// Offline CPUs whose place nobody knows before they are online: on which node they are may decide
/// what they send by.
pub fn unknown(host: &Host) -> Result<CpuSet> {
    let online = topology::online(host)?;
    let possible = topology::possible(host)?;
    Ok(possible
        .iter()
        .filter(|cpu| !online.contains(cpu) && sole_node(&online).is_none())
        .map(|cpu| cpu.id)
        .collect())
}

/// As the kernel's `bond_xmit_cpu()` tells it.
fn place(cpu: &Cpu, online: &[Cpu]) -> map::Cpu {
    let is_online = online.contains(cpu);
    let on = cpu
        .node
        .or_else(|| sole_node(online).filter(|_| !is_online));
    let on_node = online
        .iter()
        .filter(|other| cpu.node.is_some() && other.node == cpu.node);
    map::Cpu {
        possible: true,
        smt: cpu.core,
        // Without nodes it does not look for caches.
        llc: if cpu.node.is_some() { cpu.llc } else { cpu.id },
        node_first: on_node.map(|other| other.id).min().unwrap_or(cpu.id),
        node: node(on),
    }
}

/// The node of all CPUs, if there is but one.
fn sole_node(online: &[Cpu]) -> Option<u32> {
    let first = online.first()?.node;
    first.filter(|_| online.iter().all(|cpu| cpu.node == first))
}

fn node(node: Option<u32>) -> i32 {
    node.and_then(|node| i32::try_from(node).ok()).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fake, cpus};

    fn slave(name: &str, node: Option<u32>, list: &str) -> Slave {
        Slave {
            name: name.to_string(),
            node,
            cpus: cpus(list),
            by_hand: false,
        }
    }

    fn lines(fake: &Fake, slaves: &[Slave]) -> Vec<String> {
        map(&fake.host(), slaves)
            .unwrap()
            .iter()
            .map(|line| format!("{} {} {}", line.cpu, line.slaves.join(","), line.reason))
            .collect()
    }

    /// Two nodes of two cores with two threads each; CPU 8 is offline.
    fn machine() -> Fake {
        let fake = Fake::new();
        for cpu in 0..8 {
            let core = cpu % 4;
            fake.cpu(cpu, Some(core / 2), &format!("{core},{}", core + 4));
        }
        // The cores of node 1 have a cache in common.
        for cpu in [2, 3, 6, 7] {
            let cache = format!("sys/devices/system/cpu/cpu{cpu}/cache/index3");
            fake.file(&format!("{cache}/level"), "3\n");
            fake.file(&format!("{cache}/shared_cpu_list"), "2-3,6-7\n");
        }
        fake.file("sys/devices/system/cpu/online", "0-7\n");
        fake.file("sys/devices/system/cpu/possible", "0-8\n");
        fake
    }

    #[test]
    fn nearest_first() {
        let fake = machine();
        let slaves = [slave("a", None, "0"), slave("b", Some(1), "2")];
        assert_eq!(
            lines(&fake, &slaves),
            [
                "0 a irq",
                "1 a node",
                "2 b irq",
                "3 b llc",
                "4 a smt",
                "5 a node",
                "6 b smt",
                "7 b llc",
                "8 a,b any",
            ]
        );
        assert_eq!(unknown(&fake.host()).unwrap(), cpus("8"));
    }

    #[test]
    fn by_hand_comes_first() {
        let fake = machine();
        let by_hand = Slave {
            by_hand: true,
            ..slave("b", None, "0-1")
        };
        let found = lines(&fake, &[slave("a", None, "0,2"), by_hand]);
        assert_eq!(found[..3], ["0 b set", "1 b set", "2 a irq"]);
    }

    #[test]
    fn an_offline_cpu_is_of_the_only_node_there_is() {
        let fake = Fake::new();
        fake.cpu(0, Some(0), "0");
        fake.file("sys/devices/system/cpu/online", "0\n");
        fake.file("sys/devices/system/cpu/possible", "0-1\n");
        assert_eq!(
            lines(&fake, &[slave("a", Some(0), "0"), slave("b", None, "0")]),
            ["0 a,b irq", "1 a node"]
        );
        assert!(unknown(&fake.host()).unwrap().is_empty());
    }
}
