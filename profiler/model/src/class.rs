//! What a function's work is part of, by its name.

use crate::context::Place;
use crate::symbols::Symbol;
use serde::{Deserialize, Serialize};

/// What work is part of. Never mixed: each has rows and sums of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// The way of a packet or request through the kernel.
    Path,
    /// Waiting for a lock in its slow path. How long depends on the host's scheduling.
    Spin,
    /// Scheduler, idle, timers, RCU, and the kernel's own worker threads.
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

/// Slow paths of locks: what they run depends on how long the holder takes.
const SPIN: &[&str] = &[
    "native_queued_spin_lock_slowpath",
    "__pv_queued_spin_lock_slowpath",
    "queued_spin_lock_slowpath",
    "queued_read_lock_slowpath",
    "queued_write_lock_slowpath",
    "resilient_queued_spin_lock_slowpath",
    "resilient_tas_spin_lock",
    "osq_lock",
    "mutex_spin_on_owner",
    "__mutex_lock",
    "__ww_mutex_lock",
    "rwsem_spin_on_owner",
    "rwsem_optimistic_spin",
    "rwsem_down_read_slowpath",
    "rwsem_down_write_slowpath",
];

/// Beginnings of names. The read side of RCU and what a path calls to wait or to be woken
/// by are not here. What these call, whatever its name, is theirs: see [`crate::calls`].
const SCHED: &[&str] = &[
    "schedule",
    "__schedule",
    "preempt_schedule",
    "__sched_",
    "sched_balance",
    "sched_tick",
    "sched_ttwu",
    "sched_core",
    "newidle_balance",
    "nohz_",
    "enqueue_task",
    "enqueue_entity",
    "enqueue_rt_",
    "enqueue_dl_",
    "enqueue_pushable",
    "enqueue_hrtimer",
    "__enqueue_",
    "dequeue_task",
    "dequeue_entit",
    "dequeue_rt_",
    "dequeue_dl_",
    "dequeue_pushable",
    "__dequeue_",
    "__pick_",
    "pick_next_",
    "pick_task",
    "pick_eevdf",
    "put_prev_",
    "set_next_",
    "select_task_rq",
    "select_idle",
    "update_curr",
    "update_load_avg",
    "update_rq_",
    "update_cfs_",
    "update_min_vruntime",
    "update_se",
    "update_entity_lag",
    "update_other_load_avgs",
    "update_irq_load_avg",
    "__update_load_avg",
    "reweight_",
    "place_entity",
    "avg_vruntime",
    "entity_eligible",
    "vruntime_eligible",
    "attach_entity",
    "detach_entity",
    "try_to_wake_up",
    "ttwu_",
    "wakeup_preempt",
    "check_preempt",
    "resched_",
    "raw_spin_rq_",
    "task_rq_lock",
    "__task_rq_lock",
    "finish_task_switch",
    "prepare_task_switch",
    "__switch_to",
    "switch_mm",
    "migrate_task_rq",
    "set_task_cpu",
    "psi_",
    "dl_server",
    "update_dl_",
    "do_idle",
    "cpu_startup_entry",
    "cpuidle_",
    "call_cpuidle",
    "default_idle",
    "arch_cpu_idle",
    "acpi_idle",
    "acpi_safe_halt",
    "native_safe_halt",
    "pv_native_safe_halt",
    "choose_idle_cpu",
    "available_idle_cpu",
    "hrtick",
    "tick_",
    "hrtimer_",
    "__hrtimer_",
    "clockevents_",
    "rcu_core",
    "rcu_gp_",
    "rcu_report_",
    "rcu_note_context_switch",
    "rcu_sched_clock_irq",
    "rcu_do_batch",
    "rcu_qs",
    "note_gp_changes",
    "__note_gp_changes",
];

/// Softirq work that is not the network's.
const OTHER_SOFTIRQ: &[&str] = &[
    "run_timer_softirq",
    "hrtimer_run_softirq",
    "rcu_core_si",
    "sched_balance_softirq",
    "tasklet_action",
    "tasklet_hi_action",
    "blk_done_softirq",
    "irq_poll_softirq",
];

/// Functions that only the kernel's own threads run.
const HOUSEKEEPING: &[&str] = &[
    "do_idle",
    "cpu_startup_entry",
    "worker_thread",
    "process_one_work",
    "rescuer_thread",
    "rcu_gp_kthread",
    "rcu_nocb_cb_kthread",
    "rcu_tasks_kthread",
    "smpboot_thread_fn",
    "kthread_worker_fn",
    "kcompactd",
    "kdamond_fn",
    "kswapd",
    "khugepaged",
    "oom_reaper",
];

