// SPDX-License-Identifier: GPL-2.0

//! The policy `cpu_bound`: a [`map`](super::map) that the packet path reads and updates rewrite.

use super::{
    bond::{self, Choices, Lookup, Selection, Slaves, TransmitPolicy},
    irq,
    map::{self, Choice, Entry, Reason},
};
// The kernel's own `Atomic::load()` is a call to a C helper. A relaxed access has no ordering that
// the two memory models could disagree on.
use core::{
    ffi::CStr,
    sync::atomic::{AtomicU64, AtomicU8, Ordering::Relaxed},
};
use kernel::{
    alloc::{AllocError, Flags, KVVec},
    new_mutex,
    prelude::*,
    sync::Mutex,
};

/// The policy's state for one bond.
#[pin_data]
pub(crate) struct CpuBound {
    /// What the packet path reads: what follows from `entries`.
    choices: Choices,
    /// By CPU: what it may send by, as [`Entry::raw`]. Written in place by updates, and only if it
    /// differs: packets find a valid entry at any time, and the lines stay shared by all CPUs.
    entries: KVVec<AtomicU64>,
    /// By CPU: why, an index of [`REASONS`]. Not for the packet path.
    reasons: KVVec<AtomicU8>,
    /// RTNL serialises updates; the mutex is how the compiler knows.
    #[pin]
    work: Mutex<Work>,
}

/// What [`map::build`] needs, all of it by CPU. Kept, so that the update of every second allocates
/// nothing.
struct Work {
    cpus: KVVec<map::Cpu>,
    set: KVVec<u64>,
    irq: KVVec<u64>,
    smt: KVVec<u64>,
    llc: KVVec<u64>,
    node: KVVec<u64>,
}

/// A vector of `len` values that `value` makes.
fn vec_of<T>(len: usize, value: impl Fn(u32) -> T, flags: Flags) -> Result<KVVec<T>, AllocError> {
    let mut v = KVVec::with_capacity(len, flags)?;

    for i in 0..len {
        // There are not more CPUs than a u32 can count. There is room: `push()` would bring the
        // panics of its arithmetic along.
        v.push_within_capacity(value(i as u32))
            .map_err(|_| AllocError)?;
    }
    Ok(v)
}

impl Work {
    fn new(cpus: usize) -> Result<Self, AllocError> {
        let zeroes = || vec_of(cpus, |_| 0, GFP_KERNEL);

        Ok(Self {
            cpus: vec_of(cpus, bond::cpu_topology, GFP_KERNEL)?,
            set: zeroes()?,
            irq: zeroes()?,
            smt: zeroes()?,
            llc: zeroes()?,
            node: zeroes()?,
        })
    }
}

/// Adds the slaves in `bit` to those of `cpu`.
fn add(masks: &mut [u64], cpu: u32, bit: u64) {
    if let Some(mask) = masks.get_mut(cpu as usize) {
        *mask |= bit;
    }
}

impl CpuBound {
    fn entry(&self, cpu: u32) -> Entry {
        self.entries
            .get(cpu as usize)
            .map_or(Entry::EMPTY, |e| Entry::from_raw(e.load(Relaxed)))
    }

    fn publish(&self, cpu: u32, entry: Entry, reason: Reason) {
        if let Some(e) = self.entries.get(cpu as usize) {
            if e.load(Relaxed) != entry.raw() {
                e.store(entry.raw(), Relaxed);
            }
        }
        self.choices.set(
            cpu,
            match entry.choice() {
                Choice::Slave(index) => Selection::slave(index, entry.is_local()),
                // No entry: C only looks if there is a slave, so the map is about to learn of it.
                // Until then the flows share whatever there is.
                Choice::Spread | Choice::None => Selection::SPREAD,
            },
        );
        if let Some(r) = self.reasons.get(cpu as usize) {
            r.store(reason as u8, Relaxed);
        }
    }
}

impl TransmitPolicy for CpuBound {
    const NAME: &'static CStr = c"cpu_bound";

    fn attach() -> Result<Pin<KBox<Self>>> {
        let cpus = kernel::cpu::nr_cpu_ids() as usize;
        let entries = vec_of(cpus, |_| AtomicU64::new(Entry::EMPTY.raw()), GFP_KERNEL)?;
        let reasons = vec_of(cpus, |_| AtomicU8::new(Reason::Any as u8), GFP_KERNEL)?;
        let work = Work::new(cpus)?;
        let choices = Choices::new()?;

        KBox::pin_init(
            pin_init!(Self {
                choices,
                entries,
                reasons,
                work <- new_mutex!(work),
            }),
            GFP_KERNEL,
        )
    }

    fn update(&self, slaves: Slaves<'_>) -> Result {
        let mut work = self.work.lock();
        let Work {
            cpus,
            set,
            irq,
            smt,
            llc,
            node,
        } = &mut *work;
        let mut nodes = [-1; map::MAX_SLAVES as usize];
        let mut usable = 0;
        let mut by_hand = 0;

        for (cpu, place) in cpus.iter_mut().enumerate() {
            *place = bond::cpu_topology(cpu as u32);
        }
        set.fill(0);
        irq.fill(0);

        for ((slave, node), i) in slaves.iter().zip(&mut nodes).zip(0..map::MAX_SLAVES) {
            let bit = 1u64.wrapping_shl(i);

            usable |= bit;
            *node = slave.node();
            if let Some(cpus) = slave.cpus() {
                by_hand |= bit;
                cpus.iter().for_each(|cpu| add(set, cpu, bit));
            } else {
                irq::for_each_cpu(slave, |cpu| add(irq, cpu, bit));
            }
        }

        map::build(
            &map::Input {
                cpus,
                set,
                irq,
                nodes: &nodes,
                usable,
                by_hand,
            },
            &mut map::Scratch { smt, llc, node },
            |cpu, entry, reason| self.publish(cpu, entry, reason),
        );
        Ok(())
    }

    fn choices(&self) -> &Choices {
        &self.choices
    }

    fn spread(&self, cpu: u32, hash: u32) -> Selection {
        let entry = self.entry(cpu);

        match entry.spread(hash) {
            Some(index) => Selection::slave(index, entry.is_local()),
            None => Selection::slave(hash, false),
        }
    }

    fn lookup(&self, cpu: u32) -> Lookup {
        let reason = self
            .reasons
            .get(cpu as usize)
            .map_or(Reason::Any as u8, |r| r.load(Relaxed));

        Lookup {
            slaves: self.entry(cpu).mask(),
            reason: REASONS.get(reason as usize).copied().unwrap_or(c"any"),
        }
    }
}

/// What `cpu_bound_map` calls each [`Reason`], in their order.
const REASONS: [&CStr; 6] = [c"set", c"irq", c"smt", c"llc", c"node", c"any"];

const _: () = {
    // `Reason::name()` has no terminating NUL for C to find; the two have to agree.
    const fn same(reason: Reason) -> bool {
        let (a, b) = (
            reason.name().as_bytes(),
            REASONS[reason as usize].to_bytes(),
        );
        let mut i = 0;

        while i < a.len() && i < b.len() && a[i] == b[i] {
            i += 1;
        }
        a.len() == b.len() && i == a.len()
    }
    assert!(same(Reason::Set) && same(Reason::Irq) && same(Reason::Smt));
    assert!(same(Reason::Llc) && same(Reason::Node) && same(Reason::Any));
};
