//! The map: each rule by example, then any input against a model that is too slow for the kernel
//! but plain to read.

#[path = "../../module/map.rs"]
mod map;

use map::{Choice, Cpu, Entry, Input, MAX_SLAVES, Reason, Scratch};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// An input that owns its slices.
#[derive(Clone, Debug)]
struct Machine {
    cpus: Vec<Cpu>,
    set: Vec<u64>,
    irq: Vec<u64>,
    nodes: Vec<i32>,
    usable: u64,
    by_hand: u64,
}

impl Machine {
    /// A tree: each node has `llcs` caches, each cache `cores` cores, each core `threads` threads.
    fn tree(nodes: u32, llcs: u32, cores: u32, threads: u32) -> Self {
        let per_llc = cores * threads;
        let per_node = llcs * per_llc;
        let cpus: Vec<Cpu> = (0..nodes * per_node)
            .map(|cpu| Cpu {
                possible: true,
                smt: cpu - cpu % threads,
                llc: cpu - cpu % per_llc,
                node_first: cpu - cpu % per_node,
                node: (cpu / per_node) as i32,
            })
            .collect();
        let none = vec![0; cpus.len()];

        Self {
            cpus,
            set: none.clone(),
            irq: none,
            nodes: Vec::new(),
            usable: 0,
            by_hand: 0,
        }
    }

    /// CPUs that share nothing but their node.
    fn flat(cpus: u32) -> Self {
        Self::tree(1, cpus, 1, 1)
    }

    fn slaves(mut self, count: u32) -> Self {
        self.usable = (1 << count) - 1;
        self.nodes = vec![-1; count as usize];
        self
    }

    fn irq(mut self, cpu: usize, mask: u64) -> Self {
        self.irq[cpu] |= mask;
        self
    }

    fn set(mut self, cpu: usize, mask: u64) -> Self {
        self.set[cpu] |= mask;
        self.by_hand |= mask;
        self
    }

    fn build(&self) -> BTreeMap<u32, (Entry, Reason)> {
        // What the last build left must not matter.
        let mut smt = vec![u64::MAX; self.cpus.len()];
        let mut llc = smt.clone();
        let mut node = smt.clone();
        let mut scratch = Scratch {
            smt: &mut smt,
            llc: &mut llc,
            node: &mut node,
        };
        let mut map = BTreeMap::new();

        map::build(&self.input(), &mut scratch, |cpu, entry, reason| {
            assert_eq!(map.insert(cpu, (entry, reason)), None, "CPU {cpu} twice");
        });
        map
    }

    fn input(&self) -> Input<'_> {
        Input {
            cpus: &self.cpus,
            set: &self.set,
            irq: &self.irq,
            nodes: &self.nodes,
            usable: self.usable,
            by_hand: self.by_hand,
        }
    }

    /// The mask and the reason of each CPU.
    fn plan(&self) -> Vec<(u64, Reason)> {
        self.build()
            .into_values()
            .map(|(entry, reason)| (entry.mask(), reason))
            .collect()
    }

    /// The rules, one slave and one pair of CPUs at a time.
    fn model(&self) -> BTreeMap<u32, (Entry, Reason)> {
        let has = |masks: &[u64], cpu: usize, slave: u32| {
            masks.get(cpu).is_some_and(|mask| mask >> slave & 1 == 1)
        };
        let set = |cpu, slave| has(&self.set, cpu, slave);
        let irq = |cpu, slave| has(&self.irq, cpu, slave) && self.by_hand >> slave & 1 == 0;
        let key = |first: u32, cpu: usize| {
            if (first as usize) < self.cpus.len() {
                first as usize
            } else {
                cpu
            }
        };
        let possible: Vec<usize> = (0..self.cpus.len())
            .filter(|&cpu| self.cpus[cpu].possible)
            .collect();
        let bound: Vec<(usize, u32)> = possible
            .iter()
            .flat_map(|&cpu| (0..MAX_SLAVES).map(move |slave| (cpu, slave)))
            .filter(|&(cpu, slave)| set(cpu, slave) || irq(cpu, slave))
            .collect();
        let near = |cpu: usize, slave, first: fn(&Cpu) -> u32| {
            bound.iter().any(|&(other, bound)| {
                bound == slave
                    && key(first(&self.cpus[other]), other) == key(first(&self.cpus[cpu]), cpu)
            })
        };
        let serves = |cpu: usize, slave: u32, reason| match reason {
            Reason::Set => set(cpu, slave),
            Reason::Irq => irq(cpu, slave),
            Reason::Smt => near(cpu, slave, |place| place.smt),
            Reason::Llc => near(cpu, slave, |place| place.llc),
            Reason::Node => {
                let node = self.cpus[cpu].node;

                near(cpu, slave, |place| place.node_first)
                    || (node >= 0 && self.nodes.get(slave as usize) == Some(&node))
            }
            Reason::Any => true,
        };
        let usable: Vec<u32> = (0..MAX_SLAVES)
            .filter(|slave| self.usable >> slave & 1 == 1)
            .collect();

        possible
            .iter()
            .map(|&cpu| {
                for reason in REASONS {
                    let mask = usable
                        .iter()
                        .filter(|&&slave| serves(cpu, slave, reason))
                        .fold(0, |mask, slave| mask | 1 << slave);

                    if mask != 0 {
                        let local = matches!(reason, Reason::Set | Reason::Irq);
                        return (cpu as u32, (Entry::new(mask, local), reason));
                    }
                }
                (cpu as u32, (Entry::EMPTY, Reason::Any))
            })
            .collect()
    }
}

