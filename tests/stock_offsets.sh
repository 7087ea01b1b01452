#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Drivers built for the stock kernel read the bond's structures: our bonding has every
# member of theirs where they expect it. No topology; both modules are only read.
#
# vm: cpus=4 nics=4 queues=1 peer=none timeout=60
. "$(dirname "$0")/lib.sh"

MODULES=/lib/modules/$(uname -r)

# members MODULE STRUCT: "NAME BIT" a line, from the module's BTF.
members() {
	bpftool -B /sys/kernel/btf/vmlinux btf dump file "$1" | awk -v struct="'$2'" '
		/^\[/ { inside = $2 == "STRUCT" && $3 == struct }
		inside && sub("bits_offset=", "", $3) { print $1, $3 }
	' | sort -u
}

same() {
	local stock ours count
	stock=$(find "$MODULES/kernel" -name 'bonding.ko*')
	ours=$(modinfo -F filename bonding)
	check_match "our bonding" "$ours" /updates/
	members "$stock" "$1" >/tmp/stock
	members "$ours" "$1" >/tmp/ours
	count=$(wc -l </tmp/stock)
	check_ge "members of the stock struct $1" "$count" "$2"
	check_eq "stock members of struct $1 that are elsewhere in ours" \
		"$(comm -23 /tmp/stock /tmp/ours)" ""
	note "struct $1: $count members of the stock driver, $(wc -l </tmp/ours) of ours"
}

ktap_plan 4
ktap_run "struct bonding" same bonding 25
ktap_run "struct slave" same slave 20
ktap_run "struct bond_params" same bond_params 25
ktap_run "struct bond_up_slave" same bond_up_slave 3
ktap_finished
