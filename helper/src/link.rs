//! Network devices as sysfs shows them.

use crate::cpulist::CpuSet;
use crate::host::{self, Host};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub fn exists(host: &Host, link: &str) -> bool {
    host.link(link).exists()
}

pub fn index(host: &Host, link: &str) -> Option<u32> {
    host::read_if_any(&host.link(link).join("ifindex"))?
        .parse()
        .ok()
}

/// The bond, bridge or other device that has this one.
pub fn master(host: &Host, link: &str) -> Option<String> {
    let master = fs::read_link(host.link(link).join("master")).ok()?;
    Some(master.file_name()?.to_str()?.to_string())
}

/// Devices stacked on this one: VLANs, macvlans, and its master if it has one.
pub fn uppers(host: &Host, link: &str) -> Vec<String> {
    host::names(&host.link(link))
        .into_iter()
        .filter_map(|name| name.strip_prefix("upper_").map(str::to_string))
        .collect()
}

pub fn flags(host: &Host, link: &str) -> u32 {
    host::read_if_any(&host.link(link).join("flags"))
        .and_then(|flags| u32::from_str_radix(flags.trim_start_matches("0x"), 16).ok())
        .unwrap_or(0)
}

pub fn is_up(host: &Host, link: &str) -> bool {
    const IFF_UP: u32 = 1;
    flags(host, link) & IFF_UP != 0
}

pub fn is_loopback(host: &Host, link: &str) -> bool {
    const IFF_LOOPBACK: u32 = 8;
    flags(host, link) & IFF_LOOPBACK != 0
}

pub fn is_ethernet(host: &Host, link: &str) -> bool {
    const ARPHRD_ETHER: &str = "1";
    host::read_if_any(&host.link(link).join("type")).as_deref() == Some(ARPHRD_ETHER)
}

pub fn has_carrier(host: &Host, link: &str) -> bool {
    host::read_if_any(&host.link(link).join("carrier")).as_deref() == Some("1")
}

/// The NUMA node its device is on, `None` if that is not known.
pub fn numa_node(host: &Host, link: &str) -> Option<u32> {
    // Only the PCI device has the file; what hangs off it is on the same node.
    let node = ancestors(host, link)
        .into_iter()
        .find_map(|dir| host::read_if_any(&dir.join("numa_node")))?;
    // -1, "no node", does not parse.
    node.parse().ok()
}

/// A queue's CPU mask file and what it holds.
pub struct QueueCpus {
    pub queue: u32,
    pub path: PathBuf,
    pub cpus: CpuSet,
}

/// Which CPUs send on each transmit queue; none for a device with one queue, which has no choice
/// to make.
pub fn xps(host: &Host, link: &str) -> Vec<QueueCpus> {
    queues(host, link, "tx-", "xps_cpus")
}

/// Which CPUs each receive queue's packets are passed on to; an empty set is "off".
pub fn rps(host: &Host, link: &str) -> Vec<QueueCpus> {
    queues(host, link, "rx-", "rps_cpus")
}

fn queues(host: &Host, link: &str, prefix: &str, file: &str) -> Vec<QueueCpus> {
    let queues = host.link(link).join("queues");
    host::numbered(&queues, prefix)
        .into_iter()
        .filter_map(|queue| {
            let path = queues.join(format!("{prefix}{queue}")).join(file);
            let cpus = CpuSet::from_mask(&host::read_if_any(&path)?).ok()?;
            Some(QueueCpus { queue, path, cpus })
        })
        .collect()
}

/// The PCI device a NIC is on, `0000:03:00.1`.
pub fn pci(host: &Host, link: &str) -> Option<String> {
    let dirs = ancestors(host, link);
    let dir = dirs.iter().find(|dir| {
        fs::canonicalize(dir.join("subsystem")).is_ok_and(|bus| bus.ends_with("bus/pci"))
    })?;
    Some(dir.file_name()?.to_str()?.to_string())
}

/// Its device and those above it: as in irq.rs, what is looked for may be one or two up.
fn ancestors(host: &Host, link: &str) -> Vec<PathBuf> {
    let (Ok(device), Ok(sys)) = (
        fs::canonicalize(host.link(link).join("device")),
        fs::canonicalize(&host.sys),
    ) else {
        return Vec::new();
    };
    device
        .ancestors()
        .take_while(|dir| *dir != sys)
        .map(Path::to_path_buf)
        .collect()
}

/// Whether the kernel would take it as the name of a network device.
pub fn is_device_name(name: &str) -> bool {
    const IFNAMSIZ: usize = 16;
    let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace();
    !name.is_empty()
        && name.len() < IFNAMSIZ
        && name != "."
        && name != ".."
        && !name.contains(forbidden)
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|byte| {
                u8::from_str_radix(byte, 16)
                    .ok()
                    .filter(|_| byte.len() == 2)
            })
            .collect();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| {
                format!("'{text}' is no Ethernet address; allowed: such as 52:54:00:12:34:56")
            })
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fake;

    #[test]
    fn a_nic_is_on_the_node_of_its_pci_device() {
        let fake = Fake::new();
        fake.nic("eth0", &[]);
        let pci = format!(
            "sys/devices/pci0000:00/{}",
            pci(&fake.host(), "eth0").unwrap()
        );
        assert_eq!(numa_node(&fake.host(), "eth0"), None);
        fake.file(&format!("{pci}/numa_node"), "-1\n");
        assert_eq!(numa_node(&fake.host(), "eth0"), None);
        fake.file(&format!("{pci}/numa_node"), "1\n");
        assert_eq!(numa_node(&fake.host(), "eth0"), Some(1));
    }
}
