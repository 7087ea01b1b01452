//! All cache lines, by physical address. Locked in parts, so that virtual CPUs seldom wait
//! for each other; the order of accesses to one line is that of the host.

use crate::line::{Access, Cost, Line};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, PoisonError};

const PARTS: usize = 256;

/// The table.
pub struct Lines {
    parts: Vec<Mutex<Map<Line>>>,
}

/// A map by line number.
pub type Map<T> = HashMap<u64, T, BuildHasherDefault<Multiply>>;

/// Line numbers need no defence against chosen keys, and this is on the path of every
/// access.
#[derive(Default)]
pub struct Multiply(u64);

impl Hasher for Multiply {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }

    fn write_u64(&mut self, n: u64) {
        // The table takes its bits from both ends.
        let product = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

impl Default for Lines {
    /// None touched.
    fn default() -> Self {
        Self {
            parts: (0..PARTS).map(|_| Mutex::default()).collect(),
        }
    }
}

impl Lines {
    /// Forget all.
    pub fn clear(&self) {
        for part in &self.parts {
            *part.lock().unwrap_or_else(PoisonError::into_inner) = Map::default();
        }
    }

    /// A CPU accesses a line.
    pub fn access(&self, line: u64, cpu: usize, access: Access) -> Cost {
        self.parts[line as usize % PARTS]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(line)
            .or_default()
            .access(cpu, access)
    }
}
