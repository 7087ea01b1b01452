// SPDX-License-Identifier: GPL-2.0

//! The seam: a safe trait for bonding transmit policies.
//!
//! C header: `include/net/bond_xmit.h`. The C side is `drivers/net/bonding/bond_xmit.c`, with the
//! packet path in `bond_xmit_policy_slave_get()` of `bond_main.c`.

use super::bindings;
use core::{
    ffi::CStr,
    marker::PhantomData,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};
use kernel::{
    alloc::{AllocError, KVVec},
    error::to_result,
    prelude::*,
    types::ForeignOwnable,
};

/// By which slave to send.
#[derive(Clone, Copy)]
pub(crate) struct Selection(u32);

impl Selection {
    /// Several slaves rank equal: ask [`TransmitPolicy::spread`]. In [`Choices`] only.
    pub(crate) const SPREAD: Self = Self(bindings::BOND_XMIT_SPREAD);

    /// Usable slave `index`; `local` if it is one of those bound to the CPU. C takes an index that
    /// is too large modulo the number of slaves.
    #[inline]
    pub(crate) const fn slave(index: u32, local: bool) -> Self {
        let local = if local { bindings::BOND_XMIT_LOCAL } else { 0 };

        Self((index & bindings::BOND_XMIT_INDEX) | local)
    }
}

/// In a cache line of 64 bytes.
const CHOICES_IN_LINE: usize = 16;

/// By CPU: by which slave to send. C reads it for every frame, on any CPU, at any time.
///
/// # Invariants
///
/// There are `nr_cpu_ids` of them, and they stay where they are.
pub(crate) struct Choices(KVVec<AtomicU32>);

impl Choices {
    /// All [`Selection::SPREAD`].
    pub(crate) fn new() -> Result<Self, AllocError> {
        let cpus = kernel::cpu::nr_cpu_ids() as usize;
        // Whole cache lines, which are then nobody else's: a neighbour in a small slab would have
        // each of its stores cost every CPU the line.
        let lines = cpus.div_ceil(CHOICES_IN_LINE).wrapping_mul(CHOICES_IN_LINE);
        let mut choices = KVVec::with_capacity(lines, GFP_KERNEL)?;

        for _ in 0..cpus {
            choices
                .push_within_capacity(AtomicU32::new(Selection::SPREAD.0))
                .map_err(|_| AllocError)?;
        }
        // INVARIANT: Just counted, and nothing is added or taken away any more.
        Ok(Self(choices))
    }

    /// Has frames of `cpu` take another slave. Stored only if it differs, so that the lines stay
    /// shared by all CPUs.
    pub(crate) fn set(&self, cpu: u32, selection: Selection) {
        if let Some(choice) = self.0.get(cpu as usize) {
            if choice.load(Relaxed) != selection.0 {
                choice.store(selection.0, Relaxed);
            }
        }
    }
}

/// What a CPU may send by, and why.
pub(crate) struct Lookup {
    /// Bit *i* is usable slave *i*.
    pub(crate) slaves: u64,
    /// One word.
    pub(crate) reason: &'static CStr,
}

/// A policy, as one bond uses it.
///
/// `Sync`, because packets are sent while the control path updates.
pub(crate) trait TransmitPolicy: Send + Sync + Sized + 'static {
    /// The name by which a bond asks for the policy.
    const NAME: &'static CStr;

    /// A bond starts to use the policy. RTNL is held.
    fn attach() -> Result<Pin<KBox<Self>>>;

    /// The usable slaves, or anything about them, may have changed. RTNL is held; may sleep. Called
    /// about once a second besides.
    fn update(&self, slaves: Slaves<'_>) -> Result;

    /// By which slaves packets are sent: always the same table, whatever is in it.
    fn choices(&self) -> &Choices;

    /// The slave for a packet that is sent on `cpu`, where the table has [`Selection::SPREAD`]:
    /// `hash` tells flows apart. On the packet path, preemptible at times.
    fn spread(&self, cpu: u32, hash: u32) -> Selection;

    /// What is chosen from on `cpu`. RTNL is held.
    fn lookup(&self, cpu: u32) -> Lookup;
}

/// The usable slaves of a bond, for the time of an update.
#[derive(Clone, Copy)]
pub(crate) struct Slaves<'a>(&'a [bindings::bond_xmit_slave]);

impl<'a> Slaves<'a> {
    /// The slaves in the order of their indices.
    pub(crate) fn iter(self) -> impl Iterator<Item = Slave<'a>> {
        self.0.iter().map(Slave)
    }
}

/// A usable slave, for the time of an update: having one means that RTNL is held and the device is
/// enslaved, so its driver is bound.
#[derive(Clone, Copy)]
pub(crate) struct Slave<'a>(&'a bindings::bond_xmit_slave);

