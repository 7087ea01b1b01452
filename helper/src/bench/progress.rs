//! What has been done, and how long the rest takes.

use std::time::{Duration, Instant};

/// Of a run whose parts are not equally long: each has a weight.
pub struct Progress {
    name: &'static str,
    start: Instant,
    parts: usize,
    parts_done: usize,
    planned: f64,
    done: f64,
}

impl Progress {
    /// Of what, in a word: two may run side by side.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            start: Instant::now(),
            parts: 0,
            parts_done: 0,
            planned: 0.0,
            done: 0.0,
        }
    }

    /// One more part to do.
    pub fn plan(&mut self, weight: f64) {
        self.parts += 1;
        self.planned += weight;
    }

    /// One part done.
    pub fn done(&mut self, weight: f64) {
        self.parts_done += 1;
        self.done += weight;
    }

    /// Say something, with where we are.
    pub fn say(&self, what: &str) {
        let left = match self.left() {
            Some(left) => format!(", {} left", minutes(left)),
            None => String::new(),
        };
        eprintln!(
            "cpubond: {} [{}/{}{left}] {what}",
            self.name, self.parts_done, self.parts
        );
    }

    fn left(&self) -> Option<Duration> {
        let rest = (self.planned - self.done).max(0.0);
        (self.done > 0.0).then(|| self.start.elapsed().mul_f64(rest / self.done))
    }
}

fn minutes(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds => format!("{} min", seconds.div_ceil(60)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_as_long_as_its_weight() {
        let mut progress = Progress {
            start: Instant::now() - Duration::from_secs(10),
            ..Progress::new("test")
        };
        progress.plan(1.0);
        progress.plan(3.0);
        assert_eq!(progress.left(), None);
        progress.done(1.0);
        let left = progress.left().expect("one is done").as_secs_f64();
        assert!((30.0..31.0).contains(&left), "{left}");
        assert_eq!(minutes(Duration::from_secs(99)), "99 s");
        assert_eq!(minutes(Duration::from_secs(101)), "2 min");
    }
}
