//! Regions of a lab's run, counted by the profiler in the server's QEMU.
//!
//! ```text
//! let topology = Topology { profiler: true, ..Topology::default() };
//! let lab = Lab::boot(&host, &topology, accel, false)?;
//! let mut profiler = Profiler::of(&lab)?;
//! profiler.open(&Region::packets("balance-rr", "bonding:bond_start_xmit"))?;
//! lab.server().output("…the load…", timeout)?;
//! let profile = profiler.close()?;
//! println!("{} instructions a packet", profile.per_packet(Class::Path).insns);
//! ```
//!
//! What the figures are not: they say nothing of cycles per instruction, of hardware cache
//! misses and of throughput; interconnect, DMA and prefetch are not modelled.

use crate::vm::lab::Lab;
use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

pub use profiler_model::class::Class;
pub use profiler_model::counts::{Count, FunctionCount, RangeCount, Replay};
#[expect(unused_imports, reason = "for the benchmarks")]
pub use profiler_model::region::{Region, Window};

/// What was counted in one region.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Profile {
    /// The region's.
    pub label: String,
    /// CPUs of the server.
    pub cpus: u32,
    /// Packets (or requests) that the counts are over, by CPU. With [`Window::Packets`]
    /// those that are whole: from a mark to the CPU's next.
    pub packets: Vec<u64>,
    /// Every function that ran, by class.
    pub functions: Vec<FunctionCount>,
    /// As [`Region::ranges`] asked.
    pub ranges: Vec<RangeCount>,
    /// The figure that does not depend on the host's scheduling.
    pub replay: Replay,
}

/// Three figures a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PerPacket {
    /// Instructions.
    pub insns: f64,
    /// Conflict lines.
    pub conflicts: f64,
    /// Transfers, as run.
    pub transfers: f64,
}

impl Profile {
    /// Packets (or requests) on all CPUs.
    pub fn total_packets(&self) -> u64 {
        self.packets.iter().sum()
    }

    /// All of one class.
    pub fn total(&self, class: Class) -> Count {
        self.rows(class).map(FunctionCount::total).sum()
    }

    /// One class on one CPU.
    pub fn on_cpu(&self, class: Class, cpu: u32) -> Count {
        self.rows(class)
            .filter_map(|row| row.cpus.get(cpu as usize))
            .copied()
            .sum()
    }

    /// One class, a packet. Zero where there were no packets.
    pub fn per_packet(&self, class: Class) -> PerPacket {
        self.divide(self.total(class))
    }

    /// One function of class `path`, a packet; zero where it did not run.
    pub fn function(&self, name: &str) -> PerPacket {
        self.divide(
            self.rows(Class::Path)
                .filter(|row| row.name == name)
                .map(FunctionCount::total)
                .sum(),
        )
    }

    /// Instructions from entry of one function to entry of another, as asked for.
    pub fn range(&self, from: &str, to: &str) -> Option<&RangeCount> {
        self.ranges
            .iter()
            .find(|range| range.from == from && range.to == to)
    }

    /// Share of the busiest CPU in the instructions of some classes, 1 / CPUs to 1.
    pub fn busiest_share(&self, classes: &[Class]) -> f64 {
        let by_cpu: Vec<u64> = (0..self.cpus)
            .map(|cpu| {
                classes
                    .iter()
                    .map(|&class| self.on_cpu(class, cpu).insns)
                    .sum()
            })
            .collect();
        let all: u64 = by_cpu.iter().sum();
        let most = by_cpu.into_iter().max().unwrap_or_default();
        if all == 0 {
            0.0
        } else {
            most as f64 / all as f64
        }
    }

    fn rows(&self, class: Class) -> impl Iterator<Item = &FunctionCount> {
        self.functions.iter().filter(move |row| row.class == class)
    }

    fn divide(&self, count: Count) -> PerPacket {
        let packets = self.total_packets();
        if packets == 0 {
            return PerPacket::default();
        }
        let each = |n: u64| n as f64 / packets as f64;
        PerPacket {
            insns: each(count.insns),
            conflicts: each(count.conflicts),
            transfers: each(count.transfers),
        }
    }
}

/// Opens and closes regions of one lab.
pub struct Profiler<'a> {
    lab: &'a Lab,
}

impl<'a> Profiler<'a> {
    /// Of a lab that was booted with `profiler` in its topology.
    pub fn of(lab: &'a Lab) -> Result<Self> {
        if !lab.topology().profiler {
            bail!("this lab was booted without the profiler");
        }
        Ok(Self { lab })
    }

    /// From here on it is counted. One region at a time.
    pub fn open(&mut self, _region: &Region) -> Result<()> {
        let _ = self.lab;
        bail!("not there yet")
    }

    /// Up to here it was counted.
    pub fn close(&mut self) -> Result<Profile> {
        bail!("not there yet")
    }
}
