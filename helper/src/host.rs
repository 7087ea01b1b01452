//! Where the kernel's files are, so that tests can point the rest at a directory of their own.

use crate::error::{Error, Result};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

#[derive(Clone)]
pub struct Host {
    pub sys: PathBuf,
    pub proc: PathBuf,
    /// Journals and the lock; lost at reboot, as is everything they describe.
    pub run: PathBuf,
    /// The directory of all others: what other programs have in `/etc`, `/run` and `/usr`.
    pub root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            proc: "/proc".into(),
            run: "/run/cpubond".into(),
            root: "/".into(),
        }
    }
}

impl Host {
    /// `/sys/class/net/LINK`
    pub fn link(&self, link: &str) -> PathBuf {
        self.sys.join("class/net").join(link)
    }

    /// Milliseconds since boot, those asleep included.
    pub fn uptime(&self) -> Result<u64> {
        let path = self.proc.join("uptime");
        let text = read(&path)?;
        let seconds: Option<f64> = text
            .split_whitespace()
            .next()
            .and_then(|seconds| seconds.parse().ok());
        seconds
            .map(|seconds| (seconds * 1000.0) as u64)
            .ok_or_else(|| Error::new(path.display(), format_args!("'{text}' is no time")))
    }

    /// `/proc/irq/IRQ`
    pub fn irq(&self, irq: u32) -> PathBuf {
        self.proc.join("irq").join(irq.to_string())
    }
}

/// Read a one-value file, without the newline.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path)
        .map(|text| text.trim_end().to_string())
        .map_err(|error| unreadable(path, &error))
}

/// Read a file that not every device or driver has; `None` also where the kernel has the file
/// but no value for it (`speed` of a link that is down, `xps_cpus` of a single-queue device).
pub fn read_if_any(path: &Path) -> Option<String> {
    read(path).ok()
}

/// Names in a directory, sorted, none if there is no such directory.
pub fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Names `PREFIXn` in a directory, as their numbers, sorted.
pub fn numbered(path: &Path, prefix: &str) -> Vec<u32> {
    let mut numbers: Vec<u32> = names(path)
        .iter()
        .filter_map(|name| name.strip_prefix(prefix)?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    let error = Error::new(path.display(), format_args!("cannot be read: {error}"));
    match path.try_exists() {
        Ok(true) => error.fix("run as root"),
        _ => error,
    }
}
