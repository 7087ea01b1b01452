//! What a CPU is at: which task, in which interrupt, in which softirq. From the blocks it
//! runs, one after the other; no registers, no stack.

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
}

impl Place {
    /// All, by number.
    pub const ALL: [Self; 10] = [
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

/// Where a task is. Goes with the task when it is switched out: an interrupt may end in a
/// switch to another task, and return when the first one runs again, on another CPU even.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Task {
    /// Softirq work in the task itself.
    base: Softirq,
    /// Softirq work in each interrupt, the innermost last.
    interrupts: Vec<Softirq>,
    /// The return runs in this block; the interrupt is over in the next.
    returning: bool,
    housekeeping: bool,
    generating: bool,
}

impl Task {
    /// The task runs a block, in a function that by itself is of some class. Returns what
    /// the block is part of.
    pub fn enter(&mut self, place: Place, own: Class) -> Class {
        if std::mem::take(&mut self.returning) {
            // More returns than entries: the entry was before the region.
            self.interrupts.pop();
        }
        match place {
            Place::Plain => {}
            Place::User => {
                self.interrupts.clear();
                self.base = Softirq::None;
                // The kernel's own threads never are here; one that was taken for such is none.
                self.housekeeping = false;
                return Class::User;
            }
            Place::Interrupt => self.interrupts.push(Softirq::None),
            Place::Return => self.returning = true,
            Place::NetSoftirq => *self.softirq() = Softirq::Net,
            Place::OtherSoftirq => *self.softirq() = Softirq::Other,
            Place::Dispatcher => *self.softirq() = Softirq::None,
            Place::Housekeeping => self.housekeeping |= self.interrupts.is_empty(),
            Place::Generator => self.generating |= self.interrupts.is_empty(),
            Place::PathEntry => self.generating &= !self.interrupts.is_empty(),
        }
        match (self.interrupts.is_empty(), *self.softirq()) {
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

    fn softirq(&mut self) -> &mut Softirq {
        self.interrupts.last_mut().unwrap_or(&mut self.base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(task: &mut Task, places: &[Place]) -> Vec<Class> {
        places
            .iter()
            .map(|&place| task.enter(place, Class::Path))
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
        task.enter(Place::Generator, Class::Path);
        assert_eq!(task.enter(Place::Plain, Class::Spin), Class::Spin);
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
    fn places_are_numbered_as_listed() {
        for (number, place) in Place::ALL.into_iter().enumerate() {
            assert_eq!(place as usize, number);
        }
    }
}
