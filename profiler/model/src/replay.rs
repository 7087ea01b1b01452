//! The CPUs' packets in other orders than the host happened to run them in.
//!
//! A packet is never taken apart: each CPU's stay in their order, and between two of them
//! the packets of other CPUs go. Round robin is one order; the others are random, by seed.

use crate::class::Class;
use crate::counts::{Replay, Spread};
use crate::line::{Line, MAX_CPUS};
use crate::trace::Stream;
use std::collections::HashMap;

/// Random orders beside round robin.
const RANDOM_ORDERS: u32 = 8;

/// Replay what the CPUs did. `packets` is what the sums are divided by.
pub fn replay(streams: &[Stream], packets: u64) -> Replay {
    let streams = &streams[..streams.len().min(MAX_CPUS)];
    let mut numbers = HashMap::new();
    let dense: Vec<Vec<Vec<Step>>> = streams
        .iter()
        .map(|stream| {
            (0..stream.counted_to)
                .map(|number| {
                    stream
                        .packet(number)
                        .map(|record| {
                            let next = numbers.len() as u32;
                            Step {
                                line: *numbers.entry(record.line).or_insert(next),
                                access: record.access,
                                class: record.class,
                            }
                        })
                        .collect()
                })
                .collect()
        })
        .collect();
    let mut lines = vec![Line::default(); numbers.len()];
    let setup: Vec<usize> = streams
        .iter()
        .map(|stream| stream.counted_from.min(stream.counted_to) as usize)
        .collect();

    let (mut conflicts, mut transfers, mut generator) = (Vec::new(), Vec::new(), Vec::new());
    let mut total_packets = 0;
    for order in 0..=RANDOM_ORDERS {
        lines.fill(Line::default());
        let mut sums = Sums::default();
        for (cpu, (packets, &setup)) in dense.iter().zip(&setup).enumerate() {
            for packet in &packets[..setup] {
                // What it costs to set up is no packet's.
                Sums::default().run(&mut lines, cpu, packet);
            }
        }
        let mut left = Left::new(
            dense
                .iter()
                .zip(&setup)
                .map(|(all, setup)| all.len() - setup),
        );
        let mut random = SplitMix(u64::from(order));
        while let Some(cpu) = match order {
            0 => left.farthest_behind(),
            _ => left.random(&mut random),
        } {
            let number = setup[cpu] + left.take(cpu);
            sums.run(&mut lines, cpu, &dense[cpu][number]);
        }
        total_packets = left.done();
        let each = |n: u64| n as f64 / packets.max(1) as f64;
        conflicts.push(each(sums.conflicts));
        transfers.push(each(sums.transfers));
        generator.push(each(sums.generator));
    }
    Replay {
        packets: total_packets,
        orders: RANDOM_ORDERS + 1,
        conflicts: Spread::of(&conflicts),
        transfers: Spread::of(&transfers),
        round_robin: transfers.first().copied().unwrap_or_default(),
        generator_transfers: Spread::of(&generator),
    }
}

/// A record with its line numbered from 0.
struct Step {
    line: u32,
    access: crate::line::Access,
    class: Class,
}

#[derive(Default)]
struct Sums {
    conflicts: u64,
    transfers: u64,
    generator: u64,
}

impl Sums {
    fn run(&mut self, lines: &mut [Line], cpu: usize, packet: &[Step]) {
        for step in packet {
            let cost = lines[step.line as usize].access(cpu, step.access);
            if step.class == Class::Path {
                self.conflicts += u64::from(cost.conflict);
                self.transfers += u64::from(cost.transfer);
            } else {
                self.generator += u64::from(cost.transfer);
            }
        }
    }
}

/// Packets that each CPU still has to run.
struct Left {
    all: Vec<usize>,
    taken: Vec<usize>,
}

impl Left {
    fn new(all: impl Iterator<Item = usize>) -> Self {
        let all: Vec<_> = all.collect();
        Self {
            taken: vec![0; all.len()],
            all,
        }
    }

    fn take(&mut self, cpu: usize) -> usize {
        self.taken[cpu] += 1;
        self.taken[cpu] - 1
    }

    fn done(&self) -> u64 {
        self.taken.iter().sum::<usize>() as u64
    }

    /// Plain round robin where all have the same number; else the CPU that has run the
    /// smallest part of its packets, so that all end together.
    fn farthest_behind(&self) -> Option<usize> {
        (0..self.all.len())
            .filter(|&cpu| self.taken[cpu] < self.all[cpu])
            .min_by(|&a, &b| (self.taken[a] * self.all[b]).cmp(&(self.taken[b] * self.all[a])))
    }

