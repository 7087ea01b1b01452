//! What was counted in a region.

use crate::class::Class;
use crate::region::Window;
use serde::{Deserialize, Serialize};
use std::ops::{Add, AddAssign};

/// Three figures of one function on one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Instructions.
    pub insns: u64,
    /// Accesses that conflict: a read of a line that another CPU wrote since this CPU
    /// last read it, a write to a line that another CPU touched since this CPU last wrote it.
    pub conflicts: u64,
    /// Lines that moved: a read of a line dirty in another CPU, a write to a line that
    /// another CPU holds.
    pub transfers: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.insns += other.insns;
        self.conflicts += other.conflicts;
        self.transfers += other.transfers;
    }
}

impl Add for Count {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl std::iter::Sum for Count {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// One function in one class. A function that runs for a packet and in an interrupt has
/// a row for each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionCount {
    /// As in kallsyms.
    pub name: String,
    /// Which module has it; none: the kernel itself.
    pub module: Option<String>,
    /// What its work is part of.
    pub class: Class,
    /// By CPU.
    pub cpus: Vec<Count>,
}

impl FunctionCount {
    /// Over all CPUs.
    pub fn total(&self) -> Count {
        self.cpus.iter().copied().sum()
    }
}

/// Instructions of class `path` from entry of one function to entry of another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeCount {
    /// The first function, as asked for.
    pub from: String,
    /// The second.
    pub to: String,
    /// How often the way was gone without an interrupt in it.
    pub times: u64,
    /// How often with one; not in the other figures.
    pub interrupted: u64,
    /// Instructions, over all times.
    pub insns: u64,
    /// The fewest in one time.
    pub min: u64,
    /// The most in one time.
    pub max: u64,
}

impl RangeCount {
    /// Add what was counted of the same range elsewhere.
    pub fn add(&mut self, other: &Self) {
        if other.times > 0 {
            self.min = match self.times {
                0 => other.min,
                _ => self.min.min(other.min),
            };
            self.max = self.max.max(other.max);
        }
        self.times += other.times;
        self.interrupted += other.interrupted;
        self.insns += other.insns;
    }

    /// Instructions each time, if there was one.
    pub fn mean(&self) -> Option<f64> {
        (self.times > 0).then(|| self.insns as f64 / self.times as f64)
    }
}

/// What the plugin writes of a region when it is closed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// The region's label.
    pub label: String,
    /// The region's window.
    pub window: Window,
    /// Every function that ran, by class.
    pub functions: Vec<FunctionCount>,
    /// As the region asked.
    pub ranges: Vec<RangeCount>,
    /// Path instructions of each whole packet, in order, by CPU.
    pub packet_insns: Vec<Vec<u32>>,
    /// Marks, by CPU.
    pub marks: Vec<u64>,
}

/// Lowest, mean, highest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Lowest.
    pub min: f64,
    /// Highest.
    pub max: f64,
}

impl Spread {
    /// Of some values; zero of none.
    pub fn of(values: &[f64]) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

/// What the lines do when the CPUs' packets are put into other orders. It does not depend
/// on how the host scheduled the virtual CPUs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Replay {
    /// Packets (or requests) in each order.
    pub packets: u64,
    /// Round robin, and each a seeded random one.
    pub orders: u32,
    /// Conflicts a packet, over the orders; class `path`.
    pub conflicts: Spread,
    /// Transfers a packet, over the orders; class `path`.
    pub transfers: Spread,
    /// Transfers a packet under round robin; class `path`.
    pub round_robin: f64,
    /// Transfers a packet of the generator's own lines (classes `generator` and `user`).
    pub generator_transfers: Spread,
}
