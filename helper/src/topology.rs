//! The online CPUs and what they share, from `/sys/devices/system/cpu`.

use crate::cpulist::CpuSet;
use crate::error::{Error, Result};
use crate::host::{self, Host};

/// One online CPU. Ordering by `(node, llc, core, id)` puts CPUs that share the most side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    pub id: u32,
    pub node: Option<u32>,
    /// The first CPU of those with the same last-level cache.
    pub llc: u32,
    /// The first CPU of those on the same core.
    pub core: u32,
}

/// The online CPUs, nearest neighbours side by side.
pub fn online(host: &Host) -> Result<Vec<Cpu>> {
    let root = host.sys.join("devices/system/cpu");
    let path = root.join("online");
    let online: CpuSet = host::read(&path)?
        .parse()
        .map_err(|error| Error::new(path.display(), error))?;
    let mut cpus: Vec<Cpu> = online
        .iter()
        .map(|id| {
            let dir = root.join(format!("cpu{id}"));
            Cpu {
                id,
                node: host::numbered(&dir, "node").first().copied(),
                llc: last_level_cache(&dir).unwrap_or(id),
                core: first_of(&dir.join("topology/thread_siblings_list")).unwrap_or(id),
            }
        })
        .collect();
    cpus.sort_by_key(|cpu| (cpu.node, cpu.llc, cpu.core, cpu.id));
    Ok(cpus)
}

/// All CPUs there can be. Of those that are offline nothing is known but their number.
pub fn possible(host: &Host) -> Result<Vec<Cpu>> {
    let mut cpus = online(host)?;
    let path = host.sys.join("devices/system/cpu/possible");
    let possible: CpuSet = host::read(&path)?
        .parse()
        .map_err(|error| Error::new(path.display(), error))?;
    for id in possible.iter() {
        if !cpus.iter().any(|cpu| cpu.id == id) {
            cpus.push(Cpu {
                id,
                node: None,
                llc: id,
                core: id,
            });
        }
    }
    Ok(cpus)
}

fn last_level_cache(dir: &std::path::Path) -> Option<u32> {
    let cache = dir.join("cache");
    host::numbered(&cache, "index")
        .into_iter()
        .map(|index| cache.join(format!("index{index}")))
        .max_by_key(|index| {
            host::read_if_any(&index.join("level")).and_then(|level| level.parse::<u32>().ok())
        })
        .and_then(|index| first_of(&index.join("shared_cpu_list")))
}

fn first_of(list: &std::path::Path) -> Option<u32> {
    host::read_if_any(list)?.parse::<CpuSet>().ok()?.first()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fake;

    #[test]
    fn neighbours_come_side_by_side() {
        let fake = Fake::new();
        // Two nodes, numbered alternately as some firmware does, two threads a core.
        for (cpu, node, core) in [(0, 0, "0,4"), (1, 1, "1,5"), (4, 0, "0,4"), (5, 1, "1,5")] {
            fake.cpu(cpu, Some(node), core);
        }
        fake.file("sys/devices/system/cpu/online", "0-1,4-5\n");
        let cpus = online(&fake.host()).unwrap();
        assert_eq!(
            cpus.iter().map(|cpu| cpu.id).collect::<Vec<_>>(),
            [0, 4, 1, 5]
        );
        assert_eq!(cpus[1].core, 0);
        fake.file("sys/devices/system/cpu/possible", "0-7\n");
        let all = possible(&fake.host()).unwrap();
        assert_eq!(all[..4], cpus);
        assert_eq!(
            all[4..].iter().map(|cpu| cpu.id).collect::<Vec<_>>(),
            [2, 3, 6, 7]
        );
        assert_eq!(cpus[2].node, Some(1));
    }
}
