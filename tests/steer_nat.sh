#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Method nat: connections and datagrams from eight addresses of the peer, IPv4 and
# IPv6, to one port, served by the daemon of the CPU that received them; and what
# becomes of them when daemons die, drain and return.
#
# The daemons are `cpubond vm traffic answer`: each answers with its CPU, the CPU on which the
# kernel received (SO_INCOMING_CPU), the CPU on which it runs, and the address that the
# client had asked for.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=240
. "$(dirname "$0")/lib.sh"

DIR=/tmp/nat
SERVER_IP6=fd00::1
FROM4=$(printf '10.0.0.%d,' {11..18}) FROM4=${FROM4%,}
FROM6=$(printf 'fd00::%d,' {11..18}) FROM6=${FROM6%,}

# ask ARG...: the peer asks; the report is in $REPORT.
ask() { REPORT=$(peer_do "cpubond vm traffic ask --size 0 --to $*"); }
report() { jq -r "$1" <<<"$REPORT"; }

# good COUNT: all were answered, none refused, broken or without an answer.
good() {
	note "$REPORT"
	check_ge "asked" "$(report .asked)" "$1"
	check_eq "answered" "$(report '[.answers[]] | add')" "$(report .asked)"
}

# served BY: answers of these daemons (a regular expression on their CPU).
served() { report "[.answers | to_entries[] | select(.key | test(\"^$1 \")) | .value] | add // 0"; }

# local_only: TCP answers were received, and served, on the CPU of the daemon.
local_only() {
	check_eq "answers that were received or served on another CPU" \
		"$(report '[.answers | to_entries[] | (.key | split(" ")) as $k | select($k[0] != $k[1] or $k[1] != $k[2]) | .value] | add // 0')" 0
}

# spread: each daemon has served some.
spread() {
	local cpu
	for cpu in 0 1 2 3; do
		check_ge "answers of CPU $cpu" "$(served "$cpu")" 1
	done
}

run() {
	cpubond run --port 80 --name test "$@" -- cpubond vm traffic answer --at '[::]:{port}' --tag '{cpu}' \
		>"$DIR/log" 2>&1 </dev/null &
}

start() {
	mkdir -p "$DIR"
	nft list ruleset >"$DIR/before"
	run "$@"
	wait_for 30 live 4
}

# told COUNT: so many daemons are live, by the account of `cpubond run`.
told() { [ "$(jq '[.daemons[] | select(.phase == "live")] | length' /run/cpubond/steer/test.json)" = "$1" ]; }

# live COUNT: and the kernel has the table that goes with it: what has died is left out.
live() { told "$1" && cpubond steer list test; }
takes() { cpubond steer list test -j | jq -r ".services[].daemons[] | select(.cpu == $1) | .takes"; }
pid_of() { cpubond steer list test -j | jq -r ".services[].daemons[] | select(.cpu == $1) | .pid"; }

setup() {
	local last
	# Connections stay in conntrack's table for two minutes after their end, and thousands
	# are made here; when it is full, new ones are dropped.
	modprobe nf_conntrack
	sysctl -qw net.netfilter.nf_conntrack_max=262144
	bind_irqs
	bond_up cpu_bound
	sysctl -qw net.ipv6.conf.lo.disable_ipv6=0 "net.ipv6.conf.$BOND.disable_ipv6=0"
	ip addr add "$SERVER_IP6/64" dev "$BOND" nodad
	peer_do "sysctl -qw net.ipv6.conf.bond0.disable_ipv6=0
		for last in {11..18}; do ip addr add fd00::\$last/64 dev bond0 nodad; done"
	for last in {11..18}; do
		wait_for 10 ping -q -c 1 -W 1 "10.0.0.$last"
		wait_for 10 ping -q -c 1 -W 1 "fd00::$last"
	done
	wait_for 30 irqs_moved
	# A rule of somebody else's, which is to survive.
	nft 'add table inet mine; add chain inet mine in { type filter hook input priority 0; }; add rule inet mine in tcp dport 4242 drop'
}