    /// Any packet that is left is as likely as any other to be its CPU's next.
    fn random(&self, random: &mut SplitMix) -> Option<usize> {
        let left = |cpu: usize| (self.all[cpu] - self.taken[cpu]) as u64;
        let total: u64 = (0..self.all.len()).map(left).sum();
        let mut at = random.next().checked_rem(total)?;
        (0..self.all.len()).find(|&cpu| {
            let here = at < left(cpu);
            at = at.wrapping_sub(left(cpu));
            here
        })
    }
}

/// Steele, Lea, Flood: the same numbers for the same seed on every machine.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::line::Access;
    use crate::trace::Record;

    /// A CPU that runs the same packet some times.
    fn stream(times: usize, packet: &[(u64, Access)]) -> Stream {
        let mut stream = Stream::default();
        for _ in 0..times {
            for &(line, access) in packet {
                stream.push(Record {
                    line,
                    access,
                    class: Class::Path,
                });
            }
            stream.counted_to = stream.end_packet();
        }
        stream
    }

    #[test]
    fn one_shared_counter_moves_with_every_packet_under_round_robin() {
        let packet: &[_] = &[(7, Access::Update), (8, Access::Read)];
        let cpus = vec![stream(100, packet); 4];
        let result = replay(&cpus, 400);
        assert_eq!(result.packets, 400);
        assert_eq!(result.round_robin, 399.0 / 400.0);
        // Two packets of one CPU in a row, a quarter of the time, move nothing.
        assert!(
            result.transfers.min > 0.6 && result.transfers.min < 0.9,
            "{result:?}"
        );
        assert_eq!(result.transfers.max, result.round_robin);
        assert_eq!(result.conflicts, result.transfers);
        assert_eq!(replay(&cpus, 400), result, "seeded");
    }

    #[test]
    fn private_lines_never_move_whatever_the_order() {
        let cpus: Vec<_> = (0..4)
            .map(|cpu| stream(50, &[(cpu, Access::Write), (cpu + 10, Access::Update)]))
            .collect();
        let result = replay(&cpus, 200);
        assert_eq!((result.transfers.max, result.conflicts.max), (0.0, 0.0));
    }

    #[test]
    fn setup_is_replayed_but_not_counted() {
        let mut first = stream(3, &[(1, Access::Write)]);
        let second = stream(2, &[(1, Access::Read)]);
        // All three counted: read, write, read, write move; the first write does not.
        assert_eq!(replay(&[first.clone(), second.clone()], 1).round_robin, 4.0);
        first.counted_from = 3;
        let result = replay(&[first, second], 1);
        assert_eq!(result.packets, 2);
        assert_eq!(result.round_robin, 1.0);

        // What is counted is what comes after it.
        let mut first = stream(1, &[(1, Access::Write)]);
        first.push(Record {
            line: 2,
            access: Access::Write,
            class: Class::Path,
        });
        first.counted_to = first.end_packet();
        first.counted_from = 1;
        let second = stream(1, &[(2, Access::Read)]);
        assert_eq!(replay(&[first, second], 1).round_robin, 1.0);
    }

    #[test]
    fn uneven_cpus_end_together() {
        let mut left = Left::new([2, 6].into_iter());
        let mut order = Vec::new();
        while let Some(cpu) = left.farthest_behind() {
            left.take(cpu);
            order.push(cpu);
        }
        assert_eq!(order, [0, 1, 1, 1, 0, 1, 1, 1]);
    }

    #[test]
    fn nothing_is_no_packets() {
        assert_eq!(replay(&[], 0).packets, 0);
        assert_eq!(replay(&[Stream::default()], 0).transfers.max, 0.0);
    }

    #[test]
    fn the_generators_lines_are_apart() {
        let mut cpus = vec![Stream::default(), Stream::default()];
        for (cpu, class) in [(0, Class::Generator), (1, Class::User)] {
            let stream: &mut Stream = &mut cpus[cpu];
            stream.push(Record {
                line: 1,
                access: Access::Write,
                class,
            });
            stream.counted_to = stream.end_packet();
        }
        let result = replay(&cpus, 1);
        assert_eq!(result.round_robin, 0.0);
        assert_eq!(result.generator_transfers.min, 1.0);
    }
}
