#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# A bridge over the bond, as on a host of VMs: what the host sends, and what a guest
# behind the bridge sends, leaves by a slave of its CPU.
#
#   netns "inside"      server br0                   peer bond0 (balance-xor)
#   10.0.0.3 veth ───── veth                            10.0.0.2
#                       10.0.0.1
#                       bond0 (cpu_bound)
#                         CPU 0 ⇄ eth0 ───────────────── eth0
#                         CPU 1 ⇄ eth1 ───────────────── eth1
#                         CPU 2 ⇄ eth2 ───────────────── eth2
#                         CPU 3 ⇄ eth3 ───────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"
. "$(dirname "$0")/talk.bash"

INSIDE_IP=10.0.0.3

bridge() {
	policy_up
	ip addr flush dev "$BOND"
	ip link add br0 type bridge
	ip link set "$BOND" master br0
	ip netns add inside
	ip link add to-inside type veth peer name eth0 netns inside
	ip link set to-inside master br0 up
	ip -n inside addr add "$INSIDE_IP/24" dev eth0
	ip -n inside link set eth0 up
	ip addr add "$SERVER_IP/24" dev br0
	ip link set br0 up
	wait_for 10 ping -q -c 1 -W 1 "$PEER_IP"
	wait_for 10 ip netns exec inside ping -q -c 1 -W 1 "$PEER_IP"
}

# From inside, packets cross the bridge on whatever CPU the sender is.
inside() {
	local report
	answer_on peer "$PEER_IP"
	ip netns exec inside cpubond vm traffic answer --at "$(at "$INSIDE_IP")" --cpus 0-3 \
		<&- >"$ANSWER.inside" 2>&1 &
	wait_for 10 eval "ip netns exec inside ss -Hltn sport = :$PORT | grep -q ."
	open_locality
	ask_from peer "$PEER_IP" "$INSIDE_IP" 40 tcp
	ask_from peer "$PEER_IP" "$INSIDE_IP" 40 udp
	report=$(ip netns exec inside cpubond vm traffic ask --from "$INSIDE_IP" --to "$(at "$PEER_IP")" --count 40)
	check_eq "requests from inside that were answered" "$(jq .answered <<<"$report")" 40
	all_local 360
}

ktap_plan 3
ktap_run "a bridge over the bond comes up, with a guest behind it" bridge
ktap_run "the host's requests both ways are answered, all sent locally" talk "$SERVER_IP" "$PEER_IP" 40
ktap_run "those of the guest behind the bridge too" inside
ktap_finished
