#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# A bond with no slaves has a map that says so, drops what it is given, and works
# with the first slave it gets.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     (nothing, then eth0) ───────────────────── eth0
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=60
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

empty() {
	local cpu
	modprobe bonding max_bonds=0
	ip link add "$BOND" type bond miimon 50
	echo cpu_bound >"$SYS/$BOND/bonding/mode"
	ip address add "$SERVER_IP/24" dev "$BOND"
	ip link set "$BOND" up
	for cpu in 0 1 2 3; do
		check_eq "map of CPU $cpu" "$(bond_map "$cpu")" "- any"
	done
	check_eq "lines of the map" "$(wc -l <"$SYS/$BOND/bonding/cpu_bound_map")" 4
}

drops() {
	open_sink
	send 1 20 || note "the kernel refuses to send, as it may"
	ping -q -c 3 -i 0.05 -W 1 -I "$BOND" "$PEER_IP" || note "no answer, as it should be"
	check_eq "packets that arrived" "$(received)" 0
}

first() {
	bind_irq eth0 0
	ip link set eth0 down
	ip link set eth0 master "$BOND"
	wait_for 10 map_is 0 eth0 irq
	wait_for 10 bond_ready
	wait_for 10 slave_up eth0
	# The bond has taken the slave's address, and its neighbours were forgotten.
	open_sink
	leaves_by 0 eth0
	falls_back 2
	spreads 2 100 eth0
}

last() {
	ip link set eth0 nomaster
	check_eq "map of CPU 0" "$(bond_map 0)" "- any"
	send 0 20 || note "the kernel refuses to send, as it may"
	ip link del "$BOND"
}

ktap_plan 4
ktap_run "a bond with no slaves maps no CPU" empty
ktap_run "it sends nothing" drops
ktap_run "its first slave serves every CPU" first
ktap_run "without its last slave it is empty again" last
ktap_finished
