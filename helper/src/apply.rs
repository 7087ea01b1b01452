//! `cpubond apply`: make the machine as `config.toml` says, or change nothing.

use crate::change::{Change, Kernel, quoted};
use crate::check::check_privilege;
use crate::config::{self, Config};
use crate::converge::{self, Goal};
use crate::error::{Exit, Result};
use crate::host::Host;
use crate::journal::{By, Journal, Lock};
use crate::module;
use crate::netlink::Rtnetlink;
use crate::rivals;
use crate::rollback;
use crate::signals;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Make the machine as /etc/cpubond/config.toml says
#[derive(Args, Debug)]
#[command(
    long_about = "Make the bonds of /etc/cpubond/config.toml, as \"cpubond up\" makes one: see \
        \"cpubond up --help\" for what that changes. Only what is not as the file says is changed: \
        a second apply writes nothing, and a changed file is applied by the changes it takes. What \
        an earlier apply changed and the file has no more (a bond, a slave, an address, an \
        option) gets back what it held before. Bonds made by \"cpubond up\" are left alone unless \
        the file has them too.\n\n\
        If anything fails, the changes of this apply are taken back at once (exit code 5). Each is \
        written down in /run/cpubond/journal.json before it is made: if cpubond is killed, \
        \"cpubond apply\" goes on, and \"cpubond undo\" restores what was before the first apply. A \
        slave that is not there is warned of and left out, as long as its bond has another.\n\n\
        With --rollback-after, they are taken back unless \"cpubond confirm\" is run in time, by a \
        process of its own that outlives this terminal: for changes to the very link you are \
        logged in by. If that process is killed, \"cpubond confirm\" and \"cpubond rollback\" do as \
        ever; until one of them is run, nothing else is applied.\n\n\
        A new mode needs the bond down and empty, a new LACP rate needs it down: it is without a \
        link meanwhile. Services in the file are for \"cpubond run\".",
    after_long_help = "Examples:\n  \
        What would be changed:\n    cpubond apply --check --diff\n  \
        Change it, back in a minute unless confirmed:\n    \
          cpubond apply --rollback-after 60s && ping -c 3 192.0.2.1 && cpubond confirm"
)]
pub struct Apply {
    /// The configuration [default: /etc/cpubond/config.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Change nothing; exit with 3 if something would be changed
    #[arg(long)]
    pub check: bool,
    /// Show each change
    #[arg(long)]
    pub diff: bool,
    /// Take everything back unless confirmed in this time, such as 60s or 5m
    #[arg(long, value_name = "DURATION", value_parser = duration, conflicts_with = "check")]
    pub rollback_after: Option<Duration>,
    /// Load bonding.ko and bond_cpu_bound.ko from this directory rather than by modprobe
    #[arg(long, value_name = "DIR")]
    pub module_dir: Option<PathBuf>,
    /// Seconds to wait for carrier, and for the kernel's map to show what was set up
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    pub wait: u16,
    #[command(flatten)]
    pub rivals: rivals::Policy,
}

/// Seconds, or minutes or hours with `m` or `h` behind.
fn duration(text: &str) -> std::result::Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        _ => None,
    };
    let number: Option<u64> = digits.parse().ok();
    unit.zip(number)
        .and_then(|(unit, number)| number.checked_mul(unit))
        // A day is more than anybody waits.
        .filter(|seconds| (1..=86_400).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| "not 1s to 24h, such as 60s or 5m".to_string())
}

impl Apply {
    pub fn run(&self) -> Result<ExitCode> {
        let host = Host::default();
        let config = Config::load(&config::path(self.config.as_deref()))?;
        if self.check {
            let mut kernel = Rtnetlink::open()?;
            let journal = Journal::read(&host)?;
            let mut goal = Goal::new(&host, &mut kernel, &journal, &config.bonds, By::Apply)?;
            goal.warn();
            goal.mind_rivals(&host, self.rivals)?;
            let plan = goal.plan(&host, &mut kernel, &journal)?;
            self.show(&plan.changes);
            return Ok(match plan.changes.len() {
                0 => {
                    println!("nothing to change");
                    ExitCode::SUCCESS
                }
                changes => {
                    println!("{changes} changes needed");
                    ExitCode::from(Exit::Drift as u8)
                }
            });
        }

        check_privilege(&host, "cpubond apply")?;
        let _lock = Lock::take(&host)?;
        let mut kernel = Rtnetlink::open()?;
        let mut journal = Journal::open(&host)?;
        journal.refuse_if_unconfirmed()?;
        let mut goal = Goal::new(&host, &mut kernel, &journal, &config.bonds, By::Apply)?;
        goal.warn();
        goal.mind_rivals(&host, self.rivals)?;
        module::check(&host, goal.needs_policy())?;
        let go_on = signals::go_on()?;
        let needed = goal.plan(&host, &mut kernel, &journal)?.changes.len();
        let loaded = match needed {
            0 => module::Loaded::default(),
            _ => module::load(&host, self.module_dir.as_deref(), goal.needs_policy())?,
        };
        match self.apply(&host, &mut kernel, &mut journal, &goal, needed, &go_on) {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(error) => {
                loaded.unload();
                Err(error)
            }
        }
    }

    /// Make the changes, or take back those made.
    fn apply(
        &self,
        host: &Host,
        kernel: &mut dyn Kernel,
        journal: &mut Journal,
        goal: &Goal,
        needed: usize,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        // There is nobody to wait for if there is nothing to take back.
        let guard = match self.rollback_after.filter(|_| needed > 0) {
            Some(after) => Some((after, rollback::Guard::start(host)?)),
            None => None,
        };
        journal.begin(host, kernel, guard.as_ref().map(|(_, guard)| guard.id))?;
        let made = goal.reach(host, kernel, journal, self.wait, go_on);
        let finished = made.and_then(|plan| {
            match &guard {
                Some((after, _)) => journal.wait_for_confirmation(host, *after)?,
                None => journal.commit(host)?,
            }
            Ok(plan)
        });
        let plan = match finished {
            Ok(plan) => plan,
            Err(cause) => return Err(converge::roll_back(host, kernel, journal, cause)),
        };
        self.show(&plan.changes);
        for line in &plan.left {
            eprintln!("cpubond: {line}");
        }
        match (plan.changes.len(), &guard) {
            (0, _) => println!("nothing to change"),
            (changes, None) => println!("{changes} changes made"),
            (changes, Some((after, _))) => println!(
                "{changes} changes made; \"cpubond confirm\" keeps them, otherwise they are taken back in {} s",
                after.as_secs()
            ),
        }
        Ok(())
    }

    fn show(&self, changes: &[Change]) {
        for Change {
            item,
            before,
            after,
            ..
        } in changes.iter().filter(|_| self.diff)
        {
            println!("{item}: {} -> {}", quoted(before), quoted(after));
        }
    }
}

impl Goal {
    /// Say which slaves are missing.
    fn warn(&self) {
        for error in &self.missing {
            eprintln!("cpubond: warning: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        let seconds = |text: &str| duration(text).ok().map(|duration| duration.as_secs());
        assert_eq!(seconds("60s"), Some(60));
        assert_eq!(seconds("90"), Some(90));
        assert_eq!(seconds("5m"), Some(300));
        assert_eq!(seconds("24h"), Some(86_400));
        for bad in [
            "",
            "0",
            "s",
            "-1s",
            "1d",
            "25h",
            "1.5s",
            "99999999999999999999h",
        ] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }
}
