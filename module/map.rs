// SPDX-License-Identifier: GPL-2.0

//! Which slaves a CPU may send through.
//!
//! The map is a pure function of what an operator set by hand, where the slaves' interrupts go and
//! how the CPUs are related. It knows nothing of the kernel: the module builds it to decide, the
//! `cpubond` helper builds the same source to predict, and tests run on it without a kernel.
//!
//! Slaves are bits of a `u64`: bit *i* is the *i*-th usable slave of the bond. CPUs are indices of
//! slices. Nothing here allocates, divides, indexes or overflows, so that no input can panic; an
//! input that contradicts itself gets a safe answer instead.

/// Most usable slaves of one bond that a map tells apart; those beyond carry no CPU's traffic.
pub const MAX_SLAVES: u32 = 63;

/// The bits of an [`Entry`] that are slaves.
const SLAVES: u64 = (1 << MAX_SLAVES) - 1;

/// The bit of an [`Entry`] that says that the slaves are the CPU's own.
const LOCAL: u64 = 1 << MAX_SLAVES;

/// Why a CPU sends through the slaves it does, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// The operator set it.
    Set,
    /// The slave interrupts this CPU.
    Irq,
    /// The slave is bound to a thread of the same core.
    Smt,
    /// The slave is bound to a CPU behind the same last-level cache.
    Llc,
    /// The slave is bound to a CPU of the same NUMA node, or its device sits there.
    Node,
    /// No slave is nearer than any other.
    Any,
}

impl Reason {
    /// The name that `cpu_bound_map` shows.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::Set => "set",
            Reason::Irq => "irq",
            Reason::Smt => "smt",
            Reason::Llc => "llc",
            Reason::Node => "node",
            Reason::Any => "any",
        }
    }

    /// Whether the slaves are bound to the CPU itself, rather than a fallback.
    pub const fn is_local(self) -> bool {
        matches!(self, Reason::Set | Reason::Irq)
    }
}

/// What one CPU may send through.
///
/// A single word, so that one relaxed store publishes it and one relaxed load reads a state that
/// was decided at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

/// What an [`Entry`] asks of the packet path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Send through this slave; the flow does not matter.
    Slave(u32),
    /// Several slaves are equally near: ask [`Entry::spread`], with the hash of the flow.
    Spread,
    /// No slave is usable.
    None,
}

impl Entry {
    /// An entry of a CPU that may send through no slave.
    pub const EMPTY: Self = Self(0);

    /// An entry of the slaves of `mask`; a bit that is no slave is dropped.
    pub const fn new(mask: u64, local: bool) -> Self {
        Self((mask & SLAVES) | if local { LOCAL } else { 0 })
    }

    /// Takes back what [`Self::raw`] gave.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The word to store.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The slaves.
    #[inline]
    pub const fn mask(self) -> u64 {
        self.0 & SLAVES
    }

    /// Whether the slaves are bound to the CPU itself, rather than a fallback.
    #[inline]
    pub const fn is_local(self) -> bool {
        self.0 & LOCAL != 0
    }

    /// The slave, unless it takes a flow hash to tell.
    #[inline]
    pub const fn choice(self) -> Choice {
        let mask = self.mask();

        if mask == 0 {
            Choice::None
        } else if mask & mask.wrapping_sub(1) == 0 {
            Choice::Slave(mask.trailing_zeros())
        } else {
            Choice::Spread
        }
    }

    /// The slave of the flow with this hash: the same one for as long as the entry is the same, and
    /// over many flows each slave equally often.
    #[inline]
    pub fn spread(self, hash: u32) -> Option<u32> {
        let mut mask = self.mask();
        // Scales the hash to 0..count without a division. Both factors are below 2^32.
        let scaled = u64::from(mix(hash)).wrapping_mul(u64::from(mask.count_ones()));
        let mut skip = scaled >> 32;

        while skip != 0 {
            mask &= mask.wrapping_sub(1);
            skip = skip.wrapping_sub(1);
        }

        (mask != 0).then(|| mask.trailing_zeros())
    }
}

/// Spreads every bit of `hash` over all bits (the finalizer of MurmurHash3).
///
/// Scaling looks at the high bits first, and the hash of bonding hardly sets those: it is made to
/// be divided, and only its low bits follow the port numbers.
#[inline]
const fn mix(mut hash: u32) -> u32 {
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// Where a CPU sits.
///
/// A group of CPUs goes by the lowest CPU number in it, which is the CPU's own if it is alone. A
/// number that is no CPU counts as alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Whether the machine can have this CPU; numbers may have holes.
    pub possible: bool,
    /// The threads of its core.
    pub smt: u32,
    /// The CPUs behind its last-level cache.
    pub llc: u32,
    /// The CPUs of its NUMA node.
    pub node_first: u32,
    /// The number of its NUMA node, -1 if it has none.
    pub node: i32,
}

