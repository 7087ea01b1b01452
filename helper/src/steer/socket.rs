//! The sockets of daemons that know nothing of us, by their inode numbers.

use super::Instance;
use crate::error::{Error, Exit, Result};
use rustix::fs::fstat;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;

/// Where a socket is open: `/proc/PID/fd/FD`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub pid: u32,
    pub fd: i32,
}

/// The daemon's listening sockets, those of them that are open still: it may have died since the
/// table was made, and whoever made that will notice and make another.
///
/// Keep them for moments only: a socket that we hold goes on listening when its daemon is dead.
pub fn listeners(instance: &Instance) -> Result<Vec<OwnedFd>> {
    let inodes = instance.sockets.iter().copied().collect();
    let mut found = Vec::new();
    for (inode, place) in holders([instance.pid], &inodes) {
        found.extend(fetch(place, inode)?);
    }
    Ok(found)
}

/// A duplicate of the socket; `None` if it is not there any more.
pub fn fetch(place: Place, inode: u64) -> Result<Option<OwnedFd>> {
    let fetch = || {
        let pid = i32::try_from(place.pid).ok().and_then(Pid::from_raw);
        let process = pidfd_open(pid.ok_or(rustix::io::Errno::SRCH)?, PidfdFlags::empty())?;
        let socket = pidfd_getfd(process, place.fd, PidfdGetfdFlags::empty())?;
        // The number may be another file's by now.
        let stat = fstat(&socket)?;
        Ok((stat.st_ino == inode).then_some(socket))
    };
    fetch().or_else(|error: rustix::io::Errno| match error {
        rustix::io::Errno::SRCH | rustix::io::Errno::BADF => Ok(None),
        error => Err(unreachable(place.pid, error.into())),
    })
}

/// Where each of these sockets is open in one of these processes; the first place of several.
pub fn holders(
    pids: impl IntoIterator<Item = u32>,
    inodes: &BTreeSet<u64>,
) -> BTreeMap<u64, Place> {
    let mut found = BTreeMap::new();
    for (inode, place) in pids.into_iter().flat_map(in_process) {
        if inodes.contains(&inode) {
            found.entry(inode).or_insert(place);
        }
    }
    found
}

/// All sockets that the process has open; none if it has ended.
fn in_process(pid: u32) -> Vec<(u64, Place)> {
    let fds = format!("/proc/{pid}/fd");
    let mut found: Vec<(u64, Place)> = fs::read_dir(fds)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?;
            let fd = entry.file_name().to_str()?.parse().ok()?;
            Some((inode(target.to_str()?)?, Place { pid, fd }))
        })
        .collect();
    found.sort_by_key(|(_, place)| place.fd);
    found
}

/// `socket:[INODE]`
fn inode(target: &str) -> Option<u64> {
    target
        .strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

fn unreachable(pid: u32, error: io::Error) -> Error {
    let place = format!("process {pid}");
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            Error::new(place, format_args!("its sockets cannot be taken: {error}"))
                .fix("run as root, or with CAP_SYS_PTRACE")
        }
        _ => Error::new(place, format_args!("its sockets cannot be taken: {error}"))
            .exit(Exit::Unsupported),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    #[test]
    fn inodes() {
        assert_eq!(inode("socket:[123]"), Some(123));
        for other in ["pipe:[123]", "socket:[]", "socket:[1", "/dev/null"] {
            assert_eq!(inode(other), None, "{other}");
        }
    }

    #[test]
    fn finds_and_takes_a_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let number = |socket: &TcpListener| fstat(socket).unwrap().st_ino;
        let mut instance = Instance {
            cpu: 0,
            port: 1,
            pid: std::process::id(),
            sockets: vec![number(&listener)],
        };
        let taken = listeners(&instance).unwrap();
        assert_eq!(taken.len(), 1);
        assert_eq!(fstat(&taken[0]).unwrap().st_ino, number(&listener));

        // Its number is in use, but for another file.
        let place = Place {
            pid: instance.pid,
            fd: other.as_raw_fd(),
        };
        assert!(fetch(place, number(&listener)).unwrap().is_none());
        let held = holders([1, instance.pid], &BTreeSet::from([number(&other)]));
        assert_eq!(held[&number(&other)], place);

        instance.pid = u32::MAX;
        assert!(listeners(&instance).unwrap().is_empty(), "no such process");
    }
}
