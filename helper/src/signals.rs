//! SIGINT and SIGTERM end a command between two changes, so that it can roll back.

use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Catch them from now on; what is given back fails once one has come.
pub fn go_on() -> Result<impl Fn() -> Result<()>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|error| Error::new("signal handler", error))?;
    }
    Ok(move || match interrupted.load(Ordering::Relaxed) {
        true => Err(Error::new("cpubond", "interrupted")),
        false => Ok(()),
    })
}
