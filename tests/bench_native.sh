#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# `cpubond bench native --client`: HTTP over the peers, asked for from another machine (here
# the peer VM), and everything put back. Function only: there is no time here. Its pktgen
# is in bench_peers.sh.
#
# vm: cpus=4 nics=4 timeout=300
. "$(dirname "$0")/lib.sh"

# Of each of eight clients.
REQUESTS=8
ADDRESS=$SERVER_IP/24

# ask [TO]: the client machine's command; in real life ssh.
ask() {
	echo "cpubond vm call run peer 'cpubond bench ask --to ${1:-$SERVER_IP:80} --requests $REQUESTS \
		--bytes 300 --give-up --from $(echo 10.0.0.{11..18} | tr ' ' ,)'"
}

# as_found: all that native changes on the NICs. Not whether the carrier is back yet.
as_found() {
	local nic irq
	for nic in $(nics); do
		ip -j addr show "$nic" |
			jq -c '.[] | [.ifname, .address, .master, (.flags | index("UP") != null), [.addr_info[].local]]'
		nic_irqs "$nic" | while read -r irq; do
			cat "/proc/irq/$irq/smp_affinity_list"
		done
	done
}

# idle: NICs of which one is down and the others are up, and interrupts on a CPU that native
# would not choose.
idle() {
	local nic
	for nic in $(nics); do
		ip addr flush dev "$nic"
		ip link set "$nic" up
		bind_irq "$nic" 3
	done
	ip link set eth2 down
}

# native ARG...: on all NICs, once. In the background its process is that of the program.
native() {
	rm -f /tmp/native.json
	exec cpubond bench native --nics eth0,eth1,eth2,eth3 --rounds 1 --output /tmp/native.json "$@"
}

# found: what native left is what there was.
found() {
	[ ! -e "$SYS/bench0" ] || fail "the last peer is still there"
	check_eq "the NICs" "$(as_found)" "$1"
}

serve() {
	mkdir -p /tmp/www
	head -c 300 /dev/zero | tr '\0' x >/tmp/www/index.html
	cat >/tmp/lighttpd.conf <<-CONF
		server.document-root = "/tmp/www"
		server.port = 80
		index-file.names = ("index.html")
	CONF
	lighttpd -f /tmp/lighttpd.conf
}

# measures CABLES PEER...: with as many cables in the switch's LAG.
measures() {
	local cables=$1 before
	shift
	peer_do "/cpubond/guest/peer.sh balance-xor layer3+4 $cables"
	idle
	before=$(as_found)
	(native --peer "$(IFS=,; echo "$*")" --address "$ADDRESS" --client "$(ask)")
	note "$(jq -c '.rounds[] | [.peer, .generator, .requests]' /tmp/native.json | paste -sd ' ')"
	check_eq "peers measured" "$(jq -r '[.rounds[].peer] | join(" ")' /tmp/native.json)" "$*"
	check_eq "peers left out" "$(jq '.left_out | length' /tmp/native.json)" 0
	check_eq "requests" "$(jq -c '[.rounds[] | [.generator, .requests]] | unique' /tmp/native.json)" \
		"[[\"http\",$((8 * REQUESTS))]]"
	check_eq "time of each" "$(jq '[.rounds[] | select(.requests_per_second > 0)] | length' /tmp/native.json)" $#
	found "$before"
}

# leaves_out WHY COMMAND: a peer that this client cannot ask is not measured.
leaves_out() {
	local before rc=0 out
	idle
	before=$(as_found)
	out=$(native --peer balance-rr --address "$ADDRESS" --client "$2" 2>&1) || rc=$?
	note "${out##*$'\n'}"
	check_eq "exit code" "$rc" 1
	check_eq "peers measured" "$(jq '.rounds | length' /tmp/native.json)" 0
	check_match "why not" "$(jq -r '.left_out["balance-rr"]' /tmp/native.json)" "$1"
	found "$before"
}

fails() {
	leaves_out "exit status: 7: no route to client" "echo no route to client >&2; exit 7"
	leaves_out "Connection refused" "$(ask "$SERVER_IP:81")"
	leaves_out 'found "Welcome"' "echo Welcome"
}

# Interrupted while a client asks: put back all the same.
interrupted() {
	local before pid rc=0
	idle
	before=$(as_found)
	rm -f /tmp/asking
	native --peer balance-rr --address "$ADDRESS" --client "touch /tmp/asking; sleep 1" &
	pid=$!
	wait_for 60 test -e /tmp/asking
	kill -TERM "$pid"
	wait "$pid" || rc=$?
	check_eq "exit code" "$rc" 1
	found "$before"
}

# Before anything is changed.
refused() {
	local before
	idle
	before=$(as_found)
	check_fails native --client true
	check_fails native --peer raw-private --address "$ADDRESS" --client true
	ip link add other0 type dummy
	ip addr add 10.0.0.99/16 dev other0
	check_fails native --peer balance-rr --address "$ADDRESS" --client true
	ip link del other0
	found "$before"
}

ktap_plan 5
serve
ktap_run "HTTP over one NIC" measures 1 raw-shared
ktap_run "HTTP over bonds" measures 4 balance-rr cpu_bound
ktap_run "a client that fails: the peer is left out, and all is put back" fails
ktap_run "interrupted: all is put back" interrupted
ktap_run "what cannot be is refused before anything is changed" refused
ktap_finished
