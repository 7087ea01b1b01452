//! What was called from the scheduler and has not returned, from the blocks alone.
//!
//! A block at a function's beginning is a call; one elsewhere is a return to it, if it is among
//! those that were called. A return to what is not is one to who called the scheduler.

use crate::class::Class;

/// A block, as far as calls are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Number of its function.
    pub function: u32,
    /// It begins the function.
    pub entry: bool,
    /// Of the function by itself.
    pub own: Class,
}

/// The functions that the scheduler is in; none: it does not run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calls(Vec<u32>);

impl Calls {
    /// A block runs. Returns whether it is the scheduler's.
    pub fn step(&mut self, step: Step) -> bool {
        let scheduler = step.own == Class::Sched;
        if self.0.is_empty() && !scheduler {
            return false;
        }
        let at = self.0.iter().rposition(|&called| called == step.function);
        match at {
            // A loop to its beginning is no call of itself.
            Some(at) if !step.entry || at + 1 == self.0.len() => self.0.truncate(at + 1),
            _ if step.entry => self.0.push(step.function),
            _ => {
                self.0.clear();
                if scheduler {
                    self.0.push(step.function);
                }
            }
        }
        !self.0.is_empty()
    }

    /// It has returned, all of it.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: u32 = 1;
    const WAKE: u32 = 2;
    const LOCK: u32 = 3;
    const PICK: u32 = 4;

    fn step(calls: &mut Calls, function: u32, entry: bool) -> bool {
        let own = if matches!(function, WAKE | PICK) {
            Class::Sched
        } else {
            Class::Path
        };
        calls.step(Step {
            function,
            entry,
            own,
        })
    }

    #[test]
    fn what_the_scheduler_calls_is_its_own_until_it_returns() {
        let calls = &mut Calls::default();
        let ran = [
            (PATH, true),
            (LOCK, true),
            (PATH, false),
            (WAKE, true),
            (LOCK, true),
            (WAKE, false),
            (PICK, true),
            (LOCK, true),
            (LOCK, false),
            (PICK, false),
            (WAKE, false),
            (PATH, false),
            (LOCK, true),
            (PATH, false),
        ]
        .map(|(function, entry)| step(calls, function, entry));
        let (no, yes) = (false, true);
        assert_eq!(
            ran,
            [
                no, no, no, yes, yes, yes, yes, yes, yes, yes, yes, no, no, no
            ]
        );
    }

    #[test]
    fn a_task_that_waits_in_the_scheduler_returns_from_it() {
        let calls = &mut Calls::default();
        assert!(step(calls, WAKE, false));
        assert!(step(calls, LOCK, true));
        assert!(step(calls, PICK, false), "whose call was not seen");
        assert!(!step(calls, PATH, false));
    }

    #[test]
    fn a_jump_at_the_end_returns_to_who_called() {
        let calls = &mut Calls::default();
        step(calls, WAKE, true);
        step(calls, PICK, true);
        // In place of a return.
        step(calls, LOCK, true);
        assert!(step(calls, WAKE, false));
        assert!(!step(calls, PATH, false));
    }

    #[test]
    fn what_has_returned_may_be_who_called() {
        let calls = &mut Calls::default();
        assert!(!step(calls, LOCK, true));
        assert!(step(calls, WAKE, true));
        assert!(step(calls, LOCK, true));
        assert!(step(calls, WAKE, false));
        assert!(!step(calls, LOCK, false));
    }

    #[test]
    fn a_loop_to_the_beginning_is_not_a_call_each_time() {
        let calls = &mut Calls::default();
        for _ in 0..1000 {
            step(calls, WAKE, true);
        }
        assert_eq!(calls.0.len(), 1);
    }
}
