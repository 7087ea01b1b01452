//! Which CPUs, interrupts and queues of a slave belong together, and what that asks of each.

use crate::change::{Item, Want};
use crate::config::{self, Resolved};
use crate::cpulist::CpuSet;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::irq::{self, Irq};
use crate::link;
use crate::shares::shares;
use crate::topology::{self, Cpu};

/// The CPUs of each slave, in the slaves' order: those it names, else an even share of those that
/// the bond has and no slave of it names (of all of the bond's, if that leaves none).
pub fn cpus_of_slaves(
    host: &Host,
    bond: &config::Bond,
    slaves: &[Resolved],
) -> Result<Vec<Vec<u32>>> {
    let online = topology::online(host)?;
    let all = of(&online, bond.cpus.as_ref(), &bond.name)?;
    let named = |cpu: &Cpu| {
        slaves.iter().any(|slave| {
            slave
                .slave
                .cpus
                .as_ref()
                .is_some_and(|cpus| cpus.contains(cpu.id))
        })
    };
    let mut rest = all.clone();
    rest.retain(|cpu| !named(cpu));
    if rest.is_empty() {
        rest = all;
    }
    let nodes: Vec<Option<u32>> = slaves
        .iter()
        .filter(|slave| slave.slave.cpus.is_none())
        .map(|slave| link::numa_node(host, &slave.link))
        .collect();
    let mut automatic = shares(&nodes, &rest).into_iter();
    slaves
        .iter()
        .map(|slave| match &slave.slave.cpus {
            None => Ok(automatic.next().unwrap_or_default()),
            cpus => {
                let cpus = of(
                    &online,
                    cpus.as_ref(),
                    &format!("{}: {}", bond.name, slave.link),
                )?;
                // In the order in which queues take them.
                let node = link::numa_node(host, &slave.link);
                Ok(shares(&[node], &cpus).pop().unwrap_or_default())
            }
        })
        .collect()
}

/// Those of the online CPUs that are wanted; `None`: all.
fn of(online: &[Cpu], wanted: Option<&CpuSet>, place: &str) -> Result<Vec<Cpu>> {
    let mut cpus = online.to_vec();
    if let Some(wanted) = wanted {
        let all: CpuSet = online.iter().map(|cpu| cpu.id).collect();
        let offline = wanted.difference(&all);
        if wanted.is_empty() || !offline.is_empty() {
            let found = match wanted.is_empty() {
                true => "cpus: empty".to_string(),
                false => format!("cpus: CPUs {offline} are not online"),
            };
            return Err(Error::new(place, found).fix(format_args!("choose from {all}")));
        }
        cpus.retain(|cpu| wanted.contains(cpu.id));
    }
    Ok(cpus)
}

/// One slave and the CPUs it is given.
pub struct Binding {
    /// The device's name.
    pub slave: String,
    share: Vec<u32>,
    /// Each queue interrupt and the CPU it is to go to.
    queue_irqs: Vec<(Irq, u32)>,
    /// The share is also set by hand, in `bonding_slave/cpus`.
    is_set: bool,
}

impl Binding {
    /// `needs_policy`: the bond asks the module which slave to send through; `set_cpus`: and is to
    /// be told by hand.
    pub fn new(
        host: &Host,
        slave: &str,
        share: Vec<u32>,
        needs_policy: bool,
        set_cpus: bool,
    ) -> Self {
        let queue_irqs: Vec<(Irq, u32)> = irq::of_link(host, slave)
            .into_iter()
            .filter_map(|irq| {
                let cpu = cpu_of_queue(&share, irq.queue?)?;
                Some((irq, cpu))
            })
            .collect();
        Self {
            slave: slave.to_string(),
            share,
            // A device without interrupts of its own (veth, USB) has nothing the kernel could
            // bind it by.
            is_set: needs_policy && (set_cpus || queue_irqs.is_empty()),
            queue_irqs,
        }
    }

    /// What its interrupts and queues are to hold.
    pub fn wants(&self, host: &Host) -> Vec<Want> {
        let link = &self.slave;
        let mut wants: Vec<Want> = self
            .queue_irqs
            .iter()
            .map(|(irq, cpu)| Want {
                item: Item::Irq {
                    link: link.clone(),
                    irq: irq.number,
                },
                value: cpu.to_string(),
            })
            .collect();
        if self.is_set {
            wants.push(Want {
                item: Item::SlaveCpus { link: link.clone() },
                value: self.share_set().to_string(),
            });
        }
        let queue = |kind: &str, queue: u32, file: &str, cpus: &CpuSet| Want {
            item: Item::Queue {
                link: link.clone(),
                file: format!("{kind}-{queue}/{file}"),
            },
            value: cpus.to_string(),
        };
        let xps = link::xps(host, link);
        let sets = cpus_of_queues(&self.share, xps.len());
        for (found, cpus) in xps.iter().zip(&sets) {
            wants.push(queue("tx", found.queue, "xps_cpus", cpus));
        }
        for found in link::rps(host, link) {
            wants.push(queue("rx", found.queue, "rps_cpus", &CpuSet::default()));
        }
        wants
    }

