#!/bin/bash
# The server's side of `cpubond bench prof`.
#
#   pktgen.sh set-up HOW    a bond in that mode (`balance-xor:cpu_bound`: with that policy)
#                           over all NICs, the IRQs of ethK on CPU K; or raw-private, raw-shared
#   pktgen.sh send COUNT    so many packets of each CPU at the same time, by pktgen: to the
#                           bond, or with raw-private ethK, with raw-shared eth0
set -eu
. /cpubond/tests/lib.sh
set -o pipefail

PKTGEN=/proc/net/pktgen
HOW=/run/pktgen.how

set_up() {
	local dev
	case $1 in
	raw-*)
		for dev in $(nics); do
			ip link set "$dev" up
		done
		;;
	*) bond_up "$1" ;;
	esac
	bind_irqs
	echo "$1" >"$HOW"
	modprobe pktgen
	# The policy reads the IRQs once a second.
	[[ $1 != *cpu_bound ]] || wait_for 10 map_is $(($(nproc) - 1)) "eth$(($(nproc) - 1))"
}

# device CPU: what it sends to.
device() {
	case $(<"$HOW") in
	raw-private) echo "eth$1" ;;
	raw-shared) echo eth0 ;;
	*) echo "$BOND" ;;
	esac
}

send() {
	local count=$1 cpu dev line sent=0
	for cpu in $(seq 0 $(($(nproc) - 1))); do
		dev=$(device "$cpu")@$cpu
		echo rem_device_all >"$PKTGEN/kpktgend_$cpu"
		echo "add_device $dev" >"$PKTGEN/kpktgend_$cpu"
		for line in "count $count" "pkt_size 60" "delay 0" "clone_skb 0" \
			"dst_mac $(peer_mac)" "src_min $SERVER_IP" "src_max $SERVER_IP" "dst $PEER_IP" \
			"udp_src_min $((1000 + cpu))" "udp_src_max $((1000 + cpu))" \
			"udp_dst_min 9" "udp_dst_max 9"; do
			echo "$line" >"$PKTGEN/$dev"
		done
	done
	echo start >"$PKTGEN/pgctrl"
	for cpu in $(seq 0 $(($(nproc) - 1))); do
		sent=$((sent + $(awk '$1 == "pkts-sofar:" { print $2 }' "$PKTGEN/$(device "$cpu")@$cpu")))
	done
	[ "$sent" = $((count * $(nproc))) ] || fail "pktgen sent $sent packets in place of $((count * $(nproc)))"
}

case $1 in
set-up) set_up "$2" ;;
send) send "$2" ;;
esac
