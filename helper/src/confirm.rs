//! `cpubond confirm`: keep what `apply --rollback-after` has changed.

use crate::check::check_privilege;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::journal::{Journal, Lock, State};
use crate::rollback;
use clap::Args;

/// Keep the changes of an apply that waits to be confirmed
#[derive(Args, Debug)]
#[command(
    long_about = "Keep the changes of \"cpubond apply --rollback-after\". Of this and the rollback, \
        the one that comes first decides: if it was the rollback, this says so and exits with 1.",
    after_long_help = "Example:\n  \
        cpubond apply --rollback-after 60s && ping -c 3 192.0.2.1 && cpubond confirm"
)]
pub struct Confirm {}

impl Confirm {
    pub fn run(&self) -> Result<()> {
        let host = Host::default();
        check_privilege(&host, "cpubond confirm")?;
        let _lock = Lock::wait(&host)?;
        confirm(&host, &mut Journal::open(&host)?)?;
        println!("confirmed");
        Ok(())
    }
}

fn confirm(host: &Host, journal: &mut Journal) -> Result<()> {
    let refused = |found: &str| {
        Err(Error::new("cpubond confirm", found).fix(
            "\"cpubond rollback\" takes back the rest, \"cpubond apply\" makes what is missing",
        ))
    };
    match journal.pending.as_ref().map(|pending| pending.state) {
        Some(State::Unconfirmed) => journal.commit(host),
        Some(State::Applying) => refused("the apply was killed before it was done"),
        Some(State::RollingBack) => refused("it has been rolled back, but not in full"),
        None => Err(rollback::nothing(host, "nothing waits to be confirmed")),
    }
}
