#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The helper against the real kernel: a bond made by `cpubond up` on idle NICs, whose
# interrupts move only when they fire next, and taken down again.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"

# affinities: of every queue interrupt, as asked for.
affinities() {
	local nic irq
	for nic in $(nics); do
		for irq in $(nic_irqs "$nic"); do
			echo "$nic $irq $(<"/proc/irq/$irq/smp_affinity_list")"
		done
	done
}

up() {
	affinities >/tmp/before
	# shellcheck disable=SC2046 # a list of words
	cpubond up "$BOND" $(nics) --address "$SERVER_IP/24"
	for cpu in 0 1 2 3; do
		map_is "$cpu" "eth$cpu" irq || fail "CPU $cpu: the map has '$(bond_map "$cpu")'"
	done
	check_eq "interrupts bound to one CPU" "$(affinities | grep -cE ' [0-3]$')" 8
}

shown() {
	local json
	json=$(cpubond show -j)
	check_eq "slaves that cpubond show has for CPU 0 to 3" \
		"$(jq -r '[.bonds[0].cpus[] | .slaves[]] | join(" ")' <<<"$json")" "eth0 eth1 eth2 eth3"
	check_eq "warnings of a map that is wrong" "$(grep -c 'the map' <<<"$json" || :)" 0
}

sends() {
	local cpu before
	ping -q -c 1 -W 2 "$PEER_IP"
	for cpu in 0 1 2 3; do
		before=$(slave_stat "eth$cpu" local)
		send_from "$cpu" 100
		check_ge "packets of CPU $cpu by eth$cpu" $(($(slave_stat "eth$cpu" local) - before)) 100
	done
}

down() {
	cpubond down "$BOND"
	[ ! -e "$SYS/$BOND" ] || fail "$BOND is still there"
	affinities | diff /tmp/before - || fail "interrupts are not where they were (< before, > after)"
}

ktap_plan 4
ktap_run "up binds each CPU to a slave, though no interrupt has fired yet" up
ktap_run "show has the same map, and no complaint about it" shown
ktap_run "a pinned sender's packets leave by its CPU's slave" sends
ktap_run "down puts the interrupts back" down
ktap_finished
