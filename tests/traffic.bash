# shellcheck shell=bash
# What the tests of the policy share beyond lib.sh: traffic that is counted at both
# ends. Sourced after lib.sh.
#
# Senders send to SINK, an address that nobody has: the peer counts what arrives for
# it and drops it, so that no answer blurs the counts, and a lost packet shows.

SINK=10.0.0.99
TRAFFIC=/tmp/traffic

# Packets that the bond itself sends by each slave while a case counts: LACP's.
STRAY=0

# policy_up [MODE [SLAVE...]]: a bond under the policy with ethK's interrupts on CPU
# K, settled, and a sink to send to.
policy_up() {
	local nic cpu=0
	[ $# -gt 0 ] || set -- cpu_bound
	bind_irqs
	bond_up "$@"
	open_sink
	[ "${1%%:*}" != 802.3ad ] || wait_for 30 aggregated
	all_up
	for nic in $(slaves); do
		cpu=${nic#eth}
		[ "$cpu" -ge "$(nproc --all)" ] || wait_for 10 has_slave "$cpu" "$nic" irq
	done
}

# open_sink: the peer counts from nought.
open_sink() {
	peer_do "nft flush ruleset
		nft add table ip sink
		nft add counter ip sink got
		nft 'add chain ip sink in { type filter hook prerouting priority raw; }'
		nft add rule ip sink in ip daddr $SINK counter name got drop"
	ip neigh replace "$SINK" lladdr "$(peer_mac)" dev "$BOND" nud permanent
}

# received: how many packets have arrived for SINK.
received() {
	peer_do "nft list counter ip sink got" | awk '$1 == "packets" { print $2 }'
}

# by_cable ARRAY: what has come in by each cable, as the peer's devices count. The
# server's own count when they reclaim a packet, which on virtio may be much later.
by_cable() {
	local -n counts=$1
	local nic count
	peer_do 'cd /sys/class/net && grep -H . eth*/statistics/rx_packets' |
		while IFS=/: read -r nic _ _ count; do
			# shellcheck disable=SC2004,SC2034 # a name, not a number; the caller's
			counts[$nic]=$count
		done
}

# drops: what all queues of this machine have dropped so far.
drops() { tc -s -j qdisc | jq '[.[].drops // 0] | add'; }

# arrive COUNT: as many arrive in time, and no more.
arrive() {
	local got tries
	for ((tries = 0; tries < 50; tries++)); do
		got=$(received)
		[ "$got" -lt "$1" ] || break
		sleep 0.1
	done
	[ "$got" = "$1" ] ||
		note "dropped by queues here: $(drops), in the peer: $(peer_do "$(declare -f drops); drops")"
	check_eq "packets that arrived" "$got" "$1"
}

slaves() { cat "$SYS/$BOND/bonding/slaves"; }

# aggregated: LACP has all slaves in one aggregate with the peer.
aggregated() {
	[ "$(cat "$SYS/$BOND/bonding/ad_num_ports")" = "$(slaves | wc -w)" ] &&
		[ "$(cat "$SYS/$BOND/bonding/ad_partner_mac")" != 00:00:00:00:00:00 ]
}

# bond_ready: the kernel has seen its carrier; packets are dropped until then.
bond_ready() { [ "$(cat "$SYS/$BOND/operstate")" = up ]; }

# slave_up SLAVE: for bonding, and for the kernel, which gives a device its queue
# only then and drops what bonding sends by it before.
slave_up() {
	[ "$(cat "$SYS/$1/bonding_slave/mii_status" "$SYS/$1/operstate")" = $'up\nup' ]
}

# has_slave CPU SLAVE [REASON]: SLAVE is one of the CPU's.
has_slave() {
	local slaves reason
	read -r slaves reason <<<"$(bond_map "$1")"
	[[ ,$slaves, == *,$2,* ]] && [ "${3:-$reason}" = "$reason" ]
}

# falls_back CPU [NOT]: the CPU has slaves, but none of its own, and not NOT.
falls_back() {
	local slaves reason
	read -r slaves reason <<<"$(bond_map "$1")"
	[[ $reason =~ ^(smt|llc|node|any)$ && $slaves != - && ,$slaves, != *,${2:-none},* ]]
}

# put VALUE FILE: a write that check_fails can judge.
put() { printf '%s\n' "$1" >"$2"; }

# all_up: the bond and its slaves are ready to send.
all_up() {
	local nic
	wait_for 10 bond_ready
	for nic in $(slaves); do
		wait_for 10 slave_up "$nic"
	done
}

# cpu_stat SLAVE CPU local|remote: the policy's count of what CPU sent by SLAVE.
cpu_stat() {
	awk -v cpu="cpu$2" -v what="$3" '
		$1 == cpu { for (i = 2; i < NF; i += 2) if ($i == what) print $(i + 1) }
	' "$SYS/$1/bonding_slave/cpu_bound_stats"
}

# send CPU COUNT [one|many]: COUNT packets by a process pinned on CPU, all of one
# flow (default) or each of its own.
send() {
	# shellcheck disable=SC2016 # the pinned shell expands these
	taskset -c "$1" bash -ec '
		if [ "$3" = many ]; then
			for ((i = 0; i < $2; i++)); do echo >"/dev/udp/$1/$((1024 + i))"; done
		else
			exec 3>"/dev/udp/$1/9"
			for ((i = 0; i < $2; i++)); do echo >&3; done
		fi' send "$SINK" "$2" "${3:-one}"
}

# leaves_by CPU SLAVE [COUNT]: packets that CPU sends leave by SLAVE and by nothing
# else; the policy counts them as local; all of them arrive. In one flow, then many.
leaves_by() {
	local cpu=$1 slave=$2 count=${3:-300} flows nic due arrived counted
	for flows in one many; do
		local -A before=() after=()
		by_cable before
		arrived=$(received)
		counted=$(cpu_stat "$slave" "$cpu" local)
		send "$cpu" "$count" "$flows"
		arrive $((arrived + count))
		by_cable after
		for nic in "${!after[@]}"; do
			due=0
			[ "$nic" != "$slave" ] || due=$count
			check_ge "packets by $nic, when CPU $cpu sent $count by $slave" \
				$((after[$nic] - before[$nic])) "$due"
			check_le "packets by $nic, when CPU $cpu sent $count by $slave" \
				$((after[$nic] - before[$nic])) $((due + STRAY))
		done
		check_eq "packets that the policy counts as local to CPU $cpu on $slave" \
			$(($(cpu_stat "$slave" "$cpu" local) - counted)) "$count"
		note "CPU $cpu, $flows flow(s): $count packets by $slave, $count arrived"
	done
}

# spreads CPU COUNT SLAVE...: packets of COUNT flows from CPU leave by all of these
# slaves and by no other; all of them arrive.
spreads() {
	local cpu=$1 count=$2 nic arrived by
	local -A before=() after=()
	shift 2
	by_cable before
	arrived=$(received)
	send "$cpu" "$count" many
	arrive $((arrived + count))
	by_cable after
	for nic in "${!after[@]}"; do
		by=$((after[$nic] - before[$nic]))
		note "CPU $cpu: $by of $count flows by $nic"
		if [[ " $* " == *" $nic "* ]]; then
			# Flows are few: half of an even share is what chance allows.
			check_ge "flows of CPU $cpu by $nic" "$by" $((count / $# / 2))
		else
			check_eq "flows of CPU $cpu by $nic" "$by" 0
		fi
	done
}

# start_traffic CPU...: a pinned sender on each of these, a few hundred packets a
# second, which emulated machines keep up with, until stop_traffic.
start_traffic() {
	local cpu
	rm -rf "$TRAFFIC"
	mkdir "$TRAFFIC"
	mkfifo "$TRAFFIC/never"
	# A case that fails must not leave them behind.
	trap 'touch "$TRAFFIC/stop"' EXIT
	for cpu; do
		# shellcheck disable=SC2016 # the pinned shell expands these
		taskset -c "$cpu" bash -c '
			exec 3>"/dev/udp/$1/9" 4<>"$2/never"
			n=0
			until [ -e "$2/stop" ]; do
				echo >&3 && n=$((n + 1))
				echo "$n" >"$2/now.$3"
				# A short sleep that starts no process.
				read -rt 0.003 -u 4
			done
			echo "$n" >"$2/sent.$3"' traffic "$SINK" "$TRAFFIC" "$cpu" &
	done
	sleep 0.5
}

# stop_traffic: tells what was sent in $SENT.
stop_traffic() {
	touch "$TRAFFIC/stop"
	wait
	SENT=$(cat "$TRAFFIC"/sent.* | awk '{ n += $1 } END { print n + 0 }')
}

# all_settled: of traffic that may have lost some, nothing is on its way any more.
all_settled() {
	local got last=-1
	got=$(received)
	while [ "$got" != "$last" ]; do
		sleep 0.2
		last=$got got=$(received)
	done
}

# nothing_lost: what start_traffic sent since open_sink has arrived.
nothing_lost() {
	check_ge "packets sent" "$SENT" 100
	arrive "$SENT"
	note "$SENT packets sent, as many arrived"
}
