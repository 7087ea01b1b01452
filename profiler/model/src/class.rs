//! What a function's work is part of.

use serde::{Deserialize, Serialize};

/// What work is part of. Never mixed: each has rows and sums of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// The way of a packet or request through the kernel.
    Path,
    /// Waiting for a lock in its slow path. How long depends on the host's scheduling.
    Spin,
    /// Scheduler, idle, timers, RCU.
    Sched,
    /// Interrupts and exceptions, but for the network's own softirq work in them.
    Irq,
    /// The load generator in the kernel: pktgen and what it calls to make a packet.
    Generator,
    /// User space.
    User,
}

impl Class {
    /// All, in the order of the tables.
    pub const ALL: [Self; 6] = [
        Self::Path,
        Self::Spin,
        Self::Sched,
        Self::Irq,
        Self::Generator,
        Self::User,
    ];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Path => "path",
            Self::Spin => "spin",
            Self::Sched => "sched",
            Self::Irq => "irq",
            Self::Generator => "generator",
            Self::User => "user",
        }
    }
}
