#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The LAG, static and by LACP, with each hash that switches have: requests from eight
# addresses, and to them, are answered; a flow comes in by one link and no other; and
# whatever link that is, what the server sends leaves by a slave of its CPU.
#
#   server bond0                              peer bond0
#   cpu_bound,                                balance-xor or 802.3ad, with
#   802.3ad + cpu_bound                       layer2, layer2+3, layer3+4
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1   10.0.0.11
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2      to
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3   10.0.0.18
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=300
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"
. "$(dirname "$0")/talk.bash"

# lag MODE PEER_MODE HASH LINKS: at least so many links take flows in. One takes all
# with layer2, which looks at nothing but the two MAC addresses.
lag() {
	local hash=$3 links=$4 seen used several
	peer_do "/cpubond/guest/peer.sh $2 $hash"
	policy_up "$1"
	answer_on server "$SERVER_IP"
	answer_on peer "$CLIENTS"
	open_flows
	open_locality
	ask_from peer "$CLIENTS" "$SERVER_IP" 200 tcp
	ask_from peer "$CLIENTS" "$SERVER_IP" 320 udp
	ask_from server "$SERVER_IP" "$CLIENTS" 80 tcp
	all_local 1400
	flows | read -r seen used several
	note "$seen flows in by $used links, $several of them by several"
	# Not exactly 600: a port may have been used twice.
	check_ge "flows" "$seen" 550
	check_eq "flows that came in by several links" "$several" 0
	if [ "$hash" = layer2 ]; then
		check_eq "links by which flows came in" "$used" "$links"
	else
		check_ge "links by which flows came in" "$used" "$links"
	fi
}

ktap_plan 6
for hash in layer2:1 layer2+3:2 layer3+4:4; do
	ktap_run "static LAG, ${hash%:*}" lag cpu_bound balance-xor "${hash%:*}" "${hash#*:}"
done
for hash in layer2:1 layer2+3:2 layer3+4:4; do
	ktap_run "LACP, ${hash%:*}" lag 802.3ad:cpu_bound 802.3ad "${hash%:*}" "${hash#*:}"
done
ktap_finished
