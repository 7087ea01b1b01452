//! A bond as the patched driver shows it in sysfs. Parsers are pure; reading is one line each.

use crate::cpulist::CpuSet;
use crate::host::{self, Host};
use serde::Serialize;
use std::collections::BTreeMap;

/// One line of `cpu_bound_map`: which slaves a CPU sends through, and why these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MapLine {
    pub cpu: u32,
    pub slaves: Vec<String>,
    pub reason: String,
}

impl MapLine {
    /// Bound to the CPU by hand or by interrupt, rather than its nearest substitute.
    pub fn is_bound(&self) -> bool {
        self.reason == "set" || self.reason == "irq"
    }
}

/// `cpu_bound_stats`: packets by sending CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub local: u64,
    pub remote: u64,
    /// `(local, remote)` of each CPU.
    pub cpus: BTreeMap<u32, (u64, u64)>,
}

pub fn all(host: &Host) -> Vec<String> {
    host::read_if_any(&host.sys.join("class/net/bonding_masters"))
        .map(|names| names.split_whitespace().map(str::to_string).collect())
        .unwrap_or_default()
}

pub fn is_bond(host: &Host, link: &str) -> bool {
    host.link(link).join("bonding").exists()
}

pub fn slaves(host: &Host, bond: &str) -> Vec<String> {
    option(host, bond, "slaves")
        .map(|names| names.split_whitespace().map(str::to_string).collect())
        .unwrap_or_default()
}

/// A file of `/sys/class/net/BOND/bonding`.
pub fn option(host: &Host, bond: &str, name: &str) -> Option<String> {
    host::read_if_any(&host.link(bond).join("bonding").join(name))
}

/// The name in a file that has `NAME NUMBER`.
pub fn option_name(host: &Host, bond: &str, name: &str) -> Option<String> {
    Some(
        option(host, bond, name)?
            .split_whitespace()
            .next()?
            .to_string(),
    )
}

/// A file of `/sys/class/net/SLAVE/bonding_slave`.
pub fn slave_option(host: &Host, slave: &str, name: &str) -> Option<String> {
    host::read_if_any(&host.link(slave).join("bonding_slave").join(name))
}

/// `None` if the driver has no such file, that is, if it is the stock driver.
pub fn map(host: &Host, bond: &str) -> Option<Vec<MapLine>> {
    Some(parse_map(&option(host, bond, "cpu_bound_map")?))
}

pub fn stats(host: &Host, slave: &str) -> Option<Stats> {
    Some(parse_stats(&slave_option(host, slave, "cpu_bound_stats")?))
}

/// The CPUs set by hand; an empty set when binding is automatic.
pub fn cpus_by_hand(host: &Host, slave: &str) -> Option<CpuSet> {
    slave_option(host, slave, "cpus")?.parse().ok()
}

/// Whether the bond thinks the slave's link is up.
pub fn has_link(host: &Host, slave: &str) -> bool {
    slave_option(host, slave, "mii_status").as_deref() == Some("up")
}

/// Whether the bond lets this slave send now.
pub fn is_usable(host: &Host, slave: &str) -> bool {
    has_link(host, slave) && slave_option(host, slave, "state").as_deref() == Some("active")
}

fn parse_map(text: &str) -> Vec<MapLine> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let cpu = fields.next()?.parse().ok()?;
            let slaves = match fields.next()? {
                "-" => Vec::new(),
                slaves => slaves.split(',').map(str::to_string).collect(),
            };
            let reason = fields.next()?.to_string();
            Some(MapLine {
                cpu,
                slaves,
                reason,
            })
        })
        .collect()
}

fn parse_stats(text: &str) -> Stats {
    let mut stats = Stats::default();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let number = |text: &str| text.parse().unwrap_or(0);
        match fields[..] {
            ["local", count] => stats.local = number(count),
            ["remote", count] => stats.remote = number(count),
            [cpu, "local", local, "remote", remote] => {
                if let Some(cpu) = cpu.strip_prefix("cpu").and_then(|cpu| cpu.parse().ok()) {
                    stats.cpus.insert(cpu, (number(local), number(remote)));
                }
            }
            _ => {}
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_map() {
        let map = parse_map("0 eth0 irq\n3 eth0,eth1 node\n4 - any\n");
        assert_eq!(map.len(), 3);
        assert!(map[0].is_bound());
        assert_eq!(map[1].slaves, ["eth0", "eth1"]);
        assert!(!map[1].is_bound());
        assert_eq!(map[2].slaves, [] as [&str; 0]);
        assert!(parse_map("").is_empty());
    }

    #[test]
    fn reads_the_counters() {
        let stats =
            parse_stats("local 30\nremote 2\ncpu0 local 30 remote 0\ncpu1 local 0 remote 2\n");
        assert_eq!((stats.local, stats.remote), (30, 2));
        assert_eq!(stats.cpus[&1], (0, 2));
    }
}
