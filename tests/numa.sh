#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Two sockets: a CPU without a slave of its own sends by that of its socket.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     socket 0: CPU 0 ⇄ eth0 ─────────────────── eth0
#               CPU 1
#     socket 1: CPU 2 ⇄ eth1 ─────────────────── eth1
#               CPU 3
#
# vm: cpus=4 nics=2 sockets=2 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

up() {
	bind_irq eth0 0
	bind_irq eth1 2
	bond_up cpu_bound eth0 eth1
	open_sink
	wait_for 10 map_is 0 eth0 irq
	wait_for 10 map_is 2 eth1 irq
	all_up
}

# nearest CPU SLAVE
nearest() {
	falls_back "$1"
	note "CPU $1: $(bond_map "$1")"
	check_match "map of CPU $1" "$(bond_map "$1")" "^$2 (smt|llc|node)$"
	spreads "$1" 200 "$2"
}

# With the slave of its socket gone, the other is better than none.
far() {
	ip link set eth0 down
	wait_for 10 map_is 1 eth1
	check_match "map of CPU 1" "$(bond_map 1)" "^eth1 (node|any)$"
	spreads 1 200 eth1
}

ktap_plan 4
ktap_run "one CPU of each socket has a slave" up
ktap_run "CPU 1 sends by the slave of its socket" nearest 1 eth0
ktap_run "CPU 3 sends by the slave of its socket" nearest 3 eth1
ktap_run "a socket without a slave sends by the other's" far
ktap_finished
