#!/bin/bash
# Formatting and static checks of everything here. Shows every complaint, then
# fails if there was one.
#
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

cd "$TOP"
"$TOP/scripts/kernel-tree.sh"
need cc gcc libc6-dev
need clang clang
need /usr/include/bpf/bpf_helpers.h libbpf-dev
kernel=$(root_fact kernel)
series=$(root_fact series)
headers=/usr/src/linux-headers-$kernel
source=/usr/src/linux-source-$series
failed=()

check() {
	local what=$1
	shift
	say "lint: $what"
	"$@" || failed+=("$what")
}

# The kernel's own rustfmt settings, by the root's rustfmt: the module is kernel code.
module_format() {
	in_root rustfmt --check --edition 2021 --config-path "$source/.rustfmt.toml" \
		--config skip_children=true module/*.rs
}

# As `make CLIPPY=1` does it: the compiler is replaced, nothing is linked. In a copy,
# so that what was built stays built.
module_clippy() {
	rm -rf target/clippy
	cp -a target/modules target/clippy
	in_root bash -euo pipefail -c '
		rm -f target/clippy/module/*.o target/clippy/bond_cpu_bound.*
		make -C "$1" M=/cpubond/target/clippy CC=gcc-14 CLIPPY=1 \
			KRUSTFLAGS="-Dwarnings" modules >target/clippy/log 2>&1 ||
			{ grep -A12 -E "^(error|warning)" target/clippy/log; exit 1; }
		! grep -A12 -E "^(error|warning)" target/clippy/log
	' module_clippy "$headers"
}

# sparse_report TREE: what sparse says of the driver in TREE, without line numbers.
# Trixie's sparse is older than __typeof_unqual__, for which __typeof__ will do here.
sparse_report() {
	in_root bash -euo pipefail -c '
		cd "$2"
		# It cannot read these macros, and falls silent after an error.
		sed -i "/^module_param/d; /^MODULE_[A-Z_]*(/,/);\$/d" bonding/*.c
		objects=(bonding/*.c)
		make -C "$1" M="$PWD" CC=gcc-14 C=2 CF=-D__CHECK_ENDIAN__ \
			CHECK="sparse -D__typeof_unqual__=__typeof__" "${objects[@]/%.c/.o}" >sparse.log 2>&1 ||
			{ tail -n 20 sparse.log >&2; exit 1; }
		# Proof that it ran: make only warns when it finds sparse unfit.
		if ! grep -q "^ *CHECK " sparse.log || grep "error: " sparse.log >&2; then
			echo "sparse could not do its work" >&2
			exit 1
		fi
		sed -nE "s,^.*(bonding/[a-z0-9_]+\.[ch]):[0-9:]+ ((warning|error): .*),\1: \2,p" sparse.log | sort -u
	' sparse "$headers" "$1"
}

# New complaints only: the driver as it comes has some of its own.
module_sparse() {
	rm -rf target/sparse target/sparse-stock
	cp -a target/modules target/sparse
	cp -a target/modules target/sparse-stock
	in_root bash -euc '
		rm target/sparse-stock/bonding/*
		cp "$1"/drivers/net/bonding/* target/sparse-stock/bonding/
		cp "$1"/include/net/bond*.h target/sparse-stock/include/net/
		cp "$1"/include/uapi/linux/if_bonding.h target/sparse-stock/include/uapi/linux/
	' stock "$source" &&
		sparse_report target/sparse-stock >target/sparse.stock &&
		sparse_report target/sparse >target/sparse.ours &&
		! comm -13 target/sparse.stock target/sparse.ours | grep .
}

check "rustfmt" cargo fmt --all --check
check "clippy" cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
check "rustfmt (module)" module_format
check "clippy (module)" module_clippy
check "shellcheck" in_root bash -c \
	'shopt -s nullglob; shellcheck -x scripts/*.sh .ci/run tests/*.sh tests/host/*.sh helper/src/vm/guest/*.sh'
for patch in module/patches/"$series"/*.patch; do
	check "checkpatch ${patch##*/}" in_root bash -c \
		'cd "$1" && perl scripts/checkpatch.pl --strict --quiet --codespell "/cpubond/$2"' checkpatch "$source" "$patch"
done
check "sparse" module_sparse

[ ${#failed[@]} = 0 ] || die "lint: $(printf '%s; ' "${failed[@]}")see above"
say "lint: all clean"