# Who waits until daemons are said to be live may connect at once, though the kernel's
# table takes its time.
early() {
	local cpu
	setup
	mkdir -p "$DIR/slow"
	printf '%s\n' '#!/bin/sh' 'sleep 2' "exec $(command -v nft) \"\$@\"" >"$DIR/slow/nft"
	chmod +x "$DIR/slow/nft"
	PATH=$DIR/slow:$PATH run
	wait_for 60 told 4
	for cpu in 0 1 2 3; do
		REPORT=$(taskset -c "$cpu" cpubond vm traffic ask --size 0 --to 127.0.0.1:80 --from 127.0.0.1 --count 1)
		good 1
		check_eq "answers of CPU $cpu" "$(served "$cpu")" 1
	done
	cpubond steer del test
}

tcp() {
	start
	ask "$SERVER_IP:80" --from "$FROM4" --count 400
	good 400
	local_only
	spread
	check_eq "addresses that were asked for" \
		"$(report '[.answers | keys[] | split(" ")[3]] | unique | join(" ")')" "$SERVER_IP"
	ask "[$SERVER_IP6]:80" --from "$FROM6" --count 400
	good 400
	local_only
	spread
	check_eq "addresses that were asked for" \
		"$(report '[.answers | keys[] | split(" ")[3]] | unique | join(" ")')" "$SERVER_IP6"
}

own() {
	local cpu to
	for cpu in 0 3; do
		for to in "127.0.0.1:80 127.0.0.1" "$SERVER_IP:80 $SERVER_IP" "[::1]:80 ::1"; do
			REPORT=$(taskset -c "$cpu" cpubond vm traffic ask --size 0 --to "${to% *}" --from "${to#* }" --count 5)
			good 5
			check_eq "answers of CPU $cpu to ${to% *}" "$(served "$cpu")" 5
		done
	done
}

# What is only addressed to another machine, or another port, is not touched.
others() {
	ask "$SERVER_IP:81" --from 10.0.0.11 --count 2
	check_eq "refused on another port" "$(report .refused)" 2
	REPORT=$(cpubond vm traffic ask --size 0 --to "$PEER_IP:80" --from "$SERVER_IP" --count 2)
	check_eq "refused by another machine" "$(report .refused)" 2
}

drained() {
	cpubond steer drain test 1
	check_eq "CPUs that the drained daemon takes" "$(takes 1)" ""
	ask "$SERVER_IP:80" --from "$FROM4" --count 300
	good 300
	check_eq "answers of the drained daemon" "$(served 1)" 0
	cpubond steer undrain test 1
	ask "$SERVER_IP:80" --from "$FROM4" --count 300
	good 300
	local_only
	spread
}

# Killed while connections come in: what it had accepted, or was about to, breaks; no
# connection is refused.
killed() {
	local i
	peer_do "cpubond vm traffic ask --size 0 --to $SERVER_IP:80 --from $FROM4 --seconds 12" >"$DIR/under" &
	for i in 0 1 2; do
		sleep 3
		kill -9 "$(pid_of "$i")"
	done
	wait $!
	REPORT=$(<"$DIR/under")
	note "$REPORT"
	note "$(sysctl -n net.netfilter.nf_conntrack_count) connections in conntrack's table"
	check_ge "asked" "$(report .asked)" 300
	check_eq "refused" "$(report .refused)" 0
	check_eq "without an answer" "$(report .silent)" 0
	# At most one from each of the eight clients for each kill.
	check_le "broken" "$(report .broken)" 24
	wait_for 30 live 4
	check_eq "restarts" "$(cpubond steer list test -j | jq '[.services[].daemons[].restarts] | add')" 3
	ask "$SERVER_IP:80" --from "$FROM4" --count 300
	good 300
	local_only
	spread
}

# As it stays dead: its CPU's are served by others.
dead() {
	local keeper
	keeper=$(awk '$1 == "PPid:" { print $2 }' "/proc/$(pid_of 2)/status")
	# One that is stopped cannot start its daemon again.
	kill -STOP "$keeper"
	kill -9 "$(pid_of 2)"
	wait_for 20 live 3
	ask "$SERVER_IP:80" --from "$FROM4" --count 300
	good 300
	check_eq "answers of the dead daemon" "$(served 2)" 0
	kill -CONT "$keeper"
	wait_for 30 live 4
	ask "$SERVER_IP:80" --from "$FROM4" --count 300
	good 300
	check_ge "answers of the daemon that is back" "$(served 2)" 1
}

