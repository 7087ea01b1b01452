//! `cpubond down`: restore what `cpubond up` changed.

use crate::error::{Error, Exit, Result};
use crate::host::Host;
use crate::journal::{Journal, Lock};
use crate::link;
use crate::netlink::Rtnetlink;
use clap::Args;

/// Delete a bond made by `cpubond up` and restore what it changed
#[derive(Args, Debug)]
#[command(
    long_about = "Delete a bond made by \"cpubond up\" and restore what it changed: interrupt \
        affinities, XPS, RPS, and whether the slaves were up.\n\n\
        What somebody else has changed since is reported and left as it is. Errors do not stop \
        it: the rest is restored, all errors are shown, and the journal is kept so that it can \
        be tried again. It also cleans up after an \"up\" that was killed. Modules stay loaded: \
        removing the bonding driver would delete every bond there is.",
    after_long_help = "Example:\n  cpubond down bond0"
)]
pub struct Down {
    /// The bond to take down
    pub bond: String,
}

impl Down {
    pub fn run(&self) -> Result<()> {
        let host = Host::default();
        let bond = &self.bond;
        // The name becomes part of a path.
        if bond.contains('/') || bond.starts_with('.') {
            return Err(Error::new(bond, "no name of a bond").exit(Exit::Usage));
        }
        let _lock = Lock::take(&host)?;
        let mut journal = Journal::open(&host)?;
        journal.refuse_if_unconfirmed()?;
        if !journal.bonds.contains_key(bond) {
            return Err(match link::exists(&host, bond) {
                true => Error::new(bond, "not made by cpubond")
                    .fix(format_args!("\"ip link del {bond}\" deletes it")),
                false => Error::new(bond, "no such bond").fix("\"cpubond show\" lists them"),
            });
        }
        let undoing = journal.undo(&host, &mut Rtnetlink::open()?, Some(bond));
        undoing.report();
        match undoing.errors.len() {
            0 => {
                println!("{bond}: down, {} changes taken back", undoing.restored);
                Ok(())
            }
            errors => Err(Error::new(
                bond,
                format_args!("{errors} changes could not be taken back (see above)"),
            )
            .fix("run it again once the cause is gone")),
        }
    }
}
