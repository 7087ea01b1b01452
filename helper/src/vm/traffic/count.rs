//! What became of numbered datagrams. No IO: numbers and times of arrival go in,
//! figures come out.
//!
//! A run is a row of trials of equally many datagrams. In each the cable is pulled
//! before datagram `pull` is sent and put back before `restore` is, which makes three
//! windows. Each figure is of one window of one trial first; the report gives
//! percentiles over the trials.

use serde::Serialize;

/// Numbers of datagrams within a trial: `pull <= restore <= trial`.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Schedule {
    /// Datagrams of a trial
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub trial: u64,
    /// The cable is pulled before this one (default: never)
    #[arg(long, requires = "restore")]
    pub pull: Option<u64>,
    /// The cable is put back before this one
    #[arg(long, requires = "pull")]
    pub restore: Option<u64>,
}

/// Names of the windows, in their order.
const WINDOWS: [&str; 3] = ["before", "pulled", "restored"];

impl Schedule {
    /// Trial and window of a datagram.
    fn place(&self, number: u64) -> (u64, usize) {
        let within = number % self.trial;
        let passed = |mark: Option<u64>| mark.is_some_and(|mark| within >= mark);
        (
            number / self.trial,
            usize::from(passed(self.pull)) + usize::from(passed(self.restore)),
        )
    }

    /// How many datagrams each window has.
    fn sizes(&self) -> [u64; 3] {
        let pull = self.pull.unwrap_or(self.trial);
        let restore = self.restore.unwrap_or(self.trial);
        [pull, restore - pull, self.trial - restore]
    }

    /// Refuse marks that are out of order.
    pub fn check(&self) -> Result<(), String> {
        match (self.pull, self.restore) {
            (Some(pull), Some(restore)) if pull > restore || restore > self.trial => Err(format!(
                "--pull {pull} --restore {restore} --trial {}: want them in this order, none less \
                 than the one before",
                self.trial
            )),
            _ => Ok(()),
        }
    }
}

/// One window of one trial.
#[derive(Clone, Debug, Default)]
struct Cell {
    /// Datagrams that arrived, each counted once.
    arrived: u64,
    /// Arrivals of one that had arrived before.
    duplicated: u64,
    /// Arrivals after one of a higher number.
    reordered: u64,
    /// The longest time with no arrival, ns. It counts where the datagram belongs that
    /// was due next.
    gap: u64,
}

/// Counts arrivals.
pub struct Counter {
    schedule: Schedule,
    /// By number.
    seen: Vec<bool>,
    /// By trial, then window.
    cells: Vec<[Cell; 3]>,
    /// Highest number so far, and when the last one came, whichever it was, ns.
    last: Option<(u64, u64)>,
}

impl Counter {
    /// For a schedule that [`Schedule::check`] has let pass.
    pub fn new(schedule: Schedule) -> Self {
        Self {
            schedule,
            seen: Vec::new(),
            cells: Vec::new(),
            last: None,
        }
    }

    /// Datagram `number` (from 0, less than 2^32) came at `time`, ns of any clock.
    pub fn arrived(&mut self, number: u64, time: u64) {
        let highest = self.last.map(|(highest, _)| highest);
        // Trials are apart: the time between them is nobody's.
        let open = |&(highest, _): &(u64, u64)| (highest + 1) % self.schedule.trial != 0;
        if let Some((highest, before)) = self.last.filter(open) {
            let gap = time.saturating_sub(before);
            let cell = self.cell(highest + 1);
            cell.gap = cell.gap.max(gap);
        }
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        if self.seen.len() <= index {
            self.seen.resize(index + 1, false);
        }
        let again = std::mem::replace(&mut self.seen[index], true);
        let cell = self.cell(number);
        if again {
            cell.duplicated += 1;
        } else {
            cell.arrived += 1;
            cell.reordered += u64::from(highest.is_some_and(|highest| number < highest));
        }
        self.last = Some((highest.map_or(number, |highest| highest.max(number)), time));
    }

    fn cell(&mut self, number: u64) -> &mut Cell {
        let (trial, window) = self.schedule.place(number);
        let trial = usize::try_from(trial).unwrap_or(usize::MAX);
        if self.cells.len() <= trial {
            self.cells.resize(trial + 1, Default::default());
        }
        &mut self.cells[trial][window]
    }

    /// The figures, when `sent` datagrams have been sent: whole trials.
    pub fn report(mut self, sent: u64) -> Report {
        let trials = sent / self.schedule.trial;
        // Those of which nothing came, and not the one that the last gap reached into.
        self.cells
            .resize(usize::try_from(trials).unwrap_or(0), Default::default());
        let cells = &self.cells;
        let windows = WINDOWS
            .into_iter()
            .zip(self.schedule.sizes())
            .enumerate()
            .filter(|(_, (_, size))| *size > 0)
            .map(|(at, (window, size))| {
                let over = |figure: &dyn Fn(&Cell) -> u64| {
                    Figures::of(cells.iter().map(|trial| figure(&trial[at])).collect())
                };
                Window {
                    window,
                    lost: over(&|cell| size.saturating_sub(cell.arrived)),
                    duplicated: over(&|cell| cell.duplicated),
                    reordered: over(&|cell| cell.reordered),
                    gap_us: over(&|cell| cell.gap / 1000),
                }
            })
            .collect();
        Report {
            trials,
            sent,
            arrived: cells.iter().flatten().map(|cell| cell.arrived).sum(),
            windows,
        }
    }
}

/// What `receive` prints.
#[derive(Debug, Serialize)]
pub struct Report {
    trials: u64,
    sent: u64,
    /// Each datagram counted once.
    arrived: u64,
    windows: Vec<Window>,
}

