// SPDX-License-Identifier: GPL-2.0

//! What bindgen makes of `include/net/bond_xmit.h`. For [`bond`](super::bond) only.

#![allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    improper_ctypes,
    unsafe_op_in_unsafe_fn
)]

use kernel::bindings::{device, module};

include!(env!("BOND_XMIT_BINDINGS"));