impl<'a> Slave<'a> {
    /// The device under the net device, if it has one.
    pub(crate) fn parent(self) -> Option<NonNull<kernel::bindings::device>> {
        NonNull::new(self.0.parent)
    }

    /// The interrupts that the driver has named to its NAPI instances.
    pub(crate) fn napi_irqs(self) -> &'a [u32] {
        if self.0.nr_irqs == 0 {
            return &[];
        }
        // SAFETY: `bond_xmit_napi_irqs()` has allocated and filled in `nr_irqs` of them, which
        // `__bond_xmit_update()` frees after the update.
        unsafe { core::slice::from_raw_parts(self.0.irqs, self.0.nr_irqs as usize) }
    }

    /// The CPUs that were set by hand, if any were.
    pub(crate) fn cpus(self) -> Option<CpuSet<'a>> {
        let bits = NonNull::new(self.0.cpus.cast_mut())?;

        // SAFETY: `__bond_xmit_update()` passes `slave->xmit_cpus`, a `struct cpumask` that only
        // `bond_xmit_set_cpus()` frees, under RTNL, which is held for as long as `self` lives.
        Some(unsafe { CpuSet::new(bits) })
    }

    /// The NUMA node of the device, or -1.
    pub(crate) fn node(self) -> i32 {
        self.0.node
    }
}

/// A C bitmap of CPUs. It may change while it is read.
#[derive(Clone, Copy)]
pub(crate) struct CpuSet<'a> {
    bits: NonNull<usize>,
    _life: PhantomData<&'a usize>,
}

impl<'a> CpuSet<'a> {
    /// # Safety
    ///
    /// `bits` is the first word of a bitmap of at least `nr_cpu_ids` bits, valid for `'a`.
    pub(crate) unsafe fn new(bits: NonNull<usize>) -> Self {
        Self {
            bits,
            _life: PhantomData,
        }
    }

    /// The CPUs in the set, lowest first.
    pub(crate) fn iter(self) -> impl Iterator<Item = u32> + 'a {
        let cpus = kernel::cpu::nr_cpu_ids();

        (0..cpus.div_ceil(usize::BITS))
            .flat_map(move |word| {
                // SAFETY: In bounds, as there are `nr_cpu_ids` bits by the requirement of `new`.
                let bits = unsafe { self.bits.add(word as usize) };
                // SAFETY: Valid by the requirement of `new`. Volatile, for others may write it: an
                // aligned word is read whole, as by C's `READ_ONCE()`.
                let mut bits = unsafe { bits.read_volatile() };

                core::iter::from_fn(move || {
                    let bit = bits.trailing_zeros();

                    // Clears the lowest bit; 0 stays 0.
                    bits &= bits.wrapping_sub(1);
                    (bit < usize::BITS).then(|| word.wrapping_mul(usize::BITS).wrapping_add(bit))
                })
            })
            .filter(move |&cpu| cpu < cpus)
    }
}

/// Where a CPU sits. What is a group goes by the lowest CPU number in it.
pub(crate) fn cpu_topology(cpu: u32) -> super::map::Cpu {
    let mut c = bindings::bond_xmit_cpu::default();

    // SAFETY: The function fills in what it is given, and takes any CPU number.
    unsafe { bindings::bond_xmit_cpu(cpu, &mut c) };

    super::map::Cpu {
        possible: c.possible,
        smt: c.smt,
        llc: c.llc,
        node_first: c.node_cpu,
        node: c.node,
    }
}

/// The functions that C calls, for policy `P`.
///
/// A state pointer is what [`Adapter::attach`] returned and [`Adapter::detach`] hasn't taken back;
/// in between it is only borrowed.
struct Adapter<P>(PhantomData<P>);

impl<P: TransmitPolicy> Adapter<P> {
    /// # Safety
    ///
    /// Called by `bond_xmit_alloc()` only, with RTNL held.
    unsafe extern "C" fn attach() -> *mut c_void {
        match P::attach() {
            Ok(state) => state.into_foreign(),
            Err(e) => e.to_ptr(),
        }
    }

    /// # Safety
    ///
    /// Called by `bond_xmit_free()` only, with RTNL held, after `synchronize_net()` if the bond has
    /// used the policy. It does not pass `state` to any function after that.
    unsafe extern "C" fn detach(state: *mut c_void) {
        // SAFETY: By the above, `state` is from `attach` and nobody borrows it any more.
        drop(unsafe { <Pin<KBox<P>>>::from_foreign(state) });
    }