const REASONS: [Reason; 6] = [
    Reason::Set,
    Reason::Irq,
    Reason::Smt,
    Reason::Llc,
    Reason::Node,
    Reason::Any,
];

#[test]
fn an_interrupt_binds_its_slave() {
    let machine = (0..4).fold(Machine::flat(4).slaves(4), |machine, cpu| {
        machine.irq(cpu, 1 << cpu)
    });

    assert_eq!(machine.plan(), [1, 2, 4, 8].map(|mask| (mask, Reason::Irq)));
}

#[test]
fn a_set_wins_over_interrupts() {
    let machine = Machine::flat(2).slaves(2).irq(0, 1).irq(1, 2).set(0, 2);

    // Slave 1 leaves the CPU that it interrupts, and slave 0 has no other place than CPU 0's.
    assert_eq!(machine.plan(), [(0b10, Reason::Set), (0b11, Reason::Node)]);
}

#[test]
fn a_set_without_a_usable_slave_gives_way() {
    let mut machine = Machine::flat(2).slaves(2).set(0, 2).irq(0, 1);

    machine.usable = 0b01;
    assert_eq!(machine.plan(), [(0b01, Reason::Irq), (0b01, Reason::Node)]);
}

#[test]
fn the_nearest_slave_comes_first() {
    // Two nodes of two caches of two cores of two threads; slave 0 on CPU 0 and slave 1 on CPU 12.
    let machine = Machine::tree(2, 2, 2, 2).slaves(2).irq(0, 1).irq(12, 2);
    use Reason::{Irq, Llc, Node, Smt};

    assert_eq!(
        machine.plan(),
        [
            (1, Irq),
            (1, Smt),
            (1, Llc),
            (1, Llc),
            (1, Node),
            (1, Node),
            (1, Node),
            (1, Node),
            (2, Node),
            (2, Node),
            (2, Node),
            (2, Node),
            (2, Irq),
            (2, Smt),
            (2, Llc),
            (2, Llc),
        ]
    );
}

#[test]
fn a_slave_set_by_hand_is_near_its_neighbours_too() {
    let machine = Machine::tree(1, 1, 2, 2).slaves(2).set(0, 1).irq(2, 2);

    assert_eq!(
        machine.plan(),
        [
            (1, Reason::Set),
            (1, Reason::Smt),
            (2, Reason::Irq),
            (2, Reason::Smt)
        ]
    );
}

#[test]
fn a_device_is_near_the_cpus_of_its_node() {
    let mut machine = Machine::tree(3, 1, 1, 1).slaves(2);

    machine.nodes = vec![1, 0];
    assert_eq!(
        machine.plan(),
        [(2, Reason::Node), (1, Reason::Node), (3, Reason::Any)]
    );
}

#[test]
fn no_node_is_near_no_device() {
    let mut machine = Machine::flat(1).slaves(2);

    machine.nodes = vec![-1, 0];
    machine.cpus[0].node = -1;
    assert_eq!(machine.plan(), [(3, Reason::Any)]);
}

#[test]
fn more_slaves_than_cpus_share() {
    let machine = Machine::flat(2).slaves(4).irq(0, 0b0101).irq(1, 0b1010);

    assert_eq!(
        machine.plan(),
        [(0b0101, Reason::Irq), (0b1010, Reason::Irq)]
    );
}

