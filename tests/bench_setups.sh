#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The set-ups that `cpubond bench system` measures serve every request, on the CPUs that
# they should; and its clients spread over a switch's ports evenly. Function only.
#
# vm: cpus=4 nics=4 timeout=300
. "$(dirname "$0")/lib.sh"

# Of each of eight clients.
REQUESTS=8
PORT=20001

setup() { /cpubond/guest/setup.sh "$@"; }

# ask: REQUESTS from each client to what is set up, on ports that were not used yet.
ask() {
	peer_do "cpubond bench ask --to $SERVER_IP:80 --requests $REQUESTS --first-port $PORT \
		--bytes 300 --from $(echo 10.0.0.{11..18} | tr ' ' ,)"
}

# received: packets that each NIC received.
received() {
	local nic
	for nic in $(nics); do
		rx_packets "$nic"
	done | paste -sd ' '
}

# serves NICS SETUP STEER: all requests are answered, and come in by so many NICs evenly.
serves() {
	local count=$1 before after out nic
	peer_do "/cpubond/guest/peer.sh balance-xor layer3+4 $count"
	setup start "$2" "$3" 4 300
	read -ra before <<<"$(received)"
	out=$(ask)
	note "$out"
	read -ra after <<<"$(received)"
	check_eq "answered" "$(jq .complete <<<"$out")" $((8 * REQUESTS))
	check_eq "not answered" "$(jq .failed <<<"$out")" 0
	for ((nic = 0; nic < count; nic++)); do
		note "eth$nic received $((after[nic] - before[nic])) packets"
		# At least a SYN, an ACK, a request and a FIN of each connection.
		check_ge "packets of eth$nic" $((after[nic] - before[nic])) $((8 * REQUESTS * 4 / count))
	done
	setup stop
	check_eq "servers left" "$(pgrep -x 'lighttpd|nginx' | wc -l)" 0
}

# What is not all of what was asked for has failed.
cut_short() {
	local out
	peer_do "/cpubond/guest/peer.sh balance-xor layer3+4 1"
	setup start usual none 4 299
	out=$(ask)
	note "$out"
	check_eq "not answered in full" "$(jq .failed <<<"$out")" $((8 * REQUESTS))
	setup stop
}

ktap_plan 7
n=0
while read -r nics setup steer; do
	PORT=$((20001 + 1000 * n++))
	ktap_run "$setup, $steer: serves every request" serves "$nics" "$setup" "$steer" </dev/null
done <<-END
	1 usual none
	4 balance-rr none
	4 balance-xor none
	4 cpu_bound nat
	4 cpu_bound sk_lookup
	4 cpu_bound reuseport
END
PORT=30001
ktap_run "an answer that is too short is no answer" cut_short
ktap_finished
