//! What is read off an instruction's bytes.

use crate::region::{CLOSE, OPEN, marker};

/// What the plugin needs to know of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Plain,
    /// Reads and writes its memory operand in one.
    Atomic,
    /// Stores the stack pointer of the task that is switched out, into that task.
    SwitchOut,
    /// Loads the stack pointer of the task that is switched in, from that task.
    SwitchIn,
    /// Returns from an interrupt.
    InterruptReturn,
    /// Opens a region.
    Open,
    /// Closes it.
    Close,
}

/// Tell it from its bytes.
pub fn kind(bytes: &[u8], user: bool) -> Kind {
    if bytes == marker(OPEN) {
        return Kind::Open;
    }
    if bytes == marker(CLOSE) {
        return Kind::Close;
    }
    if !user {
        match bytes {
            [0x48, 0xcf] => return Kind::InterruptReturn,
            // As in `__switch_to_asm`: mov %rsp,disp32(%rdi); mov disp32(%rsi),%rsp.
            [0x48, 0x89, 0xa7, ..] => return Kind::SwitchOut,
            [0x48, 0x8b, 0xa6, ..] => return Kind::SwitchIn,
            _ => {}
        }
    }
    let mut rest = bytes;
    while let [prefix, more @ ..] = rest {
        match prefix {
            0xf0 => return Kind::Atomic,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf2 | 0xf3 | 0x40..=0x4f => rest = more,
            _ => break,
        }
    }
    match rest {
        // xchg with memory locks by itself.
        [0x86 | 0x87, modrm, ..] if modrm >> 6 != 3 => Kind::Atomic,
        _ => Kind::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_told_from_its_bytes() {
        for (bytes, expected) in [
            (&[0x90][..], Kind::Plain),
            // mov (%rax),%rax; xchg %rax,%rbx; a no-op like the marker.
            (&[0x48, 0x8b, 0x00], Kind::Plain),
            (&[0x48, 0x87, 0xd8], Kind::Plain),
            (&[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0], Kind::Plain),
            // lock xadd; lock cmpxchg16b %gs:; xchg %eax,(%rdi); repne-prefixed xchg.
            (&[0xf0, 0x48, 0x0f, 0xc1, 0x07], Kind::Atomic),
            (&[0x65, 0xf0, 0x48, 0x0f, 0xc7, 0x0e], Kind::Atomic),
            (&[0x87, 0x07], Kind::Atomic),
            (&[0xf2, 0x48, 0x87, 0x07], Kind::Atomic),
            (&[0x48, 0xcf], Kind::InterruptReturn),
            (&[0x48, 0x89, 0xa7, 0x98, 0x1a, 0, 0], Kind::SwitchOut),
            (&[0x48, 0x8b, 0xa6, 0x98, 0x1a, 0, 0], Kind::SwitchIn),
            (&marker(OPEN), Kind::Open),
            (&marker(CLOSE), Kind::Close),
            (&[], Kind::Plain),
        ] {
            assert_eq!(kind(bytes, false), expected, "{bytes:x?}");
        }
        // A program's own stack switch is none of the kernel's.
        assert_eq!(kind(&[0x48, 0x89, 0xa7, 0, 0, 0, 0], true), Kind::Plain);
    }
}
