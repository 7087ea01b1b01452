//! Signals as something to wait for.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::{flag, low_level::pipe};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub struct Signals {
    wake: UnixStream,
    seen: Vec<(i32, Arc<AtomicBool>)>,
}

impl Signals {
    /// Catch these from now on.
    pub fn catch(signals: &[i32]) -> io::Result<Self> {
        let (wake, write) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let mut seen = Vec::new();
        for signal in signals {
            // Actions run in this order: who is woken finds the flag set.
            let flag = Arc::new(AtomicBool::new(false));
            flag::register(*signal, Arc::clone(&flag))?;
            pipe::register(*signal, write.try_clone()?)?;
            seen.push((*signal, flag));
        }
        Ok(Self { wake, seen })
    }

    /// Sleep until a signal comes, `also` can be read, or the time is over.
    pub fn wait(&self, timeout: Option<Duration>, also: Option<BorrowedFd>) -> io::Result<()> {
        let timeout = timeout
            .map(Timespec::try_from)
            .transpose()
            .map_err(io::Error::other)?;
        let mut fds = vec![PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)];
        fds.extend(also.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut bytes = [0; 64];
        loop {
            match (&self.wake).read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether the signal has come since it was last asked for.
    pub fn came(&self, signal: i32) -> bool {
        self.seen
            .iter()
            .any(|(number, flag)| *number == signal && flag.swap(false, Ordering::Relaxed))
    }
}
