// SPDX-License-Identifier: GPL-2.0

//! Which CPUs handle the interrupts of a slave's queues.
//!
//! Read from the interrupts' effective affinity. There is no event to wait for: an interrupt has
//! one `irq_affinity_notify`, and it belongs to the device's driver.
//!
//! A device may have vectors that serve no queue, for configuration or errors, which say nothing of
//! where packets are handled. The queues' vectors are, by the first of these that finds any:
//!
//! 1. those that the driver has named to its NAPI instances;
//! 2. the device's vectors for which the driver has hinted at an affinity, or has the kernel manage
//!    it, as drivers do for queues only;
//! 3. all of the device's vectors;
//! 4. its INTx.

use super::bond::{CpuSet, Slave};
use core::{
    ops::ControlFlow,
    ptr::{self, addr_of, NonNull},
};
use kernel::{
    bindings,
    container_of,
    prelude::*,
    sync::rcu, //
};

/// MSI indices may have holes; the rest of the 2048 that MSI-X can have is not searched behind one
/// as large as this.
const MSI_HOLE: u32 = 64;

/// The highest index that MSI-X can have.
const MSI_MAX: u32 = 2047;

/// How many devices up from the net device its interrupts may be: a virtio device on PCI is two.
const MAX_DEPTH: u32 = 8;

/// Calls `found` for each CPU that handles interrupts of the slave's queues, maybe repeatedly.
pub(crate) fn for_each_cpu(slave: Slave<'_>, mut found: impl FnMut(u32)) {
    let mut any = false;

    for &irq in slave.napi_irqs() {
        any |= with_irq(irq, |irq| irq.effective_cpus(&mut found)).is_some();
    }
    if any {
        return;
    }

    let Some((device, first)) = interrupting_device(slave) else {
        return;
    };
    for_each_vector(device, first, |irq| {
        with_irq(irq, |irq| {
            if irq.is_hinted() {
                any = true;
                irq.effective_cpus(&mut found);
            }
        });
    });
    if any {
        return;
    }

    for_each_vector(device, first, |irq| {
        with_irq(irq, |irq| irq.effective_cpus(&mut found));
    });
}

/// The nearest device up from the net device that has interrupts, and the index of one if they are
/// MSI.
fn interrupting_device(slave: Slave<'_>) -> Option<(NonNull<bindings::device>, Option<u32>)> {
    let mut dev = slave.parent()?;

    for _ in 0..MAX_DEPTH {
        if let Some(index) = (0..MSI_HOLE).find(|&index| msi_irq(dev, index).is_some()) {
            return Some((dev, Some(index)));
        }
        // What is further up interrupts for more than this device: a bridge, for its hotplug.
        if is_pci(dev) {
            return Some((dev, None));
        }
        // SAFETY: `dev` is valid: the device below, at first the slave's, holds a reference to it
        // for as long as it is registered.
        dev = NonNull::new(unsafe { addr_of!((*dev.as_ptr()).parent).read() })?;
    }
    None
}

fn is_pci(dev: NonNull<bindings::device>) -> bool {
    // SAFETY: `dev` is valid, see `interrupting_device`; its bus doesn't change while it is
    // registered.
    let bus = unsafe { addr_of!((*dev.as_ptr()).bus).read() };

    ptr::eq(bus, addr_of!(bindings::pci_bus_type))
}

/// Calls `found` for each vector of the device: its MSIs, of which `first` is one, or its INTx.
fn for_each_vector(dev: NonNull<bindings::device>, first: Option<u32>, mut found: impl FnMut(u32)) {
    let Some(first) = first else {
        // SAFETY: `interrupting_device` returns no device without MSI that is not PCI's, and those
        // are the `dev` of a `pci_dev`.
        let pci = unsafe { container_of!(dev.as_ptr(), bindings::pci_dev, dev) };
        // SAFETY: It is as valid as `dev`.
        let irq = unsafe { addr_of!((*pci).irq).read() };

        found(irq);
        return;
    };

    // The last index at which a vector was found has to stay near.
    let _ = (first..=MSI_MAX).try_fold(first, |last, index| match msi_irq(dev, index) {
        Some(irq) => {
            found(irq);
            ControlFlow::Continue(index)
        }
        None if index.wrapping_sub(last) < MSI_HOLE => ControlFlow::Continue(last),
        None => ControlFlow::Break(()),
    });
}

