#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Without a module that provides the policy, the mode is refused with a reason.
#
#   server bond0 (cpu_bound: no module)
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=60
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

BONDING=$SYS/$BOND/bonding
MODPROBE=/proc/sys/kernel/modprobe
LOADER=$(cat "$MODPROBE")

# No module loads by itself.
gone() {
	bond_down
	modprobe bonding max_bonds=0
	rmmod bond_cpu_bound 2>/dev/null || :
	ip link add "$BOND" type bond
	dmesg -C
	echo /bin/false >"$MODPROBE"
	trap 'echo "$LOADER" >"$MODPROBE"' EXIT
	"$@"
}

mode() {
	check_fails put cpu_bound "$BONDING/mode"
	check_eq "mode" "$(cat "$BONDING/mode")" "balance-rr 0"
	check_match "kernel log" "$(dmesg)" "no module provides"
}

hash_policy() {
	echo balance-xor >"$BONDING/mode"
	check_fails put cpu_bound "$BONDING/xmit_hash_policy"
	check_eq "xmit_hash_policy" "$(cat "$BONDING/xmit_hash_policy")" "layer2 0"
	check_match "kernel log" "$(dmesg)" "no module provides"
}

with_it() {
	policy_up
	leaves_by 1 eth1
}

ktap_plan 3
ktap_run "the mode is refused, and the log says why" gone mode
ktap_run "so is the hash policy" gone hash_policy
ktap_run "with the module the bond works" with_it
ktap_finished