/// Everything that a map depends on.
///
/// The slices that go by CPU are as long as `cpus`; what is missing counts as empty.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// By CPU: where it sits.
    pub cpus: &'a [Cpu],
    /// By CPU: the slaves that the operator set to it.
    pub set: &'a [u64],
    /// By CPU: the slaves that have a queue interrupt effectively on it.
    pub irq: &'a [u64],
    /// By slave: the NUMA node of its device, -1 if unknown.
    pub nodes: &'a [i32],
    /// The slaves that can send now.
    pub usable: u64,
    /// The slaves with CPUs set by hand: their interrupts say nothing.
    pub by_hand: u64,
}

impl Input<'_> {
    fn usable(&self) -> u64 {
        self.usable & SLAVES
    }

    fn set(&self, cpu: usize) -> u64 {
        word(self.set, cpu) & self.usable()
    }

    fn irq(&self, cpu: usize) -> u64 {
        word(self.irq, cpu) & self.usable() & !self.by_hand
    }

    /// The CPU, if the machine can have it.
    fn possible(&self, cpu: usize) -> Option<&Cpu> {
        self.cpus.get(cpu).filter(|place| place.possible)
    }

    /// The usable slaves whose device sits on `node`.
    fn devices(&self, node: i32) -> u64 {
        let mut slaves = 0;
        let mut bit = 1u64;

        for &device in self.nodes {
            if node >= 0 && device == node {
                slaves |= bit;
            }
            // Runs out to 0 past the last bit, and then adds nothing.
            bit = bit.wrapping_add(bit);
        }

        slaves & self.usable()
    }
}

/// Room for the slaves that are bound to each group of CPUs, as long as [`Input::cpus`].
#[derive(Debug)]
pub struct Scratch<'a> {
    /// By lowest CPU of the core.
    pub smt: &'a mut [u64],
    /// By lowest CPU of the last-level cache.
    pub llc: &'a mut [u64],
    /// By lowest CPU of the NUMA node.
    pub node: &'a mut [u64],
}

/// Decides for every possible CPU, in order, and tells `out` its number, entry and reason.
///
/// The nearest slaves win, in the order of [`Reason`]; slaves equally near share. Time is linear in
/// the number of CPUs.
pub fn build(
    input: &Input<'_>,
    scratch: &mut Scratch<'_>,
    mut out: impl FnMut(u32, Entry, Reason),
) {
    scratch.smt.fill(0);
    scratch.llc.fill(0);
    scratch.node.fill(0);

    let cpus = input.cpus.len();

    for cpu in 0..cpus {
        let Some(place) = input.possible(cpu) else {
            continue;
        };
        let bound = input.set(cpu) | input.irq(cpu);

        add(scratch.smt, group(place.smt, cpu, cpus), bound);
        add(scratch.llc, group(place.llc, cpu, cpus), bound);
        add(scratch.node, group(place.node_first, cpu, cpus), bound);
    }

    for cpu in 0..cpus {
        let Some(place) = input.possible(cpu) else {
            continue;
        };
        let rank = |slaves: u64, reason| (slaves != 0).then_some((slaves, reason));
        let smt = word(scratch.smt, group(place.smt, cpu, cpus));
        let llc = word(scratch.llc, group(place.llc, cpu, cpus));
        let node = word(scratch.node, group(place.node_first, cpu, cpus));

        let (slaves, reason) = rank(input.set(cpu), Reason::Set)
            .or_else(|| rank(input.irq(cpu), Reason::Irq))
            .or_else(|| rank(smt, Reason::Smt))
            .or_else(|| rank(llc, Reason::Llc))
            .or_else(|| rank(node | input.devices(place.node), Reason::Node))
            .unwrap_or((input.usable(), Reason::Any));

        // CPU numbers are 32 bits wide wherever they come from.
        out(cpu as u32, Entry::new(slaves, reason.is_local()), reason);
    }
}

/// The index that stands for the group which goes by CPU `first`: `cpu` itself if there is no such
/// CPU.
fn group(first: u32, cpu: usize, cpus: usize) -> usize {
    Some(first as usize)
        .filter(|&first| first < cpus)
        .unwrap_or(cpu)
}

fn word(words: &[u64], at: usize) -> u64 {
    words.get(at).copied().unwrap_or(0)
}

fn add(words: &mut [u64], at: usize, bits: u64) {
    if let Some(word) = words.get_mut(at) {
        *word |= bits;
    }
}
