//! The part of the profiler that knows nothing of QEMU: what a conflict and a transfer
//! is, how accesses are replayed in other orders, what a function's work is part of, and
//! the files that plugin and helper exchange.

pub mod block;
pub mod calls;
pub mod class;
pub mod context;
pub mod counts;
pub mod cpu;
pub mod instruction;
pub mod line;
pub mod lines;
pub mod region;
pub mod replay;
pub mod session;
pub mod symbols;
pub mod trace;
