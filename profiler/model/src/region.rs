//! What a region is to count, as the helper tells the plugin before the guest opens it.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Name of the file in the plugin's directory that holds the [`Region`] to open next.
pub const REGION_FILE: &str = "region.json";
/// Name of the file there that holds the guest's kernel symbols, as of /proc/kallsyms.
pub const SYMBOLS_FILE: &str = "symbols";

/// Name of the file there with what went wrong when the last region was opened or closed;
/// empty when nothing did.
pub const STATUS_FILE: &str = "status";

/// Where a generator in the kernel hands its packet over, unless a region says otherwise.
pub const PATH_ENTRIES: &[&str] = &[
    "bond_start_xmit",
    "team_xmit",
    "virtio_net:start_xmit",
    "dummy_xmit",
    "__dev_queue_xmit",
    "__dev_direct_xmit",
    "dev_hard_start_xmit",
];

/// The displacement of the no-op that opens a region: `nopl 0x63707501(%rax,%rax,1)`.
pub const OPEN: u32 = 0x6370_7501;
/// The displacement of the no-op that closes it.
pub const CLOSE: u32 = 0x6370_7502;

/// The bytes of a marker: an 8-byte no-op whose displacement says which one it is. A CPU
/// without the plugin runs over it and nothing happens.
pub const fn marker(displacement: u32) -> [u8; 8] {
    let [a, b, c, d] = displacement.to_le_bytes();
    [0x0f, 0x1f, 0x84, 0x00, a, b, c, d]
}

/// A part of a run that is counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Region {
    /// What it is called; names its files, so letters, digits, `.`, `_`, `+` and `-`.
    pub label: String,
    /// A packet (or request) begins where a CPU enters one of these functions. Each is
    /// `NAME` or `MODULE:NAME`; suffixes the compiler adds (`.constprop.0`) need not be given.
    pub marks: Vec<String>,
    /// Which part of the region counts on a CPU that has marks.
    pub window: Window,
    /// For each pair, count the instructions from entry of the first function to entry
    /// of the second on the same CPU.
    pub ranges: Vec<(String, String)>,
    /// While a kernel generator (pktgen) makes its packet, all it calls belongs to it.
    /// It ends where one of these functions is entered. Empty: the usual ones.
    pub path_entries: Vec<String>,
    /// User addresses (first, first after) whose lines are counted one by one, as
    /// functions `line:0`, `line:1` and so on. At most 4096 lines.
    pub watch: Option<(u64, u64)>,
}

/// Which part of the region counts on a CPU that has marks. CPUs without any count all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Window {
    /// From the CPU's first mark to its last: whole packets only, neither set-up nor end.
    #[default]
    Packets,
    /// All of it.
    Region,
}

impl Region {
    /// A region that counts packets from entry of `mark` to the next entry.
    pub fn packets(label: &str, mark: &str) -> Self {
        Self {
            label: label.to_owned(),
            marks: vec![mark.to_owned()],
            ..Self::default()
        }
    }

    /// The file of its counts in the plugin's directory.
    pub fn counts_file(dir: &Path, label: &str) -> PathBuf {
        dir.join(format!("{label}.json"))
    }

    /// The file of its trace there.
    pub fn trace_file(dir: &Path, label: &str) -> PathBuf {
        dir.join(format!("{label}.trace"))
    }

    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), String> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "._+-".contains(c);
        if self.label.is_empty() || !self.label.chars().all(fits) || self.label.starts_with('.') {
            return Err(format!(
                "label '{}': want letters, digits, '.', '_', '+' and '-', not beginning with '.'",
                self.label
            ));
        }
        if let Some((first, end)) = self.watch {
            let lines = end.saturating_sub(first).div_ceil(64);
            if !(1..=4096).contains(&lines) {
                return Err(format!(
                    "watched addresses {first:#x} to {end:#x}: want 1 to 4096 lines of 64 bytes"
                ));
            }
        }
        Ok(())
    }
}
