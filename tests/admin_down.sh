#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# A slave set down: its CPU falls back, and gets it again.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# with eth1 set down.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

down() {
	policy_up
	leaves_by 1 eth1
	start_traffic 0 1 2 3
	ip link set eth1 down
	wait_for 10 falls_back 1 eth1
	sleep 0.5
	stop_traffic
	all_settled
	open_sink
	send 1 300 many
	arrive 300
	leaves_by 2 eth2
}

# CPU 1 may lose packets: bonding counts a slave as up before it has a queue.
back() {
	open_sink
	start_traffic 0 2 3
	ip link set eth1 up
	wait_for 10 map_is 1 eth1 irq
	wait_for 10 slave_up eth1
	sleep 0.5
	stop_traffic
	nothing_lost
	leaves_by 1 eth1
}

ktap_plan 2
ktap_run "a slave set down under traffic leaves its CPU to a fallback" down
ktap_run "set up, it is its CPU's again, and the others lose nothing" back
ktap_finished
