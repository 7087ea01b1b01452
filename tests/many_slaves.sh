#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Four slaves on two CPUs: each CPU shares its two by flow, and leaves the others alone.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 0 ⇄ eth2 ───────────────────────────── eth2
#     CPU 1 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=2 nics=4 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

up() {
	local k
	for k in 0 1 2 3; do
		bind_irq "eth$k" $((k % 2))
	done
	bond_up cpu_bound
	open_sink
	wait_for 10 map_is 0 eth0,eth2 irq
	wait_for 10 map_is 1 eth1,eth3 irq
	all_up
}

one_flow() {
	local eth0 eth2
	eth0=$(cpu_stat eth0 0 local)
	eth2=$(cpu_stat eth2 0 local)
	send 0 200 one
	eth0=$(($(cpu_stat eth0 0 local) - eth0))
	eth2=$(($(cpu_stat eth2 0 local) - eth2))
	note "one flow: $eth0 by eth0, $eth2 by eth2"
	check_eq "packets of one flow" $((eth0 + eth2)) 200
	check_eq "packets that left the flow's slave" $((eth0 < eth2 ? eth0 : eth2)) 0
}

half() {
	ip link set eth2 down
	wait_for 10 map_is 0 eth0 irq
	leaves_by 0 eth0
	ip link set eth2 up
	wait_for 10 map_is 0 eth0,eth2 irq
	wait_for 10 slave_up eth2
	spreads 0 200 eth0 eth2
}

ktap_plan 5
ktap_run "each CPU has two slaves" up
ktap_run "CPU 0 shares its two by flow" spreads 0 200 eth0 eth2
ktap_run "CPU 1 shares its two by flow" spreads 1 200 eth1 eth3
ktap_run "a flow keeps its slave" one_flow
ktap_run "a CPU that loses one of its slaves sends all by the other" half
ktap_finished