/// Where interrupts and exceptions return from. An `iret` elsewhere only synchronises.
const RETURNS: &[&str] = &[
    "common_interrupt_return",
    "native_irq_return_iret",
    "native_iret",
    "irq_return_iret",
    "restore_regs_and_return_to_kernel",
    "swapgs_restore_regs_and_return_to_usermode",
    "asm_exc_nmi",
    "end_repeat_nmi",
    "first_nmi",
    "nmi_restore",
];

/// Without what the compiler appended.
fn base_name(name: &str) -> &str {
    name.split_once('.').map_or(name, |(base, _)| base)
}

/// The class of a function by itself, whatever it is called from.
pub fn class_of(symbol: &Symbol) -> Class {
    let name = base_name(&symbol.name);
    if symbol.module.as_deref() == Some("pktgen") {
        Class::Generator
    } else if SPIN.contains(&name) {
        Class::Spin
    } else if symbol.module.is_none() && SCHED.iter().any(|begin| name.starts_with(begin)) {
        Class::Sched
    } else {
        Class::Path
    }
}

/// What a block in a function means for where its CPU is. `entry`: it begins the function;
/// `iret`: it ends with that instruction.
pub fn place_of(symbol: &Symbol, entry: bool, iret: bool) -> Place {
    let name = base_name(&symbol.name);
    if symbol.module.as_deref() == Some("pktgen") {
        Place::Generator
    } else if symbol.module.is_some() {
        Place::Plain
    } else if entry
        && (name.starts_with("asm_sysvec_")
            || name.starts_with("asm_exc_")
            || matches!(name, "asm_common_interrupt" | "asm_spurious_interrupt"))
    {
        Place::Interrupt
    } else if iret && RETURNS.contains(&name) {
        Place::Return
    } else if entry && matches!(name, "net_rx_action" | "net_tx_action") {
        Place::NetSoftirq
    } else if entry && OTHER_SOFTIRQ.contains(&name) {
        Place::OtherSoftirq
    } else if entry && name == "ret_from_fork_asm" {
        Place::NewTask
    } else if matches!(name, "handle_softirqs" | "__do_softirq") {
        Place::Dispatcher
    } else if HOUSEKEEPING.contains(&name) {
        Place::Housekeeping
    } else {
        Place::Plain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbol(name: &str, module: Option<&str>) -> Symbol {
        Symbol {
            address: 1,
            name: name.to_owned(),
            module: module.map(str::to_owned),
        }
    }

    #[test]
    fn functions_have_their_class_by_name() {
        for (name, module, class) in [
            ("native_queued_spin_lock_slowpath", None, Class::Spin),
            ("_raw_spin_lock", None, Class::Path),
            ("__mutex_lock.constprop.0", None, Class::Spin),
            ("__schedule", None, Class::Sched),
            ("schedule_work", Some("anything"), Class::Path),
            ("__rcu_read_lock", None, Class::Path),
            ("tick_nohz_handler", None, Class::Sched),
            ("__dequeue_task", None, Class::Sched),
            ("enqueue_to_backlog", None, Class::Path),
            ("pktgen_xmit", Some("pktgen"), Class::Generator),
            ("bond_start_xmit", Some("bonding"), Class::Path),
        ] {
            assert_eq!(class_of(&symbol(name, module)), class, "{name}");
        }
        for class in Class::ALL {
            assert_eq!(Class::ALL[class as usize], class);
        }
    }

    #[test]
    fn an_entry_is_one_only_at_the_functions_beginning() {
        let timer = symbol("asm_sysvec_apic_timer_interrupt", None);
        assert_eq!(place_of(&timer, true, false), Place::Interrupt);
        assert_eq!(place_of(&timer, false, false), Place::Plain);
        let back = symbol("native_irq_return_iret", None);
        assert_eq!(place_of(&back, true, true), Place::Return);
        assert_eq!(place_of(&back, true, false), Place::Plain);
        // This one only synchronises the core.
        assert_eq!(
            place_of(&symbol("do_sync_core", None), false, true),
            Place::Plain
        );
        assert_eq!(
            place_of(&symbol("net_rx_action", None), true, false),
            Place::NetSoftirq
        );
        assert_eq!(
            place_of(&symbol("ret_from_fork_asm", None), true, false),
            Place::NewTask
        );
        assert_eq!(
            place_of(&symbol("handle_softirqs", None), false, false),
            Place::Dispatcher
        );
    }
}