    /// # Safety
    ///
    /// Called by `__bond_xmit_update()` only, with RTNL held, which keeps the slaves, and `detach`
    /// away. `slaves` are `count` slaves; it isn't NULL, but may be `ZERO_SIZE_PTR` if there are
    /// none.
    unsafe extern "C" fn update(
        state: *mut c_void,
        slaves: *const bindings::bond_xmit_slave,
        count: c_uint,
    ) -> c_int {
        let slaves = if count == 0 {
            &[]
        } else {
            // SAFETY: By the above, and they are not written to before we return.
            unsafe { core::slice::from_raw_parts(slaves, count as usize) }
        };
        // SAFETY: `state` is from `attach`, and `detach` waits for RTNL.
        let policy = unsafe { <Pin<KBox<P>>>::borrow(state) };

        match policy.update(Slaves(slaves)) {
            Ok(()) => 0,
            Err(e) => e.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Called by `bond_xmit_alloc()` only, with RTNL held. It reads what is returned until it calls
    /// `detach`.
    unsafe extern "C" fn choices(state: *const c_void) -> *const u32 {
        // SAFETY: `state` is from `attach`.
        let policy = unsafe { <Pin<KBox<P>>>::borrow(state.cast_mut()) };

        // The table is a part of the policy, which `detach` drops. Relaxed loads are what C does to
        // it (`READ_ONCE()`), up to `nr_cpu_ids`: there are as many by its invariant.
        policy.get_ref().choices().0.as_ptr().cast()
    }

    /// # Safety
    ///
    /// Called by `bond_xmit_policy_slave_get_slow()` only, within `rcu_read_lock()`.
    unsafe extern "C" fn spread(
        state: *const c_void,
        cpu: c_uint,
        _count: c_uint,
        hash: u32,
    ) -> u32 {
        // SAFETY: `state` is from `attach`; `detach` comes a grace period after the bond has let go
        // of it.
        let policy = unsafe { <Pin<KBox<P>>>::borrow(state.cast_mut()) };

        policy.spread(cpu, hash).0
    }

    /// # Safety
    ///
    /// Called by `bond_xmit_seq_cpu()` only, with RTNL held. `choice` is valid for a write.
    unsafe extern "C" fn lookup(
        state: *const c_void,
        cpu: c_uint,
        choice: *mut bindings::bond_xmit_choice,
    ) {
        // SAFETY: `state` is from `attach`, and `detach` waits for RTNL.
        let policy = unsafe { <Pin<KBox<P>>>::borrow(state.cast_mut()) };
        let Lookup { slaves, reason } = policy.lookup(cpu);

        // SAFETY: By the above.
        unsafe {
            choice.write(bindings::bond_xmit_choice {
                slaves,
                reason: reason.as_char_ptr(),
            })
        };
    }
}

/// Keeps policy `P` registered for as long as it lives.
pub(crate) struct Registration<P: TransmitPolicy> {
    /// What C has the address of; freed after it has forgotten it.
    ops: KBox<bindings::bond_xmit_ops>,
    _policy: PhantomData<fn() -> P>,
}

// SAFETY: `ops` is constant, and it is pointers to a module and functions, which may be used on any
// thread.
unsafe impl<P: TransmitPolicy> Send for Registration<P> {}
// SAFETY: As above; there is nothing to do with a shared reference.
unsafe impl<P: TransmitPolicy> Sync for Registration<P> {}

impl<P: TransmitPolicy> Registration<P> {
    /// Registers the policy as one of `module`'s.
    ///
    /// `EEXIST` if there is one of that name, `EPROTO` if the bonding driver has another ABI.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Self> {
        let ops = KBox::new(
            bindings::bond_xmit_ops {
                abi: bindings::BOND_XMIT_ABI,
                flags: bindings::BOND_XMIT_F_POLL,
                name: P::NAME.as_char_ptr(),
                owner: module.as_ptr(),
                attach: Some(Adapter::<P>::attach),
                detach: Some(Adapter::<P>::detach),
                update: Some(Adapter::<P>::update),
                choices: Some(Adapter::<P>::choices),
                spread: Some(Adapter::<P>::spread),
                lookup: Some(Adapter::<P>::lookup),
            },
            GFP_KERNEL,
        )?;

        // SAFETY: All members are set, to functions that are as the header describes them. `ops`
        // stays where it is until `drop` has unregistered it.
        to_result(unsafe { bindings::bond_xmit_register(ptr::from_ref(&*ops)) })?;

        Ok(Self {
            ops,
            _policy: PhantomData,
        })
    }
}

impl<P: TransmitPolicy> Drop for Registration<P> {
    fn drop(&mut self) {
        // SAFETY: It was registered by `new`, and `ops` has not moved. No bond uses it: each that
        // does holds a reference to the module, which we only get here without. For that,
        // `Registration::new()` has to be the last thing in the module's init that can fail: a bond
        // may find the policy from then on.
        unsafe { bindings::bond_xmit_unregister(ptr::from_ref(&*self.ops)) };
    }
}
