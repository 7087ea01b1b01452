#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# GSO and GRO: packets much longer than the MTU pass through the bond in one piece,
# both ways, and leave by the slave of the CPU that sends them.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0, 1 ⇄ eth0 ────────────────────────── eth0
#     CPU 2, 3 ⇄ eth1 ────────────────────────── eth1
#
# NICs of several queues are taps, which take GSO packets; the others do not.
#
# vm: cpus=4 nics=2 queues=4 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"
. "$(dirname "$0")/talk.bash"

EVENTS=/sys/kernel/tracing/events/net
LONG=hist:keys=common_cpu,name:values=len

# bind_shares: the interrupts of each NIC to its two CPUs in turn.
bind_shares() {
	local nic irq first=0 turn
	for nic in eth0 eth1; do
		turn=0
		for irq in $(nic_irqs "$nic"); do
			echo $((first + turn % 2)) >"/proc/irq/$irq/smp_affinity_list"
			turn=$((turn + 1))
		done
		first=2
	done
}

offloads() {
	local dev cpu
	bind_shares
	bond_up cpu_bound
	all_up
	for cpu in 0 1 2 3; do
		wait_for 10 map_is "$cpu" "eth$((cpu / 2))" irq
	done
	for dev in "$BOND" eth0 eth1; do
		check_match "offloads of $dev" "$(ethtool -k "$dev")" "generic-segmentation-offload: on"
		check_match "offloads of $dev" "$(ethtool -k "$dev")" "generic-receive-offload: on"
	done
}

# long_on EVENT: count its packets of more than two segments, by CPU and device.
long_on() { echo "$LONG if len > 3028" >"$EVENTS/$1/trigger"; }

# long_seen EVENT: "CPU DEV COUNT BYTES" a line.
long_seen() {
	sed -nE 's/^\{ common_cpu: +([0-9]+), name: ([^ ]+) +\} hitcount: +([0-9]+) +len: +([0-9]+).*/\1 \2 \3 \4/p' \
		"$EVENTS/$1/hist"
	echo "!$LONG if len > 3028" >"$EVENTS/$1/trigger"
}

# The bond gives a packet to its slave on the CPU that sends; from a queue that was
# full, any CPU may take it to the device later.
sends() {
	local cpu dev count bytes given=0 all=0 length=0
	open_locality
	long_on net_dev_queue
	long_on net_dev_start_xmit
	bulk server "$PEER_IP" 0-3 4
	long_seen net_dev_queue | while read -r cpu dev count bytes; do
		[[ $dev == eth* ]] || continue
		check_eq "slave that CPU $cpu gave $count GSO packets" "$dev" "eth$((cpu / 2))"
		given=$((given + count))
	done
	long_seen net_dev_start_xmit | while read -r _ dev count bytes; do
		[[ $dev == eth* ]] || continue
		all=$((all + count)) length=$((length + bytes))
	done
	check_ge "GSO packets given to slaves" "$given" 100
	check_ge "GSO packets sent" "$all" 100
	check_ge "percent of all bytes that were in them" \
		$((100 * length / $(jq .bytes <<<"$SENT_JSON"))) 50
	note "$all GSO packets of $((length / all)) bytes on average, each by a slave of its CPU"
	all_local "$given"
}

receives() {
	local dev count bytes all=0 length=0
	open_locality
	long_on netif_receive_skb
	bulk peer "$SERVER_IP" 0-1 4
	long_seen netif_receive_skb | while read -r _ dev count bytes; do
		[[ $dev == eth* ]] || continue
		all=$((all + count)) length=$((length + bytes))
	done
	check_ge "long packets received" "$all" 100
	note "$all packets of $((length / all)) bytes on average received in one piece"
	# Acknowledgements.
	all_local 50
}

ktap_plan 3
ktap_run "the bond and its slaves have GSO and GRO on" offloads
ktap_run "a TCP stream leaves in GSO packets, by slaves of their CPUs" sends
ktap_run "a TCP stream comes in in packets longer than the MTU" receives
ktap_finished
