//! What a CPU is at: which task, in which interrupt, in which softirq. From the blocks it
//! runs, one after the other; no registers, no stack.

use crate::calls::{Calls, Step};
use crate::class::Class;

/// What a block of instructions means for where its CPU is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Place {
    /// Nothing.
    #[default]
    Plain,
    /// User space: whatever interrupts there were have returned.
    User,
    /// Entry of an interrupt or exception.
    Interrupt,
    /// Ends with the return from one.
    Return,
    /// Entry of the network's softirq work.
    NetSoftirq,
    /// Entry of other softirq work: timers, RCU, balancing.
    OtherSoftirq,
    /// The dispatcher of softirqs: whichever ran has returned.
    Dispatcher,
    /// The kernel's own threads: idle, workers.
    Housekeeping,
    /// A generator in the kernel.
    Generator,
    /// Where the generator hands its packet over.
    PathEntry,
    /// Where a task begins. Its memory may have been that of one that ended.
    NewTask,
}

impl Place {
    /// All, by number.
    pub const ALL: [Self; 11] = [
        Self::Plain,
        Self::User,
        Self::Interrupt,
        Self::Return,
        Self::NetSoftirq,
        Self::OtherSoftirq,
        Self::Dispatcher,
        Self::Housekeeping,
        Self::Generator,
        Self::PathEntry,
        Self::NewTask,
    ];
}

/// Which softirq work runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Softirq {
    #[default]
    None,
    Net,
    Other,
}

/// What runs in a task itself, or in one of its interrupts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Level {
    softirq: Softirq,
    scheduler: Calls,
}

/// Where a task is. Goes with the task when it is switched out: an interrupt may end in a
/// switch to another task, and return when the first one runs again, on another CPU even.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Task {
    base: Level,
    /// The innermost last.
    interrupts: Vec<Level>,
    /// The return runs in this block; the interrupt is over in the next.
    returning: bool,
    housekeeping: bool,
    generating: bool,
}

impl Task {
    /// The task runs a block. Returns what the block is part of.
    pub fn enter(&mut self, place: Place, step: Step) -> Class {
        let own = step.own;
        if std::mem::take(&mut self.returning) {
            // More returns than entries: the entry was before the region.
            self.interrupts.pop();
        }
        match place {
            Place::Plain => {}
            Place::User => {
                self.interrupts.clear();
                self.base.softirq = Softirq::None;
                self.base.scheduler.clear();
                // The kernel's own threads never are here; one that was taken for such is none.
                self.housekeeping = false;
                return Class::User;
            }
            Place::Interrupt => self.interrupts.push(Level::default()),
            Place::Return => self.returning = true,
            Place::NetSoftirq => self.level().softirq = Softirq::Net,
            Place::OtherSoftirq => self.level().softirq = Softirq::Other,
            Place::Dispatcher => self.level().softirq = Softirq::None,
            Place::Housekeeping => self.housekeeping |= self.interrupts.is_empty(),
            Place::Generator => self.generating |= self.interrupts.is_empty(),
            Place::PathEntry => self.generating &= !self.interrupts.is_empty(),
            Place::NewTask => *self = Self::default(),
        }
        let level = self.level();
        let (softirq, scheduler) = (level.softirq, level.scheduler.step(step));
        let own = match own {
            Class::Path if scheduler => Class::Sched,
            own => own,
        };
        match (self.interrupts.is_empty(), softirq) {
            (_, Softirq::Net) => own,
            (false, _) | (true, Softirq::Other) => Class::Irq,
            (true, Softirq::None) if own != Class::Path => own,
            (true, Softirq::None) if self.housekeeping => Class::Sched,
            (true, Softirq::None) if self.generating => Class::Generator,
            (true, Softirq::None) => Class::Path,
        }
    }

    /// How deep in interrupts it is.
    pub fn depth(&self) -> usize {
        self.interrupts.len()
    }

