//! One cache line and the CPUs around it, with caches that never evict.
//!
//! Two figures, of different kinds. A *conflict* is by the rule of mtrace, about accesses
//! only: a read of a line that another CPU wrote since this CPU last read it, or a write
//! to a line that another CPU touched since this CPU last wrote it. A *transfer* is by a
//! model of who holds the line: a read of a line dirty in another CPU's cache, or a write
//! to a line that another CPU's cache holds. The first access of all costs nothing.

/// Most CPUs that a line can tell apart.
pub const MAX_CPUS: usize = 64;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
    /// An atomic read and write: one access, which conflicts at most once.
    Update,
}

impl Access {
    /// Whether it loads.
    pub fn reads(self) -> bool {
        self != Self::Write
    }

    /// Whether it stores.
    pub fn writes(self) -> bool {
        self != Self::Read
    }
}

/// What an access cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// It conflicts.
    pub conflict: bool,
    /// The line moved.
    pub transfer: bool,
}

/// State of a line. The default is one that nobody has touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// CPUs that have not read it since another one wrote it.
    unread: u64,
    /// CPUs that have not written it since another one touched it.
    unwritten: u64,
    /// CPUs whose caches hold it.
    holders: u64,
    /// Whether its only holder has changed it.
    dirty: bool,
}

impl Line {
    /// A CPU, below [`MAX_CPUS`], accesses it.
    pub fn access(&mut self, cpu: usize, access: Access) -> Cost {
        debug_assert!(cpu < MAX_CPUS);
        let own = 1 << cpu;
        let mut cost = Cost::default();
        if access.reads() {
            cost.conflict |= self.unread & own != 0;
            self.unread &= !own;
            if self.holders & own == 0 {
                cost.transfer |= self.dirty;
                // What was dirty elsewhere is now in both, and in memory.
                self.dirty = false;
                self.holders |= own;
            }
        }
        if access.writes() {
            cost.conflict |= self.unwritten & own != 0;
            self.unwritten &= !own;
            self.unread |= !own;
            cost.transfer |= self.holders & !own != 0;
            self.holders = own;
            self.dirty = true;
        }
        self.unwritten |= !own;
        cost
    }
}

#[cfg(test)]
mod tests {
    use super::Access::{Read, Update, Write};
    use super::*;
    use proptest::prelude::*;

    /// Conflicts and transfers of some accesses to one line.
    fn run(accesses: &[(usize, Access)]) -> (u32, u32) {
        let mut line = Line::default();
        let (mut conflicts, mut transfers) = (0, 0);
        for &(cpu, access) in accesses {
            let cost = line.access(cpu, access);
            conflicts += u32::from(cost.conflict);
            transfers += u32::from(cost.transfer);
        }
        (conflicts, transfers)
    }

    #[test]
    fn a_private_line_costs_nothing() {
        assert_eq!(
            run(&[(3, Read), (3, Write), (3, Update), (3, Read), (3, Write)]),
            (0, 0)
        );
    }

    #[test]
    fn a_line_passed_to_and_fro_costs_each_access_but_the_first_ones() {
        // Read and write: the line moves, then the other copy is invalidated.
        let turns: Vec<_> = (0..10)
            .flat_map(|turn| [(turn % 2, Read), (turn % 2, Write)])
            .collect();
        assert_eq!(run(&turns), (18, 18));
        let writes: Vec<_> = (0..10).map(|turn| (turn % 2, Write)).collect();
        assert_eq!(run(&writes), (9, 9));
        let updates: Vec<_> = (0..10).map(|turn| (turn % 2, Update)).collect();
        assert_eq!(run(&updates), (9, 9));
    }

    #[test]
    fn readers_pay_once_after_each_write() {
        let reads = [(1, Read), (2, Read), (1, Read), (2, Read), (0, Read)];
        let mut all = vec![(0, Write)];
        all.extend(reads);
        // The first reader gets it from the writer; the second from memory.
        assert_eq!(run(&all), (2, 1));
        all.push((0, Write));
        all.extend(reads);
        assert_eq!(run(&all), (2 + 1 + 2, 1 + 1 + 1));
    }

    #[test]
    fn reads_alone_never_cost() {
        assert_eq!(run(&[(0, Read), (1, Read), (63, Read), (0, Read)]), (0, 0));
    }

    #[test]
    fn a_write_after_anothers_read_conflicts_and_moves() {
        assert_eq!(run(&[(0, Write), (1, Read), (0, Write)]), (2, 2));
        assert_eq!(run(&[(1, Read), (0, Write)]), (1, 1));
    }

    /// The rules word by word, over the whole history.
    fn by_history(past: &[(usize, Access)], cpu: usize, access: Access) -> Cost {
        let since_own = |does: fn(Access) -> bool| {
            let from = past
                .iter()
                .rposition(|&(who, what)| who == cpu && does(what))
                .map_or(0, |last| last + 1);
            past[from..].iter().filter(move |&&(who, _)| who != cpu)
        };
        let read = since_own(Access::reads).any(|&(_, what)| what.writes());
        let write = since_own(Access::writes).next().is_some();

        // A cache each: invalid, shared, modified.
        let mut caches = ['i'; 4];
        let mut moved = false;
        for &(who, what) in past.iter().chain([&(cpu, access)]) {
            moved = false;
            if what.reads() && caches[who] == 'i' {
                moved |= caches.contains(&'m');
                caches = caches.map(|state| if state == 'm' { 's' } else { state });
                caches[who] = 's';
            }
            if what.writes() {
                moved |= (0..4).any(|other| other != who && caches[other] != 'i');
                caches = ['i'; 4];
                caches[who] = 'm';
            }
        }
        Cost {
            conflict: access.reads() && read || access.writes() && write,
            transfer: moved,
        }
    }

    proptest! {
        #[test]
        fn any_history_costs_what_the_rules_say(
            accesses in prop::collection::vec(
                (0..4_usize, prop::sample::select(vec![Read, Write, Update])), 0..60)
        ) {
            let mut line = Line::default();
            for (done, &(cpu, access)) in accesses.iter().enumerate() {
                let expected = by_history(&accesses[..done], cpu, access);
                prop_assert_eq!(line.access(cpu, access), expected, "access {}", done);
            }
        }
    }
}
