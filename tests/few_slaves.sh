#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Two slaves on four CPUs: the CPUs without one of their own share the two.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1
#     CPU 2 ⇄ eth1 ───────────────────────────── eth1
#     CPU 3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
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

own() {
	leaves_by 0 eth0
	leaves_by 2 eth1
}

# shared CPU: equally near to both, by flow.
shared() {
	falls_back "$1"
	has_slave "$1" eth0
	has_slave "$1" eth1
	spreads "$1" 200 eth0 eth1
}

one_flow() {
	local eth0 eth1
	eth0=$(cpu_stat eth0 1 remote)
	eth1=$(cpu_stat eth1 1 remote)
	send 1 200 one
	eth0=$(($(cpu_stat eth0 1 remote) - eth0))
	eth1=$(($(cpu_stat eth1 1 remote) - eth1))
	note "one flow: $eth0 by eth0, $eth1 by eth1"
	check_eq "packets of one flow" $((eth0 + eth1)) 200
	check_eq "packets that left the flow's slave" $((eth0 < eth1 ? eth0 : eth1)) 0
}

ktap_plan 5
ktap_run "two of four CPUs have a slave" up
ktap_run "those send by it" own
ktap_run "CPU 1 shares both by flow" shared 1
ktap_run "CPU 3 shares both by flow" shared 3
ktap_run "a flow keeps its slave" one_flow
ktap_finished
