//! `cpubond bench all`: everything that is measured, then the report.

use super::report::Report;
use super::{system, tx};
use anyhow::{Result, anyhow};
use std::process::ExitCode;
use std::thread;

/// Everything, then figures and docs/results.md
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cpubond bench all            # what 'make bench' does; an hour and a half on 2 cores
  cpubond bench all --quick    # what 'make bench QUICK=1' does; a few minutes

A run that was ended goes on where it was.")]
pub struct All {
    #[command(flatten)]
    tx: tx::Args,
}

impl All {
    /// What one could not measure does not stop the other. Both at once, as one lab alone leaves
    /// the host idle for half the time. The slower a guest, the more goes by the clock beside
    /// each packet; nothing else that is counted depends on it.
    pub fn run(&self) -> Result<ExitCode> {
        let whole = system::Args {
            quick: self.tx.quick,
            check: self.tx.check,
            modules: self.tx.modules.clone(),
            ..system::Args::default()
        };
        let (tx, whole) = thread::scope(|scope| {
            let whole = scope.spawn(|| system::run(&whole));
            (
                tx::run(&self.tx),
                whole
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("the measurement of the system panicked"))),
            )
        });
        let (tx, whole) = (tx?, whole?);
        if !self.tx.quick {
            Report::default().run()?;
        }
        Ok(if tx == ExitCode::SUCCESS { whole } else { tx })
    }
}
