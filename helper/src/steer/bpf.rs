//! What the BPF methods share.

use crate::error::{Error, Exit};
use std::error;
use std::fmt;
use std::io;

/// What the kernel refused, with the causes that aya gives; of each only the first line, for the
/// verifier's log can be long.
pub fn refused(place: impl fmt::Display, error: &(dyn error::Error + 'static)) -> Error {
    let mut found = String::new();
    let mut denied = false;
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        if !found.contains(line) {
            found.push_str(if found.is_empty() { "" } else { ": " });
            found.push_str(line);
        }
        denied |= error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
        next = error.source();
    }
    let error = Error::new(place, found);
    match denied {
        true => error.fix("run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"),
        false => error.exit(Exit::Unsupported),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya::sys::SyscallError;

    #[test]
    fn one_line_with_the_cause() {
        let error = SyscallError {
            call: "bpf_prog_load",
            io_error: io::Error::from_raw_os_error(libc::EPERM),
        };
        let error = refused("here", &error);
        assert_eq!(error.exit, Exit::Failed);
        let text = error.to_string();
        assert!(
            text.starts_with("here: `bpf_prog_load` failed: Operation not permitted"),
            "{text}"
        );
        assert!(text.ends_with("CAP_PERFMON"), "{text}");
    }
}
