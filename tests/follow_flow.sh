#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# cpu_bound_follow: a bulk TCP sender whose thread hops CPUs every 10 ms. With `flow`
# its segments stay on the slave of the CPU that receives the acknowledgements, and
# arrive in order; with `cpu` they change slave with the thread, and overtake.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────── 10 ms ───────── eth1
#     CPU 2 ⇄ eth2 ───────────── 20 ms ───────── eth2
#     CPU 3 ⇄ eth3 ───────────── 30 ms ───────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"
. "$(dirname "$0")/talk.bash"

SECONDS_SENT=4
# One segment a write, and so few that each leaves as it is written, from the CPU that the
# thread is on. What the window holds back would be sent by the CPU that takes the
# acknowledgements: one and the same.
SIZE=1400 RATE=1000
FOLLOW=$SYS/$BOND/bonding/cpu_bound_follow

# Links of unequal length: what changes to a shorter one overtakes, without any luck.
up() {
	local k
	policy_up
	wait_for 30 irqs_moved
	for k in 1 2 3; do
		tc qdisc replace dev "eth$k" root netem delay "$((10 * k))ms"
	done
}

# sent_by bond0: "CPUS COUNT OTHERS": CPUs with more than a few transmits, what the
# busiest sent, what the others sent. sent_by eth: of NICs.
sent_by() {
	xmit_trace show | awk -v what="$1" '
		index($2, what) == 1 { count[what == "eth" ? $2 : $1] += $3; all += $3 }
		END {
			for (c in count) {
				if (count[c] >= 20) n++
				if (count[c] > most) most = count[c]
			}
			print n + 0, most + 0, all - most
		}'
}

# hopping FOLLOW: what became of its segments in $SEGMENTS, $LATE (out of order at the
# receiver), $SEEN (reordering that the sender noticed), $SLAVES, $ASTRAY (sent by others
# than the busiest).
hopping() {
	local hops cpus
	echo "$1" >"$FOLLOW"
	check_eq "cpu_bound_follow" "$(cat "$FOLLOW")" "$1"
	xmit_trace on
	bulk server "$PEER_IP" 0-3 "$SECONDS_SENT" --size "$SIZE" --rate "$RATE"
	sent_by bond0 | read -r cpus _
	sent_by eth | read -r SLAVES _ ASTRAY
	xmit_trace off
	hops=$(jq .hops <<<"$SENT_JSON")
	SEGMENTS=$(jq .segments <<<"$DRAINED_JSON")
	LATE=$(jq .out_of_order <<<"$DRAINED_JSON")
	SEEN=$(jq .reordering_seen <<<"$SENT_JSON")
	note "follow=$1: $LATE of $SEGMENTS segments out of order, reordering seen $SEEN times," \
		"$(jq .retransmitted <<<"$SENT_JSON") retransmitted, $hops hops, sent by $cpus CPUs" \
		"and $SLAVES slaves ($ASTRAY packets not by the busiest)"
	check_ge "segments" "$SEGMENTS" 500
	check_ge "hops" "$hops" 50
	check_eq "CPUs that sent" "$cpus" 4
}

# A retransmission would prove nothing: a vCPU that the host kept waiting makes the sender
# probe for what it takes to be lost. Those come as duplicates, not out of order.
in_order() {
	hopping flow
	check_eq "slaves that sent the stream" "$SLAVES" 1
	# Its SYN leaves before anything was received, and may have to be sent again.
	check_le "packets sent by other slaves" "$ASTRAY" 3
	check_eq "segments out of order" "$LATE" 0
	check_eq "times that the sender saw reordering" "$SEEN" 0
}

overtaken() {
	hopping cpu
	check_eq "slaves that sent the stream" "$SLAVES" 4
	check_ge "segments out of order" "$LATE" 20
	check_ge "times that the sender saw reordering" "$SEEN" 1
}

ktap_plan 3
ktap_run "the bond comes up with each CPU bound to its slave" up
ktap_run "follow=flow keeps a hopping sender's segments in order" in_order
ktap_run "follow=cpu does not" overtaken
ktap_finished