#[test]
fn a_slave_with_many_queues_serves_each_of_their_cpus() {
    let machine = (0..4).fold(Machine::flat(4).slaves(1), |machine, cpu| {
        machine.irq(cpu, 1)
    });

    assert_eq!(machine.plan(), [(1, Reason::Irq); 4]);
}

#[test]
fn no_slave_leaves_every_cpu_empty() {
    let machine = Machine::flat(3).slaves(0).irq(0, 1).set(1, 2);

    for (entry, reason) in machine.build().into_values() {
        assert_eq!((entry, reason), (Entry::EMPTY, Reason::Any));
        assert_eq!(entry.choice(), Choice::None);
        assert_eq!(entry.spread(7), None);
    }
}

#[test]
fn slaves_beyond_the_most_are_left_out() {
    let mut machine = Machine::flat(2).slaves(0).irq(0, 1 << 63);

    machine.usable = u64::MAX;
    machine.nodes = vec![-1; 80];
    machine.nodes[63] = 0;
    machine.nodes[64] = 0;
    assert_eq!(
        machine.plan(),
        [(u64::MAX >> 1, Reason::Any); 2],
        "bit 63 is no slave"
    );
}

#[test]
fn cpus_that_cannot_be_have_no_entry_and_lend_no_slave() {
    let mut machine = Machine::tree(1, 1, 1, 4).slaves(2).irq(1, 1).irq(3, 2);

    machine.cpus[1].possible = false;
    assert_eq!(
        machine.build().into_iter().collect::<Vec<_>>(),
        [
            (0, (Entry::new(2, false), Reason::Smt)),
            (2, (Entry::new(2, false), Reason::Smt)),
            (3, (Entry::new(2, true), Reason::Irq)),
        ]
    );
}

#[test]
fn a_group_that_is_no_cpu_counts_as_alone() {
    let mut machine = Machine::flat(2).slaves(1).irq(0, 1);

    for cpu in &mut machine.cpus {
        (cpu.smt, cpu.llc, cpu.node_first) = (2, u32::MAX, 99);
    }
    assert_eq!(machine.plan(), [(1, Reason::Irq), (1, Reason::Any)]);
}

#[test]
fn only_its_own_slaves_are_local_to_a_cpu() {
    for reason in REASONS {
        assert_eq!(
            reason.is_local(),
            matches!(reason.name(), "set" | "irq"),
            "{}",
            reason.name()
        );
    }
    assert_eq!(
        REASONS.map(Reason::name),
        ["set", "irq", "smt", "llc", "node", "any"]
    );
}

#[test]
fn an_entry_survives_being_stored() {
    let entry = Entry::new(u64::MAX, false);

    assert!(!entry.is_local(), "a mask cannot make an entry local");
    assert!(Entry::new(1, true).is_local());
    assert_eq!(Entry::from_raw(entry.raw()), entry);
    assert_eq!(Entry::from_raw(0), Entry::EMPTY);
}

/// Hashes of bonding change in few bits from one flow to the next; whichever those are, no slave
/// may get more than its share.
#[test]
fn flows_spread_evenly() {
    // Fewer flows say the same, and Miri is slow.
    let flows: u32 = if cfg!(miri) { 4096 } else { 65_536 };

    for count in [2, 3, 4, 5, 8, 16, 63]
        .into_iter()
        .filter(|&count| flows / count > 800)
    {
        // Every other bit for as long as there is room, so that a slave is not its rank.
        let mask = (0..count).fold(0u64, |mask, slave| mask | 1 << (slave * 2 % 63));
        let entry = Entry::new(mask, true);

        for stride in [1, 2, 4, 64, 256, 32_767, 65_536] {
            let mut sent = BTreeMap::new();

            for flow in 0..flows {
                let slave = entry.spread(flow.wrapping_mul(stride)).expect("a slave");
                *sent.entry(slave).or_insert(0u32) += 1;
            }
            assert_eq!(sent.len() as u32, count, "every slave is used");
            for (slave, sent) in sent {
                let share = flows / count;
                assert!(
                    sent.abs_diff(share) < share / 5,
                    "slave {slave} of {count} got {sent} of {flows} flows, stride {stride}"
                );
            }
        }
    }
}

/// Sizes that a proptest would seldom reach, the largest the kernel can be built for among them.
#[test]
fn every_size_follows_the_model() {
    let sizes: &[u32] = if cfg!(miri) {
        &[1, 65]
    } else {
        &[1, 2, 63, 64, 65, 1023, 8192]
    };

    for &cpus in sizes {
        let mut machine = Machine::tree(cpus.div_ceil(64), 4, 8, 2).slaves(4);

        machine.cpus.truncate(cpus as usize);
        machine.set.truncate(cpus as usize);
        machine.irq.truncate(cpus as usize);
        machine = machine.irq(cpus as usize / 2, 0b0001).set(0, 0b0010);
        machine.nodes = vec![-1, -1, 7, -1];
        assert_eq!(machine.build(), machine.model(), "{cpus} CPUs");
    }
}

