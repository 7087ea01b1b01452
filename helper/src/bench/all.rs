//! `cpubond bench all`: everything that is measured, then the report.

use super::report::Report;
use super::{system, tx};
use anyhow::Result;
use std::process::ExitCode;

/// Everything, then figures and docs/results.md
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cpubond bench all            # what 'make bench' does; an hour and more on 2 cores
  cpubond bench all --quick    # what 'make bench QUICK=1' does; a few minutes

A run that was ended goes on where it was.")]
pub struct All {
    #[command(flatten)]
    tx: tx::Args,
}

impl All {
    /// One after the other; what one could not measure does not stop the next.
    pub fn run(&self) -> Result<ExitCode> {
        let mut code = tx::run(&self.tx)?;
        let whole = system::run(&system::Args {
            quick: self.tx.quick,
            check: self.tx.check,
            modules: self.tx.modules.clone(),
            ..system::Args::default()
        })?;
        if code == ExitCode::SUCCESS {
            code = whole;
        }
        if !self.tx.quick {
            Report::default().run()?;
        }
        Ok(code)
    }
}
