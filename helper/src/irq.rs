//! The interrupts of a network device: which there are, which serve queues, where they go.

use crate::cpulist::CpuSet;
use crate::error::{Error, Result};
use crate::host::{self, Host};
use std::fs;
use std::path::{Path, PathBuf};

/// One requested interrupt of a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Irq {
    pub number: u32,
    /// As in `/proc/interrupts`.
    pub name: String,
    /// The queue it serves; `None` for configuration, admin and link-state vectors, which say
    /// nothing about where packets are received.
    pub queue: Option<u32>,
}

/// All requested interrupts of a network device, by number.
pub fn of_link(host: &Host, link: &str) -> Vec<Irq> {
    let named: Vec<(u32, String)> = numbers(host, link)
        .into_iter()
        .filter_map(|number| {
            let actions =
                host::read_if_any(&host.sys.join(format!("kernel/irq/{number}/actions")))?;
            (!actions.is_empty()).then_some((number, actions))
        })
        .collect();
    classify(link, named)
}

/// Where an interrupt may go.
pub fn affinity(host: &Host, irq: u32) -> Result<CpuSet> {
    cpus(&affinity_path(host, irq))
}

/// Where an interrupt does go.
pub fn effective_affinity(host: &Host, irq: u32) -> Result<CpuSet> {
    cpus(&host.irq(irq).join("effective_affinity_list"))
}

pub fn affinity_path(host: &Host, irq: u32) -> PathBuf {
    host.irq(irq).join("smp_affinity_list")
}

fn cpus(path: &Path) -> Result<CpuSet> {
    host::read(path)?
        .parse()
        .map_err(|error| Error::new(path.display(), error))
}

/// The device's message-signalled interrupts, or its one wired interrupt. The network device may
/// hang off a child of the device that has them, as every virtio-net does.
pub fn numbers(host: &Host, link: &str) -> Vec<u32> {
    let Ok(device) = fs::canonicalize(host.link(link).join("device")) else {
        return Vec::new();
    };
    let Ok(sys) = fs::canonicalize(&host.sys) else {
        return Vec::new();
    };
    for dir in device.ancestors().take_while(|dir| *dir != sys) {
        let vectors = host::numbered(&dir.join("msi_irqs"), "");
        if !vectors.is_empty() {
            return vectors;
        }
        let bus = fs::canonicalize(dir.join("subsystem"))
            .ok()
            .and_then(|bus| bus.file_name()?.to_str().map(str::to_string));
        match bus.as_deref() {
            // Above it are bridges, whose own interrupts serve hotplug and error reports.
            Some("pci") => {
                return host::read_if_any(&dir.join("irq"))
                    .and_then(|irq| irq.parse().ok())
                    .filter(|irq| *irq != 0)
                    .into_iter()
                    .collect();
            }
            // The interrupt belongs to the host controller and all that is plugged into it.
            Some("usb") => return Vec::new(),
            _ => {}
        }
    }
    Vec::new()
}

/// Words by which drivers name vectors that serve no queue.
const SERVICE: [&str; 15] = [
    "config", "misc", "mgmnt", "mgmt", "admin", "async", "aeq", "event", "link", "lsc", "other",
    "cmd", "fw", "mbox", "control",
];

fn classify(link: &str, named: Vec<(u32, String)>) -> Vec<Irq> {
    let mut queues = 0;
    let mut irqs: Vec<Irq> = named
        .into_iter()
        .map(|(number, name)| {
            let serves = is_queue(link, &name);
            let queue = serves.then(|| queue_of(&name).unwrap_or(queues));
            queues += u32::from(serves);
            Irq {
                number,
                name,
                queue,
            }
        })
        .collect();
    // Better all than none: one interrupt may serve everything, or a driver's names mislead us.
    if irqs.iter().all(|irq| irq.queue.is_none()) {
        for (queue, irq) in (0..).zip(&mut irqs) {
            irq.queue = Some(queue);
        }
    }
    irqs
}

fn is_queue(link: &str, name: &str) -> bool {
    // igb, ixgbe, tg3 and others give the vector for link changes the bare interface name.
    name != link
        && !words(name).any(|word| {
            let word = word.trim_end_matches(|c: char| c.is_ascii_digit());
            SERVICE.contains(&word)
        })
}

/// `3` of `virtio0-input.3`, `eth0-TxRx-3`, `mlx5_comp3@pci:0000:08:00.0`.
fn queue_of(name: &str) -> Option<u32> {
    let name = name.split('@').next()?;
    let digits = name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    name[digits..].parse().ok()
}

fn words(name: &str) -> impl Iterator<Item = String> {
    name.split(|c: char| !c.is_ascii_alphanumeric())
        .map(str::to_ascii_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fake;

    fn queues(link: &str, names: &[&str]) -> Vec<Option<u32>> {
        let named = (20..)
            .zip(names.iter().map(|name| name.to_string()))
            .collect();
        classify(link, named)
            .into_iter()
            .map(|irq| irq.queue)
            .collect()
    }

    #[test]
    fn tells_queues_from_the_rest() {
        let (a, b) = (Some(0), Some(1));
        let virtio = [
            "virtio0-config",
            "virtio0-input.0",
            "virtio0-output.0",
            "virtio0-input.1",
            "virtio0-output.1",
        ];
        assert_eq!(queues("eth0", &virtio), [None, a, a, b, b]);
        assert_eq!(
            queues("eth0", &["eth0", "eth0-TxRx-0", "eth0-TxRx-1"]),
            [None, a, b]
        );
        assert_eq!(
            queues(
                "eth0",
                &[
                    "i40e-0000:02:00.0:misc",
                    "i40e-eth0-TxRx-0",
                    "i40e-eth0-TxRx-1"
                ]
            ),
            [None, a, b]
        );
        assert_eq!(
            queues(
                "eth0",
                &[
                    "mlx5_async0@pci:0000:08:00.0",
                    "mlx5_comp0@pci:0000:08:00.0",
                    "mlx5_comp1@pci:0000:08:00.0"
                ]
            ),
            [None, a, b]
        );
        assert_eq!(
            queues("eth0", &["ena-mgmnt@pci:0000:00:05.0", "eth0-Tx-Rx-0"]),
            [None, a]
        );
        assert_eq!(
            queues("eth0", &["eth0-rxtx-0", "eth0-rxtx-1", "eth0-event-2"]),
            [a, b, None]
        );
    }

    #[test]
    fn a_single_interrupt_serves_all() {
        assert_eq!(queues("eth0", &["eth0"]), [Some(0)]);
        assert_eq!(queues("eth0", &["virtio0-config"]), [Some(0)]);
    }

    #[test]
    fn strange_names_count_as_queues() {
        assert_eq!(queues("eth0", &["foo-link", "foo-cmd"]), [Some(0), Some(1)]);
        assert_eq!(queues("eth0", &["foo", "bar"]), [Some(0), Some(1)]);
    }

    #[test]
    fn climbs_to_the_device_that_has_vectors_and_no_further() {
        let fake = Fake::new();
        fake.nic("eth0", &[(24, "virtio0-config"), (25, "virtio0-input.0")]);
        let irqs = of_link(&fake.host(), "eth0");
        assert_eq!(
            irqs.iter().map(|irq| irq.number).collect::<Vec<_>>(),
            [24, 25]
        );

        // A PCI device without vectors below a bridge that has one.
        fake.nic("eth1", &[]);
        fake.file("sys/devices/pci0000:00/msi_irqs/99", "msi\n");
        fake.file("sys/kernel/irq/99/actions", "pciehp\n");
        assert_eq!(of_link(&fake.host(), "eth1"), []);
    }
}
