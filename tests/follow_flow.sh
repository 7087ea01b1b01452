#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# cpu_bound_follow: a bulk TCP sender whose thread hops CPUs every 10 ms. With `flow`
# its segments stay on the slave of the CPU that receives the acknowledgements, and
# arrive in order; with `cpu` they change slave with the thread, and overtake.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"
. "$(dirname "$0")/talk.bash"

SECONDS_SENT=8
FOLLOW=$SYS/$BOND/bonding/cpu_bound_follow

# used DEV_PATTERN: CPUs and devices with more than a few transmits: "CPUS DEVICES".
used() {
	xmit_trace show | awk -v dev="^$1\$" '
		$2 ~ dev && $3 > 50 { cpu[$1]; name[$2] }
		END { for (c in cpu) cpus++; for (n in name) names++; print cpus + 0, names + 0 }'
}

# hopping FOLLOW: what became of its segments in $SEGMENTS, $LATE, $AGAIN (out of order
# at the receiver, retransmitted).
hopping() {
	local hops cpus slaves
	echo "$1" >"$FOLLOW"
	check_eq "cpu_bound_follow" "$(cat "$FOLLOW")" "$1"
	xmit_trace on
	bulk server "$PEER_IP" 0-3 "$SECONDS_SENT"
	used bond0 | read -r cpus _
	used 'eth[0-9]+' | read -r _ slaves
	xmit_trace off
	hops=$(jq .hops <<<"$SENT_JSON")
	SEGMENTS=$(jq .segments <<<"$DRAINED_JSON")
	LATE=$(jq .out_of_order <<<"$DRAINED_JSON")
	AGAIN=$(jq .retransmitted <<<"$SENT_JSON")
	note "follow=$1: $LATE of $SEGMENTS segments out of order, $AGAIN retransmitted," \
		"$hops hops, sent by $cpus CPUs and $slaves slaves"
	check_ge "segments" "$SEGMENTS" 500
	check_ge "hops" "$hops" 50
	check_ge "CPUs that sent" "$cpus" 3
	SLAVES=$slaves
}

in_order() {
	hopping flow
	check_eq "slaves that sent the stream" "$SLAVES" 1
	check_eq "segments out of order" "$LATE" 0
	check_eq "segments retransmitted" "$AGAIN" 0
}

# That the test can see it at all. Chance has a part in it, so it gets three tries.
overtaken() {
	local try
	for try in 1 2 3; do
		hopping cpu
		check_ge "slaves that sent the stream, try $try" "$SLAVES" 3
		[ "$LATE" = 0 ] || return 0
	done
	fail "nothing came out of order: this test would not see it"
}

ktap_plan 3
ktap_run "the bond comes up with each CPU bound to its slave" policy_up
ktap_run "follow=flow keeps a hopping sender's segments in order" in_order
ktap_run "follow=cpu does not" overtaken
ktap_finished
