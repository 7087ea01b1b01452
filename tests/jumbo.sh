#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Jumbo frames: with an MTU of 9000 on the bond, frames that long pass unfragmented and
# leave by a slave of their CPU.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#   MTU 9000                                  MTU 9000
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"
. "$(dirname "$0")/talk.bash"

# What an IPv4 packet of 9000 bytes carries, and what one that is clearly more than
# 1500 does.
PING_SIZE=8972 UDP_SIZE=8000

mtu() {
	local nic
	policy_up
	ip link set "$BOND" mtu 9000
	peer_do "ip link set $BOND mtu 9000"
	for nic in $(slaves); do
		check_eq "MTU of $nic" "$(cat "$SYS/$nic/mtu")" 9000
	done
	all_up
}

# pings FROM: not one may be fragmented.
pings() {
	local cmd="ping -q -M do -c 20 -i 0.05 -s $PING_SIZE" out
	if [ "$1" = server ]; then
		out=$($cmd "$PEER_IP")
	else
		out=$(peer_do "$cmd $SERVER_IP")
	fi
	check_match "ping of the $1" "$out" "20 packets transmitted, 20 received"
}

unfragmented() {
	open_locality
	pings server
	pings peer
	check_eq "packets sent by a slave that is not their CPU's" \
		$(($(sum_stat remote) - REMOTE)) 0
	check_ge "packets sent by a slave of their CPU" $(($(sum_stat local) - LOCAL)) 40
}

# Each end counts, before anything is put together again, what comes in one frame.
jumbo_frames() {
	local rules="add table ip jumbo
		add counter ip jumbo frames
		add chain ip jumbo in { type filter hook prerouting priority -450; }
		add rule ip jumbo in ip protocol udp ip length > $UDP_SIZE counter name frames"
	local count="nft -j list counter ip jumbo frames | jq .nftables[1].counter.packets"
	nft "$rules"
	peer_do "nft '$rules'"
	talk "$SERVER_IP" "$PEER_IP" 40 65536 "$UDP_SIZE"
	# A request and an answer of each.
	check_eq "jumbo frames into the server" "$(eval "$count")" 80
	check_eq "jumbo frames into the peer" "$(peer_do "$count")" 80
}

ktap_plan 3
ktap_run "the bond takes an MTU of 9000, and so do its slaves" mtu
ktap_run "packets of 9000 bytes pass unfragmented both ways" unfragmented
ktap_run "requests in jumbo frames are answered, all sent locally" jumbo_frames
ktap_finished
