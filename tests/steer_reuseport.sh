#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Steering by reuseport: an nginx a CPU, all listening on one port, and classic BPF
# that picks the one of the CPU.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=300
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/steer.bash"

# What the killed daemon had in hand: at most two connections of each client.
RESET_AT_MOST=16

up() {
	steer_up
	BEFORE=$(sysctl -n net.ipv4.tcp_migrate_req)
	echo "$BEFORE" >"$STEER/migrate_req"
	nginx_conf "$STEER/conf" '{port} reuseport' '[::]:{port} ipv6only=on reuseport'
	run_service reuseport
	check_eq "net.ipv4.tcp_migrate_req" "$(sysctl -n net.ipv4.tcp_migrate_req)" 1
}

# quit CPU: its daemon is told to end when it has answered what it has.
quit() {
	kill -QUIT "$(pgrep -o -f "^nginx: master .*conf[.]$1\$")"
	wait_for 20 eval "! grep -q '^$1 live' <<<\"\$(daemons)\""
}

# Those that wait for the one that ends go to another; nginx may close a few that it has
# accepted.
restarted() {
	local restarts
	restarts=$(daemons | awk '$1 == 2 { print $4 }')
	under_load quit 2
	wait_for 30 back 2 $((restarts + 1))
	all_local 10
}

# datagrams: "CPU COUNT" a line, received since open_datagrams.
open_datagrams() {
	nft -f - <<-NFT
		table inet datagrams
		delete table inet datagrams
		table inet datagrams {
			set in { typeof meta cpu; flags dynamic; size 64; counter; }
			chain in { type filter hook prerouting priority -400; udp dport $PUBLIC update @in { meta cpu }; }
		}
	NFT
}
datagrams() {
	nft -j list set inet datagrams in |
		jq -r '.nftables[].set.elem[]?.elem | "\(.val) \(.counter.packets)"' | sort
}

# answered REPORT: "CPU DATAGRAMS" a line, by the daemon that answered.
answered() {
	jq -r '.answers | to_entries[] | "\(.key | split(" ")[0]) \(.value)"' "$@" |
		awk '{ n[$1] += $2 } END { for (cpu in n) print cpu, n[cpu] }' | sort
}

# ask_udp ARG...: the peer sends datagrams, each a flow of its own; the report.
ask_udp() { peer_do "cpubond vm traffic ask --size 0 --protocol udp --to $*"; }

udp_live() {
	[ "$(cpubond steer list udp -j | jq '[.services[] | select(.differences == []) | .daemons[] | select(.phase == "live")] | length')" = "$1" ]
}

# Beside the service by TCP, on the same port.
udp() {
	cpubond run --name udp --port "$PUBLIC" --protocol udp --steer reuseport -- \
		cpubond vm traffic answer --at '[::]:{port}' --tag '{cpu}' --protocol udp --reuseport <&- >"$STEER/udp.log" 2>&1 &
	echo $! >"$STEER/udp.supervisor"
	wait_for 30 udp_live 4
	open_datagrams
	ask_udp "$SERVER_IP:$PUBLIC" --from "$(from 10.0.0.)" --count 200 >"$STEER/udp4"
	ask_udp "[$SERVER_IP6]:$PUBLIC" --from "$(from fd00::)" --count 200 >"$STEER/udp6"
	check_eq "answered by IPv4 and IPv6" "$(jq -s -c 'map([.answers[]] | add)' "$STEER/udp4" "$STEER/udp6")" "[200,200]"
	check_eq "datagrams by the daemon that answered, and by the CPU that received" \
		"$(answered "$STEER/udp4" "$STEER/udp6")" "$(datagrams)"
	check_eq "CPUs" "$(datagrams | wc -l)" 4
}

# What is lost was on its way to the one that was killed; what comes later is answered.
udp_killed() {
	local pid
	pid=$(cpubond steer list udp -j | jq '.services[].daemons[] | select(.cpu == 1) | .pid')
	ask_udp "$SERVER_IP:$PUBLIC" --from "$(from 10.0.0.)" --seconds 6 --timeout 500 >"$STEER/udp4" &
	sleep 2
	kill -9 "$pid"
	wait $!
	note "$(<"$STEER/udp4")"
	check_ge "asked" "$(jq .asked "$STEER/udp4")" 100
	# Each client waits for one answer at a time.
	check_le "not answered" "$(jq '.refused + .silent' "$STEER/udp4")" ${#CLIENTS[@]}
	wait_for 30 udp_live 4
	udp_local
}

udp_local() {
	open_datagrams
	ask_udp "$SERVER_IP:$PUBLIC" --from "$(from 10.0.0.)" --count 200 >"$STEER/udp4"
	check_eq "answered" "$(jq '[.answers[]] | add' "$STEER/udp4")" 200
	check_eq "datagrams by the daemon that answered, and by the CPU that received" \
		"$(answered "$STEER/udp4")" "$(datagrams)"
}

# Both services, by `cpubond undo`.
removed() {
	local pid out
	pid=$(<"$STEER/udp.supervisor")
	out=$(cpubond undo)
	check_match "output of undo" "$out" "udp: service ended.*web: service ended"
	wait_for 30 eval "! kill -0 $pid"
	[ ! -e /run/cpubond/steer/udp.json ] || fail "the state is still there"
	! pgrep -f '^cpubond (vm traffic|keep) ' || fail "daemons are still there"
	ended
	check_eq "net.ipv4.tcp_migrate_req" "$(sysctl -n net.ipv4.tcp_migrate_req)" "$(<"$STEER/migrate_req")"
}

ktap_plan 10
ktap_run "the group of each family has a program" up
ktap_run "IPv4: every connection is served on the CPU that received it" local4
ktap_run "IPv6: every connection is served on the CPU that received it" local6
ktap_run "a daemon killed under load: none refused, and it comes back" kill_one
ktap_run "a drained daemon gets none, others serve its CPU, and it comes back" drained
ktap_run "three of four killed three times under load: none refused" storm
ktap_run "a daemon told to end under load: none refused, and it comes back" restarted
ktap_run "UDP, IPv4 and IPv6: each datagram is answered by the CPU that received it" udp
ktap_run "UDP: a killed daemon's datagrams are answered by others, until it is back" udp_killed
ktap_run "undo ends both services, and nothing is left" removed
ktap_finished
