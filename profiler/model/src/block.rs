//! A translated block of instructions, and what it means in the open region.

use crate::calls::Step;
use crate::class::Class;
use crate::context::Place;
use std::sync::atomic::{AtomicU64, Ordering};

/// A translated block. Lives as long as QEMU.
pub struct Block {
    /// Address of its first instruction.
    pub pc: u64,
    /// How many instructions.
    pub insns: u64,
    /// Its last one returns from an interrupt (or synchronises the core).
    pub iret: bool,
    /// [`Meaning`], packed, with the number of the region it was looked up for.
    meaning: AtomicU64,
}

/// What a block means in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meaning {
    /// Number of its function in the region.
    pub function: u32,
    /// The function's own class.
    pub class: Class,
    /// It begins the function.
    pub entry: bool,
    /// What it tells of where the CPU is.
    pub place: Place,
    /// A packet begins here.
    pub mark: bool,
    /// One of the region's ranges begins or ends here.
    pub range: bool,
}

impl Block {
    /// A block that has not run yet.
    pub fn new(pc: u64, insns: u64, iret: bool) -> Self {
        Self {
            pc,
            insns,
            iret,
            meaning: AtomicU64::new(0),
        }
    }

    /// User space is the lower half.
    pub fn is_user(&self) -> bool {
        self.pc >> 63 == 0
    }

    /// What it means in region `number` (from 1); looked up once.
    pub fn meaning(
        &self,
        number: u16,
        look_up: impl FnOnce(&Self) -> Option<Meaning>,
    ) -> Option<Meaning> {
        // One word: another CPU sees either the old or the new one.
        let word = self.meaning.load(Ordering::Relaxed);
        if word as u16 == number {
            return Some(Meaning::unpack(word));
        }
        let meaning = look_up(self)?;
        self.meaning.store(meaning.pack(number), Ordering::Relaxed);
        Some(meaning)
    }
}

impl Meaning {
    /// For [`crate::calls`].
    pub fn step(self) -> Step {
        Step {
            function: self.function,
            entry: self.entry,
            own: self.class,
        }
    }

    fn pack(self, number: u16) -> u64 {
        u64::from(number)
            | (self.class as u64) << 16
            | (self.place as u64) << 20
            | u64::from(self.mark) << 28
            | u64::from(self.range) << 29
            | u64::from(self.entry) << 30
            | u64::from(self.function) << 32
    }

    fn unpack(word: u64) -> Self {
        Self {
            function: (word >> 32) as u32,
            // Only `pack` makes them, so both are there.
            class: Class::ALL[(word >> 16 & 0xf) as usize],
            place: Place::ALL[(word >> 20 & 0xff) as usize],
            mark: word >> 28 & 1 != 0,
            range: word >> 29 & 1 != 0,
            entry: word >> 30 & 1 != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_looked_up_once_a_region() {
        let block = Block::new(0xffff_ffff_8100_0000, 3, false);
        let meaning = Meaning {
            function: 0x0012_3456,
            class: Class::User,
            entry: true,
            place: Place::PathEntry,
            mark: true,
            range: false,
        };
        let other = Meaning {
            function: 7,
            entry: false,
            mark: false,
            range: true,
            ..meaning
        };
        assert_eq!(block.meaning(1, |_| None), None);
        assert_eq!(block.meaning(1, |_| Some(meaning)), Some(meaning));
        assert_eq!(block.meaning(1, |_| Some(other)), Some(meaning));
        assert_eq!(block.meaning(2, |_| Some(other)), Some(other));
        assert!(!block.is_user() && Block::new(0x40_0000, 1, false).is_user());
    }
}
