#!/bin/bash
# Build the profiler, a plugin that QEMU of the build root loads. For this host's own
# target, as a library cannot be static; it needs no more of the C library than an older
# Debian has, so it loads beside the root's.
#
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

command -v cargo >/dev/null ||
	die "cargo is missing: install Rust 1.88 or newer (https://rustup.rs)"
need cc gcc libc6-dev

cd "$TOP"
exec cargo build --quiet --release --locked -p profiler