# A firewall that is reloaded takes all tables with it; ours is put back.
flushed() {
	nft flush ruleset
	nft -f "$DIR/before"
	wait_for 20 as_it_should_be
	ask "$SERVER_IP:80" --from "$FROM4" --count 100
	good 100
	spread
	nft add rule inet cpubond-test input counter
	wait_for 20 as_it_should_be
	# Somebody else's rule for the same port is told, and left alone.
	nft 'add chain inet mine pre { type nat hook prerouting priority -150; }; add rule inet mine pre tcp dport 80 redirect to :1'
	check_eq "exit code of steer list" "$(cpubond steer list test >"$DIR/list" 2>&1 || echo $?)" 3
	grep -q 'warning: nft table inet mine chain pre also translates tcp 80' "$DIR/list"
	nft delete chain inet mine pre
}
as_it_should_be() { cpubond steer list test; }

deleted() {
	check_eq "tables while it runs" "$(nft list tables | tr '\n' ' ')" "table inet mine table inet cpubond-test "
	cpubond steer del test
	nft list ruleset | diff "$DIR/before" -
	[ ! -e "/run/cpubond/steer/test.json" ] || fail "its state is still there"
	ask "$SERVER_IP:80" --from 10.0.0.11 --count 1
	check_eq "refused, with no service" "$(report .refused)" 1
}

# Flows of UDP that have had answers stay with their daemon, until it dies.
udp() {
	local before after cpu report4
	nft delete table inet mine
	start --protocol udp
	# Where they come in, before they are translated.
	nft -f - <<-NFT
		table inet count {
			chain in {
				type filter hook prerouting priority -400;
				udp dport 80 meta cpu 0 counter
				udp dport 80 meta cpu 1 counter
				udp dport 80 meta cpu 2 counter
				udp dport 80 meta cpu 3 counter
			}
		}
	NFT
	ask "$SERVER_IP:80" --from "$FROM4" --protocol udp --count 300
	good 300
	spread
	report4=$REPORT
	ask "[$SERVER_IP6]:80" --from "$FROM6" --protocol udp --count 300
	good 300
	spread
	nft -j list chain inet count in |
		jq -r '[.nftables[].rule.expr[]?.counter.packets // empty] | to_entries[] | "\(.key) \(.value)"' >"$DIR/in"
	for cpu in 0 1 2 3; do
		after=$(served "$cpu")
		before=$(jq -r "[.answers | to_entries[] | select(.key | test(\"^$cpu \")) | .value] | add // 0" <<<"$report4")
		check_eq "datagrams that CPU $cpu received, and its daemon answered" \
			"$(awk -v cpu="$cpu" '$1 == cpu { print $2 }' "$DIR/in")" $((before + after))
	done
}

# Lost is what comes between a daemon's death and the new table: datagrams are not sent
# again. What comes later, by the same flows, is answered by others.
udp_killed() {
	peer_do "cpubond vm traffic ask --size 0 --to $SERVER_IP:80 --from $FROM4 --protocol udp --one-flow --seconds 16 --timeout 500" >"$DIR/under" &
	sleep 3
	kill -9 "$(pid_of 1)"
	sleep 3
	kill -9 "$(pid_of 3)"
	wait $!
	REPORT=$(<"$DIR/under")
	note "$REPORT"
	check_ge "asked" "$(report .asked)" 300
	# A flow that is still sent to the dead goes unanswered twice a second, to the end.
	check_le "ms after which all were answered" "$(report .unanswered_until_ms)" 13000
	# Eight clients and two deaths: of each, six are refused at once, which is as many as
	# the kernel tells one client, and a second's time goes by in vain.
	check_le "not answered" $(($(report .refused) + $(report .silent))) $((8 * 2 * 8))
	wait_for 30 live 4
	ask "$SERVER_IP:80" --from "$FROM4" --protocol udp --count 200
	good 200
	spread
	cpubond steer del test
}

ktap_plan 11
ktap_run "a daemon is live when the kernel's table leads to it" early
ktap_run "TCP, IPv4 and IPv6: each connection is served where it is received" tcp
ktap_run "the machine's own connections are served too" own
ktap_run "other ports and other machines are left alone" others
ktap_run "a drained daemon gets none, and gets them back" drained
ktap_run "no connection is refused when daemons are killed" killed
ktap_run "a dead daemon's CPU is served by others until it is back" dead
ktap_run "what somebody else does to the rules is noticed and mended" flushed
ktap_run "deleted, it leaves no trace, and rules of others as they were" deleted
ktap_run "UDP, IPv4 and IPv6: each datagram is served where it is received" udp
ktap_run "UDP flows go on when daemons are killed" udp_killed
ktap_finished
