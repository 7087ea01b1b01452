//! Which CPUs are a slave's own: a pure function of the slaves' NUMA nodes and the CPUs.

use crate::topology::Cpu;

/// The CPUs of each slave, one thread a core first, so that a slave with few queues puts them on
/// different cores.
///
/// With at least as many CPUs as slaves the shares are disjoint, cover every CPU and differ in
/// size by at most one. With fewer, each slave has one CPU, and the CPUs' numbers of slaves
/// differ by at most one. Evenness comes before locality, locality before everything else.
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
    let mut shares: Vec<Vec<&Cpu>> = vec![Vec::new(); slaves.len()];
    for (cpu, slave) in cpus.iter().zip(spread(&nodes, slaves)) {
        shares[slave].push(cpu);
    }
    shares
        .iter()
        .map(|share| one_thread_a_core_first(share))
        .collect()
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

fn one_thread_a_core_first(share: &[&Cpu]) -> Vec<u32> {
    let mut order: Vec<(usize, usize, u32)> = share
        .iter()
        .enumerate()
        .map(|(place, cpu)| {
            let thread = share[..place]
                .iter()
                .filter(|other| other.core == cpu.core)
                .count();
            (thread, place, cpu.id)
        })
        .collect();
    order.sort_unstable();
    order.into_iter().map(|(_, _, id)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

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
            nodes in prop::collection::vec(node(), 1..100),
        ) {
            let cpus: Vec<Cpu> = (0..).zip(&nodes)
                .map(|(id, node)| Cpu { id: id * 3, node: *node, llc: id / 4, core: id / 2 })
                .collect();
            let shares = shares(&slaves, &cpus);
            prop_assert_eq!(&shares, &super::shares(&slaves, &cpus));

            let mut users: BTreeMap<u32, usize> = cpus.iter().map(|cpu| (cpu.id, 0)).collect();
            for cpu in shares.iter().flatten() {
                *users.get_mut(cpu).expect("a CPU nobody offered") += 1;
            }
            let even = |counts: Vec<usize>| counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1;
            prop_assert!(even(shares.iter().map(Vec::len).collect()));
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
