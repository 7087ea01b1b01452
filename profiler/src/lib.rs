//! A QEMU TCG plugin that counts, in regions the guest opens and closes, instructions and
//! the cache lines that move between CPUs.