/// A window, over all trials.
#[derive(Debug, Serialize)]
struct Window {
    window: &'static str,
    lost: Figures,
    duplicated: Figures,
    reordered: Figures,
    gap_us: Figures,
}

/// One figure over all trials. Percentiles are values that were measured (nearest rank).
#[derive(Debug, PartialEq, Serialize)]
struct Figures {
    sum: u64,
    p50: u64,
    p99: u64,
    max: u64,
}

impl Figures {
    fn of(mut values: Vec<u64>) -> Self {
        values.sort_unstable();
        let rank = |percent: usize| {
            let rank = (values.len() * percent).div_ceil(100).max(1);
            values.get(rank - 1).copied().unwrap_or(0)
        };
        Self {
            sum: values.iter().sum(),
            p50: rank(50),
            p99: rank(99),
            max: rank(100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    /// 2 before, 4 with the cable pulled, 4 with it back.
    const SCHEDULE: Schedule = Schedule {
        trial: 10,
        pull: Some(2),
        restore: Some(6),
    };

    /// The report when these arrive, 4 ms apart, and `sent` were sent.
    fn report(numbers: &[u64], sent: u64) -> Report {
        let mut counter = Counter::new(SCHEDULE);
        for (time, &number) in (0..).zip(numbers) {
            counter.arrived(number, time * 4 * MS);
        }
        counter.report(sent)
    }

    fn sums(report: &Report, figure: impl Fn(&Window) -> &Figures) -> Vec<u64> {
        report.windows.iter().map(|w| figure(w).sum).collect()
    }

    #[test]
    fn all_in_order_is_nothing_to_tell() {
        let report = report(&(0..20).collect::<Vec<_>>(), 20);
        assert_eq!((report.trials, report.arrived), (2, 20));
        assert_eq!(sums(&report, |w| &w.lost), [0; 3]);
        assert_eq!(sums(&report, |w| &w.duplicated), [0; 3]);
        assert_eq!(sums(&report, |w| &w.reordered), [0; 3]);
        assert!(report.windows.iter().all(|w| w.gap_us.max == 4000));
    }

    #[test]
    fn losses_count_in_their_window() {
        let report = report(&[0, 1, 5, 6, 7, 9], 10);
        assert_eq!(report.arrived, 6);
        assert_eq!(sums(&report, |w| &w.lost), [0, 3, 1]);
        assert_eq!(sums(&report, |w| &w.reordered), [0; 3]);
    }

    #[test]
    fn a_trial_of_which_nothing_came_is_lost_as_a_whole() {
        let report = report(&(0..10).collect::<Vec<_>>(), 30);
        assert_eq!(report.trials, 3);
        assert_eq!(sums(&report, |w| &w.lost), [4, 8, 8]);
        assert_eq!(report.windows[1].lost.p50, 4);
    }

    #[test]
    fn the_overtaken_one_counts_not_those_that_overtake() {
        let report = report(&[0, 1, 3, 4, 5, 2, 6, 7, 8, 9], 10);
        assert_eq!(sums(&report, |w| &w.reordered), [0, 1, 0]);
        assert_eq!(sums(&report, |w| &w.lost), [0; 3]);
    }

    #[test]
    fn a_duplicate_makes_up_for_no_loss() {
        let report = report(&[0, 1, 2, 2, 2, 5, 6, 7, 8, 9], 10);
        assert_eq!(sums(&report, |w| &w.duplicated), [0, 2, 0]);
        assert_eq!(sums(&report, |w| &w.lost), [0, 2, 0]);
        assert_eq!(sums(&report, |w| &w.reordered), [0; 3]);
    }

    #[test]
    fn a_gap_belongs_to_what_was_due() {
        let mut counter = Counter::new(SCHEDULE);
        counter.arrived(0, 0);
        counter.arrived(1, 4 * MS);
        // All of the pulled window is missing.
        counter.arrived(6, 24 * MS);
        counter.arrived(7, 27 * MS);
        let report = counter.report(10);
        let gaps: Vec<_> = report.windows.iter().map(|w| w.gap_us.max).collect();
        assert_eq!(gaps, [4000, 20000, 3000]);
    }

    #[test]
    fn the_time_between_trials_is_no_gap() {
        let mut counter = Counter::new(SCHEDULE);
        (0..10).for_each(|number| counter.arrived(number, number * 4 * MS));
        (10..20).for_each(|number| counter.arrived(number, (100 + number * 5) * MS));
        let report = counter.report(20);
        assert!(report.windows.iter().all(|w| w.gap_us.max == 5000));
    }

    #[test]
    fn no_marks_make_one_window() {
        let schedule = Schedule {
            trial: 5,
            pull: None,
            restore: None,
        };
        let mut counter = Counter::new(schedule);
        (0..4).for_each(|number| counter.arrived(number, 0));
        let report = counter.report(5);
        assert_eq!(report.windows.len(), 1);
        assert_eq!(report.windows[0].lost.sum, 1);
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let hundred = Figures::of((1..=100).rev().collect());
        assert_eq!(
            (hundred.p50, hundred.p99, hundred.max, hundred.sum),
            (50, 99, 100, 5050)
        );
        let three = Figures::of(vec![3, 1, 2]);
        assert_eq!((three.p50, three.p99, three.max), (2, 3, 3));
        assert_eq!(Figures::of(Vec::new()).max, 0);
    }

    #[test]
    fn marks_out_of_order_are_refused() {
        let backwards = Schedule {
            pull: Some(7),
            ..SCHEDULE
        };
        assert!(backwards.check().is_err_and(|e| e.contains("--pull 7")));
        assert!(SCHEDULE.check().is_ok());
    }
}