    fn level(&mut self) -> &mut Level {
        self.interrupts.last_mut().unwrap_or(&mut self.base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each block begins a function of its own.
    fn step(function: u32, own: Class) -> Step {
        Step {
            function,
            entry: true,
            own,
        }
    }

    fn run(task: &mut Task, places: &[Place]) -> Vec<Class> {
        (0..)
            .zip(places)
            .map(|(function, &place)| task.enter(place, step(function, Class::Path)))
            .collect()
    }

    #[test]
    fn an_interrupt_is_apart_up_to_and_with_its_return() {
        use Class::{Irq, Path};
        use Place::{Interrupt, Plain, Return};
        assert_eq!(
            run(
                &mut Task::default(),
                &[
                    Plain, Interrupt, Plain, Interrupt, Return, Plain, Return, Plain
                ]
            ),
            [Path, Irq, Irq, Irq, Irq, Irq, Irq, Path]
        );
    }

    #[test]
    fn the_networks_softirq_in_an_interrupt_is_the_path() {
        use Class::{Irq, Path};
        use Place::{Dispatcher, Interrupt, NetSoftirq, OtherSoftirq, Plain, Return};
        assert_eq!(
            run(
                &mut Task::default(),
                &[
                    Interrupt,
                    Dispatcher,
                    OtherSoftirq,
                    Plain,
                    Dispatcher,
                    NetSoftirq,
                    Plain,
                    // One interrupt more, in the softirq.
                    Interrupt,
                    Return,
                    Plain,
                    Dispatcher,
                    Return,
                    Plain
                ]
            ),
            [
                Irq, Irq, Irq, Irq, Irq, Path, Path, Irq, Irq, Path, Irq, Irq, Path
            ]
        );
    }

    #[test]
    fn user_space_is_in_no_interrupt() {
        let mut task = Task::default();
        run(&mut task, &[Place::Interrupt, Place::Interrupt]);
        assert_eq!(task.depth(), 2);
        assert_eq!(
            run(&mut task, &[Place::User, Place::Plain]),
            [Class::User, Class::Path]
        );
        assert_eq!(task.depth(), 0);
    }

    #[test]
    fn a_task_with_user_space_is_no_kernel_thread() {
        use Class::{Path, Sched, User};
        assert_eq!(
            run(
                &mut Task::default(),
                &[Place::Housekeeping, Place::Plain, Place::User, Place::Plain]
            ),
            [Sched, Sched, User, Path]
        );
    }

    #[test]
    fn a_new_task_is_not_the_one_whose_memory_it_has() {
        let mut task = Task::default();
        run(&mut task, &[Place::Housekeeping, Place::Interrupt]);
        task.enter(Place::Plain, step(9, Class::Sched));
        assert_eq!(
            run(&mut task, &[Place::NewTask, Place::Plain]),
            [Class::Path, Class::Path]
        );
        assert_eq!(task.depth(), 0);
    }

    #[test]
    fn a_return_with_no_entry_changes_nothing() {
        let mut task = Task::default();
        assert_eq!(
            run(&mut task, &[Place::Return, Place::Plain]),
            [Class::Path, Class::Path]
        );
    }

    #[test]
    fn the_generator_has_what_it_calls_until_the_packet_is_handed_over() {
        use Class::{Generator, Irq, Path};
        assert_eq!(
            run(
                &mut Task::default(),
                &[
                    Place::Generator,
                    Place::Plain,
                    Place::Interrupt,
                    // An interrupt's own packets are not the generator's.
                    Place::PathEntry,
                    Place::Return,
                    Place::Plain,
                    Place::PathEntry,
                    Place::Plain,
                    Place::Generator,
                ]
            ),
            [
                Generator, Generator, Irq, Irq, Irq, Generator, Path, Path, Generator
            ]
        );
    }

    #[test]
    fn waiting_for_a_lock_is_apart_for_the_generator_too() {
        let mut task = Task::default();
        task.enter(Place::Generator, step(1, Class::Path));
        assert_eq!(task.enter(Place::Plain, step(2, Class::Spin)), Class::Spin);
    }

    #[test]
    fn a_kernel_thread_of_its_own_is_noise_but_for_the_network() {
        let mut task = Task::default();
        assert_eq!(
            run(
                &mut task,
                &[
                    Place::Housekeeping,
                    Place::Plain,
                    Place::NetSoftirq,
                    Place::Plain,
                    Place::Dispatcher
                ]
            ),
            [
                Class::Sched,
                Class::Sched,
                Class::Path,
                Class::Path,
                Class::Sched
            ]
        );
    }

    #[test]
    fn the_scheduler_is_apart_with_all_it_calls_and_an_interrupt_does_not_end_it() {
        use Class::{Irq, Path, Sched};
        let mut task = Task::default();
        let (path, wake, lock) = (1, 2, 3);
        let ran = [
            (Place::NetSoftirq, path, true, Path),
            (Place::Plain, wake, true, Sched),
            (Place::Plain, lock, true, Path),
            (Place::Interrupt, 4, true, Path),
            (Place::Plain, path, true, Path),
            (Place::Return, 5, true, Path),
            (Place::Plain, lock, false, Path),
            (Place::Plain, wake, false, Sched),
            (Place::Plain, path, false, Path),
            (Place::Plain, lock, true, Path),
        ]
        .map(|(place, function, entry, own)| {
            task.enter(
                place,
                Step {
                    function,
                    entry,
                    own,
                },
            )
        });
        assert_eq!(
            ran,
            [Path, Sched, Sched, Irq, Irq, Irq, Sched, Sched, Path, Path]
        );
    }

    #[test]
    fn places_are_numbered_as_listed() {
        for (number, place) in Place::ALL.into_iter().enumerate() {
            assert_eq!(place as usize, number);
        }
    }
}
