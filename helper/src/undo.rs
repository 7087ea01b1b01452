//! `cpubond undo`: restore all that cpubond has changed, ever since the machine was started.

use crate::check::check_privilege;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::journal::{Journal, Lock};
use crate::netlink::Rtnetlink;
use crate::steer;
use clap::Args;

/// Restore everything that cpubond has changed
#[derive(Args, Debug)]
#[command(
    long_about = "Restore everything that cpubond has changed: all bonds, interrupts and queues, \
        by whichever command, and steered services, whose daemons are stopped.\n\n\
        Every value is the one from before cpubond first changed it. What somebody else has \
        changed since, or what belongs to another device now, is reported and left as it is. \
        Errors do not stop it: the rest is restored, all errors are shown, and what could not be \
        restored is kept in the journal so that it can be tried again. It also cleans up after a \
        cpubond that was killed. Modules stay loaded: removing the bonding driver would delete \
        every bond there is.",
    after_long_help = "Example:\n  cpubond undo"
)]
pub struct Undo {}

impl Undo {
    pub fn run(&self) -> Result<()> {
        let host = Host::default();
        check_privilege(&host, "cpubond undo")?;
        let _lock = Lock::wait(&host)?;
        // First what stands on the bonds.
        let removed = steer::remove_all(&host);
        for name in &removed.names {
            println!("{name}: service ended");
        }
        let mut errors = removed.errors;
        for error in &errors {
            eprintln!("cpubond: {error}");
        }
        match Journal::open(&host) {
            Err(error) => {
                eprintln!("cpubond: {error}");
                errors.push(error);
            }
            Ok(mut journal) => {
                let undoing = journal.undo(&host, &mut Rtnetlink::open()?, None);
                undoing.report();
                println!("{} changes taken back", undoing.restored);
                errors.extend(undoing.errors);
            }
        }
        match errors.len() {
            0 => Ok(()),
            errors => Err(Error::new(
                "cpubond undo",
                format_args!("{errors} things could not be undone (see above)"),
            )
            .fix("run it again once the cause is gone")),
        }
    }
}
