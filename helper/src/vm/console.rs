//! A guest's kernel log, as its serial console wrote it.

use anyhow::{Context, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

/// What a kernel says when something is wrong with it.
const COMPLAINTS: &[&str] = &[
    "Oops",
    "BUG:",
    "kernel BUG at",
    "WARNING: ",
    "Kernel panic",
    "general protection fault",
    "rust_kernel: panicked",
    "rust_panic",
    "UBSAN:",
    "KASAN:",
    "KCSAN:",
    "KFENCE:",
    "kmemleak: ",
    "self-detected stall",
    "detected stalls on CPUs",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "possible circular locking",
    "possible recursive locking",
    "suspicious RCU usage",
    "inconsistent lock state",
    "NETDEV WATCHDOG",
    "refcount_t:",
    "waiting for bond", // "unregister_netdevice: waiting for bond0 to become free"
];

/// Reads a console's log from where it was last read.
pub struct Console {
    pub path: PathBuf,
    seen: u64,
}

impl Console {
    /// The log need not exist yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, seen: 0 }
    }

    /// Lines since the last call in which the kernel complains.
    pub fn complaints(&mut self) -> Result<Vec<String>> {
        let mut text = Vec::new();
        let mut file = File::open(&self.path).with_context(|| self.path.display().to_string())?;
        file.seek(SeekFrom::Start(self.seen))?;
        file.read_to_end(&mut text)?;
        // The rest of a line that is still being written belongs to the next call.
        let whole = text
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |end| end + 1);
        text.truncate(whole);
        self.seen += u64::try_from(whole).unwrap_or_default();
        Ok(complaints_in(&String::from_utf8_lossy(&text)))
    }
}

fn complaints_in(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)))
        .map(|line| line.trim_end().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_splat_is_found_and_a_plain_line_is_not() {
        let log = "[    1.0] bond0: (slave eth0): link status definitely down\r\n\
                   [    2.0] WARNING: CPU: 0 PID: 1 at net/core/dev.c:1 f+0x1/0x2\r\n\
                   [    3.0] Oops: 0002 [#1] SMP\n";
        assert_eq!(complaints_in(log).len(), 2);
        assert!(complaints_in("[    1.0] Warning: unsupported\n").is_empty());
    }
}
