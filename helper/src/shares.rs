//! Which CPUs are a slave's own: a pure function of the slaves' NUMA nodes and the CPUs.

use crate::topology::Cpu;

/// The CPUs of each slave, one thread a core first, and those on its own node first of these: a
/// slave with few queues puts them on different cores, and near.
///
/// With at least as many cores as slaves the shares are disjoint, cover every CPU and differ by at
/// most one core, all threads of a core in one share: they have its caches in common. With fewer
/// cores, but as many CPUs, cores are cut, and shares differ by at most one CPU. With fewer CPUs,
/// each slave has one, and the CPUs' numbers of slaves differ by at most one. Evenness comes before
/// locality, locality before everything else.
pub fn shares(slaves: &[Option<u32>], cpus: &[Cpu]) -> Vec<Vec<u32>> {
    if slaves.is_empty() || cpus.is_empty() {
        return vec![Vec::new(); slaves.len()];
    }
    let nodes: Vec<Option<u32>> = cpus.iter().map(|cpu| cpu.node).collect();
    if cpus.len() < slaves.len() {
        return spread(slaves, &nodes)
            .into_iter()
            .map(|cpu| vec![cpus[cpu].id])
            .collect();
    }
    let cores = cores(cpus);
    let parts: Vec<Vec<&Cpu>> = match cores.len() < slaves.len() {
        true => cpus.iter().map(|cpu| vec![cpu]).collect(),
        false => cores,
    };
    let nodes: Vec<Option<u32>> = parts.iter().map(|part| part[0].node).collect();
    let mut shares: Vec<Vec<&Cpu>> = vec![Vec::new(); slaves.len()];
    for (part, slave) in parts.iter().zip(spread(&nodes, slaves)) {
        shares[slave].extend(part);
    }
    shares
        .iter()
        .zip(slaves)
        .map(|(share, node)| in_order(share, *node))
        .collect()
}

/// The CPUs by core, in the order of the cores' first CPUs here; no core is empty.
fn cores(cpus: &[Cpu]) -> Vec<Vec<&Cpu>> {
    let mut cores: Vec<Vec<&Cpu>> = Vec::new();
    for cpu in cpus {
        match cores.iter_mut().find(|core| core[0].core == cpu.core) {
            Some(core) => core.push(cpu),
            None => cores.push(vec![cpu]),
        }
    }
    cores
}

/// Put each item in a bin: as many in each as in any other (give or take one), an item in a bin
/// of its own node where one has room, runs of neighbours together.
fn spread(items: &[Option<u32>], bins: &[Option<u32>]) -> Vec<usize> {
    let mut room: Vec<usize> = (0..bins.len())
        .map(|bin| even_part(items.len(), bins.len(), bin))
        .collect();
    let mut bin_of: Vec<Option<usize>> = vec![None; items.len()];

    let mut nodes: Vec<u32> = bins.iter().flatten().copied().collect();
    nodes.sort_unstable();
    nodes.dedup();
    for node in nodes {
        let local = |place: &[Option<u32>]| -> Vec<usize> {
            (0..place.len())
                .filter(|index| place[*index] == Some(node))
                .collect()
        };
        let (items, bins) = (local(items), local(bins));
        let wanted: usize = bins.iter().map(|bin| room[*bin]).sum();
        let mut items = items.into_iter();
        let count = items.len();
        for (place, &bin) in bins.iter().enumerate() {
            // Too few local items for all local bins: these share them evenly too.
            let part = match wanted > count {
                true => even_part(count, bins.len(), place).min(room[bin]),
                false => room[bin],
            };
            for item in items.by_ref().take(part) {
                bin_of[item] = Some(bin);
                room[bin] -= 1;
            }
        }
    }

    let mut free = (0..bins.len()).flat_map(|bin| std::iter::repeat_n(bin, room[bin]));
    bin_of
        .into_iter()
        // There is room for exactly `items.len()`, so `free` does not run dry.
        .map(|bin| bin.or_else(|| free.next()).unwrap_or_default())
        .collect()
}

/// The size of part `index` when `total` is cut into `parts` parts, larger parts first.
fn even_part(total: usize, parts: usize, index: usize) -> usize {
    total / parts + usize::from(index < total % parts)
}

