// SPDX-License-Identifier: GPL-2.0

//! Bonding transmit policy `cpu_bound`: send by the slave whose interrupts the transmitting CPU
//! handles.
//!
//! - [`bond`]: the seam to the bonding driver, and to C.
//! - [`irq`]: which CPUs handle a slave's interrupts.
//! - [`map`]: from that, CPU sets and topology to the slaves of each CPU.
//! - [`policy`]: the policy, which ties them together.

mod bindings;
mod bond;
mod irq;
pub mod map;
mod policy;

use kernel::prelude::*;

module! {
    type: Module,
    name: "bond_cpu_bound",
    authors: ["cpubond maintainers"],
    description: "Bonding transmit policy: the slave bound to the CPU that transmits",
    license: "GPL",
    alias: ["bond-xmit-cpu_bound"],
}

struct Module {
    _registration: bond::Registration<policy::CpuBound>,
}

impl kernel::Module for Module {
    fn init(module: &'static ThisModule) -> Result<Self> {
        // Nothing may fail after this, see its `drop()`.
        Ok(Self {
            _registration: bond::Registration::new(module)?,
        })
    }
}
