#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The mode changes only while the bond is down and empty.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

MODE=$SYS/$BOND/bonding/mode

refused_up() {
	policy_up
	check_fails put balance-rr "$MODE"
	check_eq "mode" "$(cat "$MODE")" "cpu_bound 7"
	leaves_by 2 eth2
}

refused_with_slaves() {
	ip link set "$BOND" down
	check_fails put balance-rr "$MODE"
	check_eq "mode" "$(cat "$MODE")" "cpu_bound 7"
}

refused_into() {
	bond_up balance-rr
	check_fails put cpu_bound "$MODE"
	check_eq "mode" "$(cat "$MODE")" "balance-rr 0"
	check_eq "map" "$(cat "$SYS/$BOND/bonding/cpu_bound_map")" ""
	ping -q -c 5 -i 0.05 -W 2 "$PEER_IP"
}

allowed() {
	bond_down
	ip link add "$BOND" type bond
	echo cpu_bound >"$MODE"
	check_eq "lines of the map" "$(wc -l <"$SYS/$BOND/bonding/cpu_bound_map")" 4
	echo active-backup >"$MODE"
	check_eq "map" "$(cat "$SYS/$BOND/bonding/cpu_bound_map")" ""
	echo 7 >"$MODE"
	check_eq "mode" "$(cat "$MODE")" "cpu_bound 7"
}

works_after() {
	policy_up
	leaves_by 1 eth1
}

ktap_plan 5
ktap_run "a bond that is up keeps its mode, and sends on" refused_up
ktap_run "a bond that is down keeps its mode while it has slaves" refused_with_slaves
ktap_run "a bond that is up does not become cpu_bound" refused_into
ktap_run "an empty bond that is down changes at will" allowed
ktap_run "and the policy works after all that" works_after
ktap_finished
