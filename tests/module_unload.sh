#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The policy's module stays for as long as a bond uses it, goes when none does, comes back.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

MODULE=bond_cpu_bound

loaded() { grep -q "^$MODULE " /proc/modules; }
users() { awk -v module="$MODULE" '$1 == module { print $3 }' /proc/modules; }

in_use() {
	policy_up
	loaded
	check_fails rmmod "$MODULE"
	loaded
	leaves_by 2 eth2
}

two_bonds() {
	ip link add bond1 type bond
	echo cpu_bound >"$SYS/bond1/bonding/mode"
	check_eq "uses of the module by two bonds" "$(users)" 2
	ip link del bond1
	check_eq "uses of the module by one bond" "$(users)" 1
	check_fails rmmod "$MODULE"
}

unused() {
	bond_down
	check_eq "uses of the module by no bond" "$(users)" 0
	rmmod "$MODULE"
	! loaded
}

reload() {
	policy_up
	loaded
	leaves_by 1 eth1
}

# By turns, with a bond that goes while packets are on their way.
again_and_again() {
	for _ in 1 2 3; do
		bond_up cpu_bound
		ip neigh replace "$SINK" lladdr "$(peer_mac)" dev "$BOND" nud permanent
		start_traffic 0 1 2 3
		bond_down
		rmmod "$MODULE"
		stop_traffic
	done
	policy_up
	leaves_by 3 eth3
}

other_mode() {
	bond_up balance-xor
	rmmod "$MODULE"
	! loaded
}

ktap_plan 6
ktap_run "the module does not unload while a bond uses it" in_use
ktap_run "each bond holds the module for itself" two_bonds
ktap_run "the module unloads when no bond uses it" unused
ktap_run "the next bond loads it again" reload
ktap_run "a bond deleted under traffic leaves a module that unloads" again_and_again
ktap_run "a bond in another mode does not hold it" other_mode
ktap_finished
