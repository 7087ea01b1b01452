#!/bin/bash
# Build the static `cpubond`: the same file runs on this host and in the guests.
#
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

command -v cargo >/dev/null ||
	die "cargo is missing: install Rust 1.88 or newer (https://rustup.rs)"
need cc gcc libc6-dev
# For the BPF programs.
need clang clang
need /usr/include/bpf/bpf_helpers.h libbpf-dev

cd "$TOP"
# A target named explicitly keeps the flags away from build scripts and procedural
# macros, which cannot be static.
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"
exec cargo build --quiet --release --locked --target x86_64-unknown-linux-gnu
