#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Bad values are refused by every sysfs file, and change nothing.
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

CPUS=$SYS/eth0/bonding_slave/cpus
BONDING=$SYS/$BOND/bonding

cpus() {
	local bad map
	policy_up
	echo 0-1 >"$CPUS"
	wait_for 10 map_is 0 eth0 set
	map=$(cat "$BONDING/cpu_bound_map")
	for bad in x 0-x 1- -1 3-1 0,x 0x1 4 0-4 99999 4294967296 99999999999999999999 "$(printf '0,%.0s' {1..1500})x"; do
		check_fails put "$bad" "$CPUS"
		check_eq "cpus after '${bad:0:20}'" "$(cat "$CPUS")" 0-1
	done
	check_eq "map" "$(cat "$BONDING/cpu_bound_map")" "$map"
	leaves_by 1 eth0
}

# What is right, however it is written.
cpus_good() {
	local good
	for good in 0,1 " 0-1 " 1,0 0-1,1; do
		put "$good" "$CPUS"
		check_eq "cpus after '$good'" "$(cat "$CPUS")" 0-1
	done
	put 0-3 "$CPUS"
	check_eq "all CPUs" "$(cat "$CPUS")" 0-3
	put "" "$CPUS"
	check_eq "no CPU" "$(cat "$CPUS")" ""
}

read_only() {
	check_fails put x "$BONDING/cpu_bound_map"
	check_fails put 0 "$SYS/eth0/bonding_slave/cpu_bound_stats"
	check_eq "mode of cpu_bound_map" "$(stat -c %a "$BONDING/cpu_bound_map")" 444
	check_eq "mode of cpu_bound_stats" "$(stat -c %a "$SYS/eth0/bonding_slave/cpu_bound_stats")" 444
	check_eq "mode of cpus" "$(stat -c %a "$CPUS")" 644
	leaves_by 0 eth0
}

modes() {
	local bad
	bond_down
	ip link add "$BOND" type bond
	for bad in cpu_boun cpu_bounds CPU_BOUND 8 -1 255 cpu-bound; do
		check_fails put "$bad" "$BONDING/mode"
		check_eq "mode after '$bad'" "$(cat "$BONDING/mode")" "balance-rr 0"
	done
}

hash_policies() {
	local bad
	echo balance-xor >"$BONDING/mode"
	for bad in cpu_boun cpu_bounds 7 -1 255; do
		check_fails put "$bad" "$BONDING/xmit_hash_policy"
		check_eq "xmit_hash_policy after '$bad'" "$(cat "$BONDING/xmit_hash_policy")" "layer2 0"
	done
}

# The policy decides in balance-xor and 802.3ad only.
hash_policy_elsewhere() {
	local mode
	for mode in balance-rr active-backup broadcast balance-tlb balance-alb cpu_bound; do
		echo "$mode" >"$BONDING/mode"
		check_fails put cpu_bound "$BONDING/xmit_hash_policy"
		check_eq "xmit_hash_policy in $mode" "$(cat "$BONDING/xmit_hash_policy")" "layer2 0"
	done
}

works_after() {
	policy_up
	leaves_by 2 eth2
}

ktap_plan 7
ktap_run "a list of CPUs that is wrong is refused" cpus
ktap_run "a list of CPUs is taken however it is written" cpus_good
ktap_run "what only reads cannot be written" read_only
ktap_run "a mode that does not exist is refused" modes
ktap_run "a hash policy that does not exist is refused" hash_policies
ktap_run "the hash policy is refused in modes that do not hash" hash_policy_elsewhere
ktap_run "and the policy works after all that" works_after
ktap_finished
