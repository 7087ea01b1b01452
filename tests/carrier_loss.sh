#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# A slave that loses carrier: its CPU falls back, and gets it again.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# with the cable of eth1 pulled.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

lost() {
	policy_up
	leaves_by 1 eth1
	start_traffic 0 1 2 3
	set_link eth1 off
	wait_for 10 falls_back 1 eth1
	sleep 0.5
	stop_traffic
	all_settled
	note "CPU 1 falls back to: $(bond_map 1)"
}

fallback() {
	local before after nic
	before=0 after=0
	for nic in eth0 eth2 eth3; do
		before=$((before + $(cpu_stat "$nic" 1 remote)))
	done
	open_sink
	send 1 300 many
	arrive 300
	for nic in eth0 eth2 eth3; do
		after=$((after + $(cpu_stat "$nic" 1 remote)))
	done
	check_eq "packets of CPU 1 that count as remote" $((after - before)) 300
	leaves_by 2 eth2
}

# CPU 1 may lose packets: bonding counts a slave as up before it has a queue.
back() {
	open_sink
	start_traffic 0 2 3
	set_link eth1 on
	wait_for 10 map_is 1 eth1 irq
	wait_for 10 slave_up eth1
	sleep 0.5
	stop_traffic
	nothing_lost
	leaves_by 1 eth1
}

all_lost() {
	local nic
	for nic in eth0 eth1 eth2 eth3; do
		set_link "$nic" off
	done
	wait_for 10 map_is 1 - any
	send 1 10 || note "the kernel refuses to send, as it may"
	for nic in eth0 eth1 eth2 eth3; do
		set_link "$nic" on
	done
	wait_for 10 map_is 1 eth1 irq
	wait_for 10 bond_ready
	wait_for 10 slave_up eth1
	leaves_by 1 eth1
}

ktap_plan 4
ktap_run "carrier loss under traffic moves the CPU to a fallback" lost
ktap_run "the fallback delivers all packets and counts them as remote" fallback
ktap_run "carrier gives the CPU its slave back, and the others lose nothing" back
ktap_run "no carrier at all leaves no slave, and carrier brings all back" all_lost
ktap_finished
