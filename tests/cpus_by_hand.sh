#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# CPUs set by hand win over interrupts, until an empty line gives the slave back.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# with eth0 set to CPUs 2-3 by hand.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

CPUS=$SYS/eth0/bonding_slave/cpus

automatic() {
	policy_up
	check_eq "cpus of a slave that nobody set" "$(cat "$CPUS")" ""
	leaves_by 2 eth2
}

by_hand() {
	echo 2-3 >"$CPUS"
	check_eq "cpus read back" "$(cat "$CPUS")" 2-3
	wait_for 10 map_is 2 eth0 set
	wait_for 10 map_is 3 eth0 set
	leaves_by 2 eth0
	leaves_by 3 eth0
}

# eth0 still interrupts CPU 0, which says nothing now.
left() {
	wait_for 10 falls_back 0
	map_is 1 eth1 irq
	leaves_by 1 eth1
}

given_back() {
	echo >"$CPUS"
	check_eq "cpus read back" "$(cat "$CPUS")" ""
	wait_for 10 map_is 2 eth2 irq
	wait_for 10 map_is 0 eth0 irq
	leaves_by 2 eth2
	leaves_by 0 eth0
}

# Several slaves may be set to one CPU.
overlap() {
	echo 1 >"$CPUS"
	echo 1 >"$SYS/eth3/bonding_slave/cpus"
	wait_for 10 map_is 1 eth0,eth3 set
	spreads 1 200 eth0 eth3
}

ktap_plan 5
ktap_run "a slave follows its interrupts until it is set" automatic
ktap_run "CPUs set by hand send by that slave" by_hand
ktap_run "the CPU that the slave interrupts falls back" left
ktap_run "an empty line goes back to automatic" given_back
ktap_run "two slaves set to one CPU share its flows" overlap
ktap_finished
