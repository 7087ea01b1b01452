#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# A slave added and released under traffic.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# with eth3 coming and going.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

three() {
	policy_up cpu_bound eth0 eth1 eth2
	falls_back 3
	leaves_by 2 eth2
}

# Bonding counts a slave as up before the kernel has given it a queue, so the CPU
# that gets it may lose packets, as in any mode. The others do not.
add() {
	open_sink
	start_traffic 0 1 2
	ip link set eth3 down
	ip link set eth3 master "$BOND"
	wait_for 10 map_is 3 eth3 irq
	wait_for 10 slave_up eth3
	sleep 0.5
	stop_traffic
	nothing_lost
	leaves_by 3 eth3
}

release() {
	start_traffic 0 1 2 3
	ip link set eth3 nomaster
	falls_back 3 eth3
	sleep 0.5
	stop_traffic
	all_settled
	# What was in the slave's own ring is lost with it, but nothing after that.
	open_sink
	send 3 300 many
	arrive 300
	check_eq "slaves" "$(slaves)" "eth0 eth1 eth2"
}

again_and_again() {
	start_traffic 0 1 2 3
	for _ in 1 2 3 4 5 6; do
		ip link set eth3 down
		ip link set eth3 master "$BOND"
		ip link set eth0 nomaster
		ip link set eth0 down
		ip link set eth0 master "$BOND"
		ip link set eth3 nomaster
	done
	stop_traffic
	check_ge "packets sent meanwhile" "$SENT" 100
	wait_for 10 map_is 0 eth0 irq
	wait_for 10 slave_up eth0
	wait_for 10 falls_back 3 eth3
	leaves_by 0 eth0
}

ktap_plan 4
ktap_run "a CPU without a slave falls back" three
ktap_run "a slave added under traffic takes its CPU, and the others lose nothing" add
ktap_run "a slave released under traffic leaves its CPU to a fallback" release
ktap_run "slaves that come and go under traffic leave the map right" again_and_again
ktap_finished
