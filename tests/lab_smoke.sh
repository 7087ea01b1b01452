#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The lab itself: two VMs, four cables, a bond at each end, no policy of ours.
#
#   server bond0 (balance-xor)          peer bond0 (balance-xor layer3+4)
#     eth0 ───────────────────────────── eth0
#     eth1 ───────────────────────────── eth1
#     eth2 ───────────────────────────── eth2
#     eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=60
. "$(dirname "$0")/lib.sh"

machines() {
	check_eq "CPUs online" "$(nproc)" 4
	check_eq "NICs" "$(nics)" "eth0 eth1 eth2 eth3 "
	check_eq "the peer's CPUs" "$(peer_do nproc)" 2
	check_eq "exit code from the peer" "$(peer_do 'exit 7' || echo $?)" 7
}

traffic() {
	local nic before sum=0
	bond_up balance-xor
	declare -A before
	for nic in $(nics); do
		before[$nic]=$(tx_packets "$nic")
	done
	ping -q -c 20 -i 0.02 -W 2 "$PEER_IP"
	for nic in $(nics); do
		sum=$((sum + $(tx_packets "$nic") - before[$nic]))
	done
	check_ge "packets sent by the slaves for 20 pings" "$sum" 20
}

carrier() {
	set_link eth1 off
	wait_for 10 grep -q '^0$' "$SYS/eth1/carrier"
	wait_for 10 grep -q down "$SYS/eth1/bonding_slave/mii_status"
	peer_do 'for i in {1..50}; do grep -q ^0 /sys/class/net/eth1/carrier && exit 0; sleep 0.1; done; exit 1'
	ping -q -c 5 -i 0.05 -W 2 "$PEER_IP"
	set_link eth1 on
	wait_for 10 grep -q up "$SYS/eth1/bonding_slave/mii_status"
}

counted_by_cpu() {
	local seen
	bond_up balance-xor
	xmit_trace on
	send_from 3 50
	seen=$(xmit_trace show | awk -v dev="$BOND" '$1 == 3 && $2 == dev { print $3 }')
	xmit_trace off
	check_ge "packets of the sender on CPU 3 seen by the tracepoint" "${seen:-0}" 50
	check_eq "packets that reached the peer" "$(peer_received)" 50
}

ktap_plan 4
ktap_run "both machines are what was asked for" machines
ktap_run "pings pass between the bonds, and the slaves count them" traffic
ktap_run "a pulled cable is seen at both ends, and traffic goes on" carrier
ktap_run "the kernel counts transmits by CPU and device" counted_by_cpu
ktap_finished