/// Sets of slaves as they come: none, one, a few, all.
fn slaves() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => Just(0),
        2 => (0..64u32).prop_map(|slave| 1 << slave),
        2 => 0..16u64,
        1 => any::<u64>(),
        1 => Just(u64::MAX),
    ]
}

/// Machines that make sense: a tree, with holes in the CPU numbers.
fn machine() -> impl Strategy<Value = Machine> {
    (1..4u32, 1..4u32, 1..4u32, 1..4u32)
        .prop_flat_map(|(nodes, llcs, cores, threads)| {
            let machine = Machine::tree(nodes, llcs, cores, threads);
            let cpus = machine.cpus.len();

            (
                Just(machine),
                prop::collection::vec(prop::bool::weighted(0.9), cpus),
                prop::collection::vec(slaves(), cpus),
                prop::collection::vec(slaves(), cpus),
                prop::collection::vec(-1..4i32, 0..80),
                slaves(),
                slaves(),
            )
        })
        .prop_map(|(machine, possible, set, irq, nodes, usable, by_hand)| {
            let mut machine = Machine {
                set,
                irq,
                nodes,
                usable,
                by_hand,
                ..machine
            };

            for (cpu, possible) in machine.cpus.iter_mut().zip(possible) {
                cpu.possible = possible;
            }
            machine
        })
}

/// Machines that contradict themselves: groups that go by any number, slices of any length.
fn nonsense() -> impl Strategy<Value = Machine> {
    let number = || prop_oneof![0..12u32, any::<u32>()];
    let cpu = (any::<bool>(), number(), number(), number(), -2..3i32).prop_map(
        |(possible, smt, llc, node_first, node)| Cpu {
            possible,
            smt,
            llc,
            node_first,
            node,
        },
    );

    (
        prop::collection::vec(cpu, 0..12),
        prop::collection::vec(slaves(), 0..14),
        prop::collection::vec(slaves(), 0..14),
        prop::collection::vec(-2..3i32, 0..80),
        slaves(),
        slaves(),
    )
        .prop_map(|(cpus, set, irq, nodes, usable, by_hand)| Machine {
            cpus,
            set,
            irq,
            nodes,
            usable,
            by_hand,
        })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 512 },
        // A failure prints its input; a file of past ones would need a working directory.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_machine_follows_the_model(machine in machine()) {
        prop_assert_eq!(machine.build(), machine.model());
    }

    #[test]
    fn nonsense_follows_the_model(machine in nonsense()) {
        prop_assert_eq!(machine.build(), machine.model());
    }

    #[test]
    fn the_same_input_gives_the_same_map(machine in nonsense()) {
        prop_assert_eq!(machine.build(), machine.build());
    }

    #[test]
    fn a_short_scratch_only_widens(machine in machine(), len in 0..8usize) {
        let (mut smt, mut llc, mut node) = (vec![0; len], vec![0; len], vec![0; len]);
        let mut scratch = Scratch { smt: &mut smt, llc: &mut llc, node: &mut node };
        let usable = machine.usable & !(1 << MAX_SLAVES);

        map::build(&machine.input(), &mut scratch, |_, entry, _| {
            assert_eq!(entry.mask() & !usable, 0);
            assert_eq!(entry.mask() == 0, usable == 0);
        });
    }

    #[test]
    fn a_packet_leaves_by_a_slave_of_the_entry(raw in any::<u64>(), hash in any::<u32>()) {
        let entry = Entry::from_raw(raw);
        let slave = entry.spread(hash);

        match entry.choice() {
            Choice::None => {
                prop_assert_eq!(entry.mask(), 0);
                prop_assert_eq!(slave, None);
            }
            Choice::Slave(only) => {
                prop_assert_eq!(entry.mask(), 1 << only);
                prop_assert_eq!(slave, Some(only));
            }
            Choice::Spread => {
                prop_assert!(entry.mask().count_ones() > 1);
                prop_assert!(slave.is_some_and(|slave| entry.mask() >> slave & 1 == 1));
                // A flow keeps its slave.
                prop_assert_eq!(slave, entry.spread(hash));
            }
        }
    }
}