    /// Those of its interrupts that serve queues.
    pub fn irqs(&self) -> impl Iterator<Item = u32> {
        self.queue_irqs.iter().map(|(irq, _)| irq.number)
    }

    fn share_set(&self) -> CpuSet {
        self.share.iter().copied().collect()
    }

    /// The CPUs that the map must show as bound to the slave by now.
    pub fn bound_cpus(&self, host: &Host) -> CpuSet {
        match self.is_set {
            true => self.share_set(),
            false => self
                .queue_irqs
                .iter()
                .filter(|(irq, cpu)| has_moved(host, irq, *cpu))
                .map(|(_, cpu)| *cpu)
                .collect(),
        }
    }

    /// The CPUs that the slave's queue interrupts go to now, wherever they were sent, and those
    /// that they will go to when they fire next: the kernel's map is ahead of them.
    pub fn interrupted_cpus(&self, host: &Host) -> CpuSet {
        let now = self
            .queue_irqs
            .iter()
            .filter_map(|(irq, _)| irq::effective_affinity(host, irq.number).ok());
        let next = self
            .queue_irqs
            .iter()
            .filter_map(|(irq, _)| irq::affinity(host, irq.number).ok())
            // Of several CPUs, the one is yet to be chosen.
            .filter(|cpus| cpus.iter().nth(1).is_none());
        now.chain(next)
            .flat_map(|cpus| cpus.iter().collect::<Vec<_>>())
            .collect()
    }

    /// Without interrupt remapping, x86 moves an interrupt only when it fires.
    pub fn is_pending(&self, host: &Host) -> bool {
        self.queue_irqs
            .iter()
            .any(|(irq, cpu)| !has_moved(host, irq, *cpu))
    }
}

fn has_moved(host: &Host, irq: &Irq, cpu: u32) -> bool {
    irq::effective_affinity(host, irq.number).is_ok_and(|cpus| cpus == CpuSet::from_iter([cpu]))
}

/// Where the interrupts of a queue go.
pub fn cpu_of_queue(share: &[u32], queue: u32) -> Option<u32> {
    let index = usize::try_from(queue).ok()?.checked_rem(share.len())?;
    share.get(index).copied()
}

/// The CPUs that send on each of `count` queues: the one its interrupt is on, and, where there
/// are fewer queues than CPUs, every `count`th after it.
fn cpus_of_queues(share: &[u32], count: usize) -> Vec<CpuSet> {
    (0..count)
        .map(|queue| {
            let first = queue.checked_rem(share.len()).unwrap_or(0);
            share.iter().skip(first).step_by(count).copied().collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fake, cpus};

    fn slaves(list: &[(&str, Option<&str>)]) -> Vec<Resolved> {
        list.iter()
            .map(|(link, share)| {
                let mut slave = config::Slave::named(link);
                slave.cpus = share.map(cpus);
                let link = link.to_string();
                Resolved { link, slave }
            })
            .collect()
    }

    #[test]
    fn named_cpus_are_left_out_of_the_shares() {
        let fake = Fake::with_cpus(8);
        let bond = config::Bond::named("bond0");
        let shares = |list: &[(&str, Option<&str>)]| {
            cpus_of_slaves(&fake.host(), &bond, &slaves(list)).unwrap()
        };
        assert_eq!(
            shares(&[("a", None), ("b", None)]),
            [[0, 1, 2, 3], [4, 5, 6, 7]]
        );
        assert_eq!(
            shares(&[("a", None), ("b", Some("0-1")), ("c", None)]),
            [vec![2, 3, 4], vec![0, 1], vec![5, 6, 7]]
        );
        assert_eq!(
            shares(&[("a", None), ("b", Some("0-7"))]),
            [[0, 1, 2, 3, 4, 5, 6, 7]; 2]
        );
        let offline = cpus_of_slaves(&fake.host(), &bond, &slaves(&[("a", Some("7-9"))]));
        let error = offline.unwrap_err().to_string();
        assert_eq!(
            error,
            "bond0: a: cpus: CPUs 8-9 are not online; choose from 0-7"
        );
    }

    #[test]
    fn queues_cover_the_share() {
        assert_eq!(cpus_of_queues(&[4, 5], 4), ["4", "5", "4", "5"].map(cpus));
        assert_eq!(cpus_of_queues(&[0, 1, 2, 3], 2), ["0,2", "1,3"].map(cpus));
        assert_eq!(cpus_of_queues(&[7], 1), ["7"].map(cpus));
        assert_eq!(cpu_of_queue(&[4, 5], 3), Some(5));
        assert_eq!(cpu_of_queue(&[], 3), None);
    }
}