/// The interrupt at MSI index `index` of the device.
fn msi_irq(dev: NonNull<bindings::device>, index: u32) -> Option<u32> {
    // SAFETY: `dev` is valid, see `interrupting_device`, and its MSI data stays for as long as its
    // driver is bound, hence while the net device is enslaved. May sleep, as an update may.
    let irq = unsafe {
        bindings::msi_domain_get_virq(
            dev.as_ptr(),
            bindings::msi_domain_ids_MSI_DEFAULT_DOMAIN,
            index,
        )
    };

    (irq != 0).then_some(irq)
}

/// An interrupt's descriptor, within an RCU read side critical section.
struct Irq(NonNull<bindings::irq_desc>);

/// Calls `f` with the descriptor of interrupt `irq`, if there is one.
fn with_irq<R>(irq: u32, f: impl FnOnce(&Irq) -> R) -> Option<R> {
    let _rcu = rcu::read_lock();
    // SAFETY: Takes any number.
    let data = NonNull::new(unsafe { bindings::irq_get_irq_data(irq) })?;
    // SAFETY: It is the `irq_data` of an `irq_desc`, which is freed a grace period after it was
    // taken out of the table that it was found in.
    let desc = unsafe { container_of!(data.as_ptr(), bindings::irq_desc, irq_data) };

    NonNull::new(desc).map(|desc| f(&Irq(desc)))
}

impl Irq {
    /// Whether the driver has said by which CPUs it wants the interrupt to be handled.
    fn is_hinted(&self) -> bool {
        let desc = self.0.as_ptr();
        // SAFETY: `desc` is valid while `self` is; the pointer is compared, not followed.
        let hint = unsafe { addr_of!((*desc).affinity_hint).read_volatile() };
        // SAFETY: As above.
        let state =
            unsafe { addr_of!((*desc).irq_common_data.state_use_accessors).read_volatile() };

        !hint.is_null() || state & bindings::IRQD_AFFINITY_MANAGED != 0
    }

    /// The CPU that the interrupt will go to when it has fired once more. Some chips, MSI-X without
    /// interrupt remapping among them, move it only then, which on an idle slave may be never.
    fn pending_cpu(&self) -> Option<u32> {
        let desc = self.0.as_ptr();
        // SAFETY: `desc` is valid while `self` is.
        let state =
            unsafe { addr_of!((*desc).irq_common_data.state_use_accessors).read_volatile() };

        if state & bindings::IRQD_SETAFFINITY_PENDING == 0 {
            return None;
        }
        // SAFETY: As above, and its masks are allocated and freed with it.
        #[cfg(CONFIG_GENERIC_PENDING_IRQ)]
        let cpus = unsafe { mask(addr_of!((*desc).pending_mask).cast()) };
        #[cfg(not(CONFIG_GENERIC_PENDING_IRQ))]
        let cpus: Option<CpuSet<'_>> = None;
        let mut cpus = cpus?.iter();

        // Of several, the chip is yet to choose.
        match (cpus.next(), cpus.next()) {
            (cpu, None) => cpu,
            _ => None,
        }
    }

    /// Calls `found` for each CPU that the interrupt goes to now, or is about to.
    fn effective_cpus(&self, mut found: impl FnMut(u32)) {
        let desc = self.0.as_ptr();
        let mut any = false;

        if let Some(cpu) = self.pending_cpu() {
            found(cpu);
            return;
        }

        // SAFETY: `desc` is valid while `self` is, and its masks are allocated and freed with it.
        let effective =
            unsafe { mask(addr_of!((*desc).irq_common_data.effective_affinity).cast()) };
        if let Some(cpus) = effective {
            cpus.iter().for_each(|cpu| {
                any = true;
                found(cpu);
            });
        }
        if any {
            return;
        }

        // Its chip doesn't tell: C's `irq_data_get_effective_affinity_mask()` does the same.
        // SAFETY: As above.
        let affinity = unsafe { mask(addr_of!((*desc).irq_common_data.affinity).cast()) };
        if let Some(cpus) = affinity {
            cpus.iter().for_each(found);
        }
    }
}

/// The set in a `cpumask_var_t`, which is a mask or a pointer to one.
///
/// # Safety
///
/// `var` is valid, as is what it points to, for `'a`.
unsafe fn mask<'a>(var: *const c_void) -> Option<CpuSet<'a>> {
    let bits = if cfg!(CONFIG_CPUMASK_OFFSTACK) {
        // SAFETY: It is a pointer then, by the requirement valid to read.
        unsafe { var.cast::<*mut usize>().read() }
    } else {
        var.cast_mut().cast()
    };

    // SAFETY: A `struct cpumask` is a bitmap of `nr_cpu_ids` bits at least.
    NonNull::new(bits).map(|bits| unsafe { CpuSet::new(bits) })
}