/// As queues are to take them: one thread a core first, those on the slave's node first of these.
fn in_order(share: &[&Cpu], node: Option<u32>) -> Vec<u32> {
    let mut order: Vec<(usize, bool, usize, u32)> = share
        .iter()
        .enumerate()
        .map(|(place, cpu)| {
            let thread = share[..place]
                .iter()
                .filter(|other| other.core == cpu.core)
                .count();
            let is_foreign = node.is_some() && cpu.node != node;
            (thread, is_foreign, place, cpu.id)
        })
        .collect();
    order.sort_unstable();
    order.into_iter().map(|(.., id)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn flat(count: u32) -> Vec<Cpu> {
        (0..count)
            .map(|id| Cpu {
                id,
                node: None,
                llc: 0,
                core: id,
            })
            .collect()
    }

    fn numa(nodes: &[u32]) -> Vec<Cpu> {
        (0..)
            .zip(nodes)
            .map(|(id, node)| Cpu {
                id,
                node: Some(*node),
                llc: *node,
                core: id,
            })
            .collect()
    }

    #[test]
    fn one_each() {
        assert_eq!(shares(&[None; 4], &flat(4)), [[0], [1], [2], [3]]);
    }

    #[test]
    fn neighbours_stay_together() {
        assert_eq!(shares(&[None; 2], &flat(4)), [[0, 1], [2, 3]]);
    }

    #[test]
    fn more_slaves_than_cpus() {
        assert_eq!(shares(&[None; 4], &flat(2)), [[0], [0], [1], [1]]);
    }

    #[test]
    fn local_first() {
        // The first slave is on the second node.
        assert_eq!(
            shares(&[Some(1), Some(0)], &numa(&[0, 0, 1, 1])),
            [[2, 3], [0, 1]]
        );
        // A single queue goes to a CPU at home.
        assert_eq!(shares(&[Some(1)], &numa(&[0, 0, 1, 1])), [[2, 3, 0, 1]]);
        // Three slaves compete for node 0: all stay even, one goes abroad, and not the one at home
        // on node 1.
        let abroad = shares(
            &[Some(0), Some(0), Some(0), Some(1)],
            &numa(&[0, 0, 0, 0, 1, 1, 1, 1]),
        );
        assert_eq!(abroad.iter().map(Vec::len).collect::<Vec<_>>(), [2; 4]);
        assert!(abroad[3].iter().all(|cpu| *cpu >= 4));
    }

    #[test]
    fn threads_of_a_core_stay_with_one_slave() {
        let cpus: Vec<Cpu> = [
            (0, 0),
            (4, 0),
            (1, 1),
            (5, 1),
            (2, 2),
            (6, 2),
            (3, 3),
            (7, 3),
        ]
        .map(|(id, core)| Cpu {
            id,
            node: Some(0),
            llc: 0,
            core,
        })
        .to_vec();
        assert_eq!(shares(&[Some(0); 2], &cpus), [[0, 1, 4, 5], [2, 3, 6, 7]]);
        assert_eq!(
            shares(&[Some(0); 3], &cpus),
            [vec![0, 1, 4, 5], vec![2, 6], vec![3, 7]]
        );
        // More slaves than cores: better a thread than nothing.
        assert_eq!(
            shares(&[Some(0); 5], &cpus),
            [vec![0, 4], vec![1, 5], vec![2, 6], vec![3], vec![7]]
        );
    }

    #[test]
    fn nothing_to_share() {
        assert_eq!(shares(&[None; 2], &[]), [vec![], vec![]] as [Vec<u32>; 2]);
        assert!(shares(&[], &flat(2)).is_empty());
    }

    fn node() -> impl Strategy<Value = Option<u32>> {
        prop::option::of(0u32..4)
    }

    proptest! {
        #[test]
        fn even_disjoint_complete_and_repeatable(
            slaves in prop::collection::vec(node(), 1..20),
            nodes in prop::collection::vec(node(), 1..50),
            threads in 1u32..4,
        ) {
            let cpus: Vec<Cpu> = (0..).zip(nodes.iter().flat_map(|node| vec![node; threads as usize]))
                .map(|(id, node)| Cpu { id: id * 3, node: *node, llc: id / 4, core: id / threads })
                .collect();
            let shares = shares(&slaves, &cpus);
            prop_assert_eq!(&shares, &super::shares(&slaves, &cpus));

            let mut users: BTreeMap<u32, usize> = cpus.iter().map(|cpu| (cpu.id, 0)).collect();
            for cpu in shares.iter().flatten() {
                *users.get_mut(cpu).expect("a CPU nobody offered") += 1;
            }
            let even = |counts: Vec<usize>| counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1;
            if nodes.len() >= slaves.len() {
                let core = |cpu: &u32| cpu / 3 / threads;
                let cores = |share: &Vec<u32>| share.iter().map(core).collect::<BTreeSet<u32>>();
                prop_assert!(even(shares.iter().map(|share| cores(share).len()).collect()));
                prop_assert!(shares.iter().all(|share| share.len() == cores(share).len() * threads as usize));
            } else {
                prop_assert!(even(shares.iter().map(Vec::len).collect()));
            }
            prop_assert!(even(users.values().copied().collect()));
            if cpus.len() >= slaves.len() {
                prop_assert!(users.values().all(|users| *users == 1));
            } else {
                prop_assert!(shares.iter().all(|share| share.len() == 1));
            }
        }

        /// No slave has a foreign CPU while another has one that is foreign to it but local to the
        /// first: swapping the two would bring both nearer.
        #[test]
        fn no_swap_brings_both_nearer(
            slaves in prop::collection::vec(0u32..3, 1..8),
            nodes in prop::collection::vec(0u32..3, 8..40),
        ) {
            let mut nodes = nodes;
            nodes.sort_unstable();
            let slaves: Vec<Option<u32>> = slaves.into_iter().map(Some).collect();
            let shares = shares(&slaves, &numa(&nodes));
            for (a, mine) in shares.iter().enumerate() {
                for (b, theirs) in shares.iter().enumerate() {
                    for (my, their) in mine.iter().flat_map(|my| theirs.iter().map(move |their| (my, their))) {
                        let (my, their) = (Some(nodes[*my as usize]), Some(nodes[*their as usize]));
                        prop_assert!(!(my != slaves[a] && their == slaves[a] && their != slaves[b]));
                    }
                }
            }
        }
    }
}
