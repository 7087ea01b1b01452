#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The peers that `cpubond bench` measures send by the NICs that they should; and
# `cpubond bench native` runs over all of them. Function only: there is no time here.
#
# vm: cpus=4 nics=4 peer=none timeout=300
. "$(dirname "$0")/lib.sh"

COUNT=40

# far_end MODE: the peer's end, as `cpubond bench tx` makes it.
far_end() {
	peer_do "/cpubond/guest/peer.sh $1
		[ $1 != none ] || for dev in /sys/class/net/eth*; do
			dev=\${dev##*/}
			ip addr flush dev \$dev
			ip addr add 10.1.\${dev#eth}.2/24 dev \$dev
		done"
}

# sent PEER: set it up and send COUNT packets from each CPU; how many left by each NIC.
sent() {
	local place="--peer $1 --cpus 4 --nics 4 --queues 1"
	# shellcheck disable=SC2086 # words
	cpubond bench set-up $place && cpubond bench send $place --generator pktgen --count $COUNT |
		jq -r '.by_nic | join(" ")'
}

# by_own PEER: each CPU's packets leave by its own NIC.
by_own() {
	local by nic
	by=$(sent "$1")
	note "$1: $by"
	for nic in $by; do
		# Those of LACP are counted too.
		check_ge "packets by a NIC" "$nic" "$COUNT"
		check_le "packets by a NIC" "$nic" $((COUNT + 10))
	done
}

# by_all PEER: every NIC has a part of it, whoever sends.
by_all() {
	local by nic
	by=$(sent "$1")
	note "$1: $by"
	for nic in $by; do
		check_ge "packets by a NIC" "$nic" 10
	done
}

# by_first PEER: one NIC has all of it.
by_first() {
	local by
	by=$(sent "$1")
	note "$1: $by"
	check_match "packets by NIC" "$by" '^[0-9]{3} 0 0 0$'
}

raw() {
	far_end none
	by_own raw-private
	by_first raw-shared
}

static() {
	far_end balance-xor
	"$1" "$2"
}

lacp() {
	far_end 802.3ad
	by_all 802.3ad
	by_own 802.3ad+cpu_bound
}

backup() {
	far_end active-backup
	by_first active-backup
}

# A request is answered over each kind of connection.
sockets() {
	local place generator
	far_end balance-xor
	peer_do "setsid cpubond bench answer </dev/null >/dev/null 2>&1 &"
	for place in cpu_bound team-cpu; do
		place="--peer $place --cpus 4 --nics 4 --queues 1"
		# shellcheck disable=SC2086 # words
		cpubond bench set-up $place
		for generator in udp tcp; do
			# shellcheck disable=SC2086 # words
			check_eq "packets by $generator" \
				"$(cpubond bench send $place --generator $generator --count 20 | jq .packets)" 80
		done
	done
}

native() {
	local out affinity
	far_end 802.3ad
	cpubond bench set-up --peer raw-private --cpus 4 --nics 4 --queues 1
	check_fails cpubond bench native --nics eth0 --to 10.1.0.2 --to-mac 52:54:00:00:02:ff
	for nic in $(nics); do
		ip addr flush dev "$nic"
		bind_irq "$nic" 3
	done
	affinity=$(nic_irqs eth0 | while read -r irq; do cat "/proc/irq/$irq/smp_affinity_list"; done)
	out=$(cpubond bench native --nics eth0,eth1,eth2,eth3 --to 10.0.0.2 --to-mac 52:54:00:00:02:ff \
		--packets 40 --rounds 1 --output /tmp/native.json)
	note "$out"
	check_eq "peers measured" "$(jq '.rounds | length' /tmp/native.json)" 11
	check_eq "peers left out" "$(jq '.left_out | length' /tmp/native.json)" 0
	check_eq "packets" "$(jq -c '[.rounds[].packets] | unique' /tmp/native.json)" '[160]'
	check_eq "time of each" "$(jq '[.rounds[] | select(.packets_per_second > 0)] | length' /tmp/native.json)" 11
	[ ! -e "$SYS/bench0" ] || fail "the last peer is still there"
	check_eq "interrupts as they were" \
		"$(nic_irqs eth0 | while read -r irq; do cat "/proc/irq/$irq/smp_affinity_list"; done)" "$affinity"
}

ktap_plan 11
ktap_run "bare NICs, private and shared" raw
ktap_run "balance-rr sends by all" static by_all balance-rr
ktap_run "balance-xor sends by all" static by_all balance-xor
ktap_run "team with a flow hash sends by all" static by_all team-hash
ktap_run "team with a hash that is the CPU sends by its own" static by_own team-cpu
ktap_run "queue_id, set by a tc program, sends by its own" static by_own queue_id-bpf
ktap_run "cpu_bound sends by its own" static by_own cpu_bound
ktap_run "802.3ad sends by all, with cpu_bound by its own" lacp
ktap_run "active-backup sends by one" backup
ktap_run "sockets send and are answered" sockets
ktap_run "bench native measures all, and puts back what it found" native
ktap_finished
