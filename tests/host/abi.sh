#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Stock drivers, mlx5 among them, read struct bonding and struct slave: every
# member of the stock kernel's has to be where it was. Asks BTF, in which both
# kernels say where their members are.
#
# Runs in the build root, after the modules were built.
# KDIR: the header tree, with vmlinux for its BTF. STOCK: the stock bonding.ko*.
. "$(dirname "$0")/../lib.sh"

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
xz -dkc "$STOCK" >"$tmp/stock.ko"

# members FILE STRUCT: "NAME OFFSET-IN-BITS" a line, in order
members() {
	bpftool -j -B "$KDIR/vmlinux" btf dump file "$1" 2>/dev/null |
		jq -r --arg s "$2" '[.types[] | select(.kind == "STRUCT" and .name == $s)][0]
			.members[] | "\(.name) \(.bits_offset)"'
}

same_offsets() {
	local count
	members "$tmp/stock.ko" "$1" >"$tmp/stock"
	members "$(dirname "$0")/../../target/modules/bonding.ko" "$1" >"$tmp/ours"

	count=$(wc -l <"$tmp/stock")
	check_ge "members of stock struct $1" "$count" 20
	# New members come last, so the stock ones are our first.
	head -n "$count" "$tmp/ours" | diff "$tmp/stock" - ||
		fail "struct $1: stock members have moved (< stock, > ours)"
	note "struct $1: $count members are where they were, and $(($(wc -l <"$tmp/ours") - count)) are new"
}

ktap_plan 2
ktap_run "struct bonding keeps the offsets of its stock members" same_offsets bonding
ktap_run "struct slave keeps the offsets of its stock members" same_offsets slave
ktap_finished
