//! Whether the kernel shows what was set up, and waiting until it does.

use crate::bind::Binding;
use crate::bond::{self, MapLine};
use crate::config;
use crate::cpulist::CpuSet;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::link;
use crate::options::Mode;
use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

/// A bond that was set up, and what its slaves were given.
pub struct Settle<'a> {
    pub bond: &'a config::Bond,
    pub bindings: &'a [Binding],
    /// For how long to wait.
    pub seconds: u16,
}

/// A slave that the bond could not send by in the time waited.
pub struct Unusable {
    pub slave: String,
    pub found: &'static str,
    seconds: u16,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} after {} s; its CPUs send through other slaves until it is usable",
            self.slave, self.found, self.seconds
        )
    }
}

impl Settle<'_> {
    /// Wait until the kernel shows what was set up. A slave without a link, one that LACP has not
    /// let in yet, or an interrupt that will move when it next fires, is worth a warning (the
    /// first two are given back, `show` has the third); an interrupt that has moved, on a usable slave, and that the map does not follow
    /// is an error.
    pub fn wait(&self, host: &Host, go_on: &dyn Fn() -> Result<()>) -> Result<Vec<Unusable>> {
        let bindings = self.bindings;
        let wait = Duration::from_secs(self.seconds.into());
        let start = Instant::now();
        let mut steady = start;
        let mut expected = self.expected_map(host);
        loop {
            go_on()?;
            let now_expected = self.expected_map(host);
            if now_expected != expected {
                // The kernel looks at interrupts about once a second: give it time again.
                expected = now_expected;
                steady = Instant::now();
            }
            let waiting: Vec<&Binding> = bindings
                .iter()
                .filter(|binding| !self.may_send(host, &binding.slave))
                .collect();
            let pending = bindings.iter().any(|binding| binding.is_pending(host));
            let mismatch = self.map_mismatch(host, &expected);
            if waiting.is_empty() && !pending && mismatch.is_none() {
                return Ok(Vec::new());
            }
            // Not for ever, should something keep moving interrupts.
            let patience = if mismatch.is_some() {
                steady.elapsed()
            } else {
                start.elapsed()
            };
            if patience < wait && start.elapsed() < 5 * wait {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
            if let Some(line) = mismatch {
                return Err(Error::new(&self.bond.name, line));
            }
            return Ok(self.unusable(host, &waiting));
        }
    }

    fn unusable(&self, host: &Host, waiting: &[&Binding]) -> Vec<Unusable> {
        waiting
            .iter()
            .map(|binding| Unusable {
                slave: binding.slave.clone(),
                found: match link::has_carrier(host, &binding.slave) {
                    true => "not let into the aggregate",
                    false => "no carrier",
                },
                seconds: self.seconds,
            })
            .collect()
    }

    fn may_send(&self, host: &Host, slave: &str) -> bool {
        match self.bond.mode {
            // All but one are backups, as they should be.
            Mode::ActiveBackup => bond::has_link(host, slave),
            _ => bond::is_usable(host, slave),
        }
    }

    /// What the map must show by now.
    fn expected_map(&self, host: &Host) -> Vec<Expected> {
        self.bindings
            .iter()
            .filter(|binding| self.bond.needs_policy() && bond::is_usable(host, &binding.slave))
            .map(|binding| Expected {
                slave: binding.slave.clone(),
                bound: binding.bound_cpus(host),
                interrupted: binding.interrupted_cpus(host),
            })
            .collect()
    }

    /// The first CPU that the kernel's map binds otherwise.
    fn map_mismatch(&self, host: &Host, expected: &[Expected]) -> Option<String> {
        let map = bond::map(host, &self.bond.name).unwrap_or_default();
        for Expected {
            slave,
            bound,
            interrupted,
        } in expected
        {
            for cpu in bound.iter() {
                let line = map.iter().find(|line| line.cpu == cpu);
                if !line.is_some_and(|line| line.is_bound() && line.slaves.contains(slave)) {
                    let found = line.map_or("nothing".to_string(), |line| {
                        format!("'{} {}'", line.slaves.join(","), line.reason)
                    });
                    return Some(format!(
                        "CPU {cpu} was given to {slave}, but after {} s cpu_bound_map has {found}",
                        self.seconds
                    ));
                }
            }
            let stale = map.iter().find(|line| {
                line.reason == "irq"
                    && line.slaves.contains(slave)
                    && !interrupted.contains(line.cpu)
            });
            if let Some(MapLine { cpu, .. }) = stale {
                return Some(format!(
                    "after {} s cpu_bound_map binds CPU {cpu} to {slave}, none of whose interrupts goes there",
                    self.seconds
                ));
            }
        }
        None
    }
}

/// What the map must show of a usable slave.
#[derive(PartialEq, Eq)]
struct Expected {
    slave: String,
    /// CPUs bound to it.
    bound: CpuSet,
    /// The only CPUs that may be bound to it by interrupt.
    interrupted: CpuSet,
}
