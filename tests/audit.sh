#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# cpubond audit: each flow's hops as the audit tells them, beside what nftables counts
# of the same packets at the slaves and what the daemons log; all local where the
# machine is set up for it, and the reason where one hop is broken on purpose.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     nginx on CPU 0 ⇄ eth0 ──────────────────── eth0
#     nginx on CPU 1 ⇄ eth1 ──────────────────── eth1   ab from
#     nginx on CPU 2 ⇄ eth2 ──────────────────── eth2   8 addresses
#     nginx on CPU 3 ⇄ eth3 ──────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=300
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/steer.bash"

# Connections of each client in a case.
EACH=8
AT_ONCE=1
ALL=$((${#CLIENTS[@]} * EACH))

# audit ARG...: in the background until audited; it watches when this returns.
audit() {
	: >"$STEER/audit.err"
	cpubond audit "$@" >"$STEER/audit" 2>"$STEER/audit.err" </dev/null &
	AUDIT=$!
	wait_for 60 grep -q 'watching bond0' "$STEER/audit.err"
}

# audited: what it has to say, once the last packet of the closed connections is out.
audited() {
	wait_for 20 settled
	kill -INT "$AUDIT"
	wait "$AUDIT"
}
settled() {
	! ss -Htan 'sport >= :8000 and sport <= :8003' | grep -qvE '^(LISTEN|ESTAB|TIME-WAIT)'
}

report() { jq -r "$1" "$STEER/audit"; }

# count_packets: nftables counts each flow's packets by CPU and slave, at the slaves.
count_packets() {
	local devices='{ eth0, eth1, eth2, eth3 }' port=${1:-$PUBLIC}
	nft -f - <<-NFT
		table netdev counted
		delete table netdev counted
		table netdev counted {
			set rx4 { typeof ip saddr . tcp sport . meta cpu . meta iifname; flags dynamic; size 4096; counter; }
			set rx6 { typeof ip6 saddr . tcp sport . meta cpu . meta iifname; flags dynamic; size 4096; counter; }
			set tx4 { typeof ip daddr . tcp dport . meta cpu . meta oifname; flags dynamic; size 4096; counter; }
			set tx6 { typeof ip6 daddr . tcp dport . meta cpu . meta oifname; flags dynamic; size 4096; counter; }
			chain rx {
				type filter hook ingress devices = $devices priority 0;
				meta protocol ip tcp dport $port update @rx4 { ip saddr . tcp sport . meta cpu . meta iifname }
				meta protocol ip6 tcp dport $port update @rx6 { ip6 saddr . tcp sport . meta cpu . meta iifname }
			}
			chain tx {
				type filter hook egress devices = $devices priority 0;
				meta protocol ip tcp sport $port update @tx4 { ip daddr . tcp dport . meta cpu . meta oifname }
				meta protocol ip6 tcp sport $port update @tx6 { ip6 daddr . tcp dport . meta cpu . meta oifname }
			}
		}
	NFT
	: | tee "$STEER"/served.* >/dev/null
}

# counted: "rx|tx ADDRESS PORT CPU SLAVE PACKETS" a line.
counted() {
	local set
	for set in rx4 rx6 tx4 tx6; do
		nft -j list set netdev counted "$set" | jq -r --arg way "${set%?}" \
			'.nftables[].set.elem[]?.elem | [$way] + .val.concat + [.counter.packets] | join(" ")'
	done
}

# compare COUNT [SHARED_QUEUES]: so many flows were counted by nftables, and each is in the
# report, packet by packet the same, its application on the CPU of the daemon that logged it ($PINNED[CPU]
# where that is another's). What a CPU gives to a queue that others use too, one of them
# may hand to the driver: with SHARED_QUEUES the sending CPU is not compared.
declare -A PINNED=()
compare() {
	local cpu
	counted >"$STEER/counted"
	for cpu in 0 1 2 3; do
		sort -u "$STEER/served.$cpu" | sed "s/^/app /; s/\$/ ${PINNED[$cpu]:-$cpu}/"
	done >>"$STEER/counted"
	report '.flows[] | [(.remote | capture("^\\[?(?<a>[^\\]]+)\\]?:(?<p>[0-9]+)$") | .a, .p),
		(.rx | .cpu, .slave, .total, .other_cpu, .other_slave),
		(.tx | .cpu, .slave, .total, .other_cpu, .other_slave),
		.app.cpu, .app.other_cpu, .app.total] | map(. // "-") | join(" ")' >"$STEER/flows"
	awk -v queues="${2-}" '
		function differs(way, cpu, slave, total, other_cpu, other_slave,    of_cpu) {
			of_cpu = sum[way, f, cpu] + 0
			if (queues && way == "tx")
				return total != sum[way, f] + 0 || !((way, f, slave) in by)
			return total != sum[way, f] + 0 || other_cpu != total - of_cpu ||
				other_slave != of_cpu - sum[way, f, cpu, slave] || !sum[way, f, cpu, slave]
		}
		FNR == NR && $1 == "app" { app[$2 " " $3] = $4; next }
		FNR == NR {
			f = $2 " " $3
			flows += !(f in flow); flow[f]
			sum[$1, f] += $6; sum[$1, f, $4] += $6; sum[$1, f, $4, $5] += $6; by[$1, f, $5]
			next
		}
		{
			f = $1 " " $2; n++
			if (!(f in flow) || differs("rx", $3, $4, $5, $6, $7) || differs("tx", $8, $9, $10, $11, $12) ||
			    !(f in app) || $13 != app[f] || $14 != 0 || $15 < 1) { wrong++; print "wrong: " $0 }
		}
		END { print "flows " flows + 0, n + 0, wrong + 0 }' "$STEER/counted" "$STEER/flows" >"$STEER/compared"
	grep '^wrong' "$STEER/compared" | head -3 | while read -r line; do
		note "$line"
		read -r _ addr port _ <<<"$line"
		grep " $addr $port " "$STEER/counted" | while read -r line; do note "  counted: $line"; done
	done
	check_eq "flows counted, flows reported, of these not as counted" \
		"$(sed -n 's/^flows //p' "$STEER/compared")" "$1 $1 0"
}

# why SLAVE: "COUNT REASON[,REASON]" a line, of the flows received by SLAVE, or !SLAVE.
why() {
	report ".flows[] | select(.rx.slave $1) | .reasons | join(\",\") | if . == \"\" then \"-\" else . end" |
		sort | uniq -c | awk '{ print $1, $2 }'
}

# all_are SELECT COUNT REASONS: so many flows are selected, all for these reasons. But a
# timer of a CPU that sleeps may run on another, and send from there what is late: a
# delayed ACK, a retransmission; and what waits for a neighbour's address is sent by the
# CPU that receives that. As many flows may be sent by several CPUs besides.
all_are() {
	local late
	late=$(report '[.foreign_senders[] | select(.functions | any(test("^tcp_.*_timer$|^run_timer_|^__run_timer|timer_expire_remote|^__neigh_update$"))) |
		.packets] | add // 0')
	why "$1" | awk -v wanted="$3" '
		$2 == wanted { n += $1; next }
		$2 == wanted ",tx_several_cpus" || wanted == "-" && $2 == "tx_several_cpus" { n += $1; late += $1; next }
		{ other = other " " $0 }
		END { print n + 0, late + 0 other }' >"$STEER/why"
	read -r n more other <"$STEER/why"
	check_eq "flows received by ${1#*= } for $3, and others" "$n $other" "$2 "
	check_le "of these late, by packets that were late" "$more" "$late"
}

# judged LOAD_ARG...: audit one load, and compare all of its flows.
judged() {
	local complete failed
	count_packets
	audit -j -d 10m --port "$PUBLIC" --flows 10000 --stacks
	load "$@" | read -r complete failed _
	audited
	check_eq "connections that failed" "$failed" 0
	check_eq "connections" "$complete" $((${#CLIENTS[@]} * $1))
	check_eq "complete connections" "$(report .totals.complete)" "$complete"
	check_eq "connections, packets, sockets lost, packets unparsed, flows without a socket" \
		"$(report '.totals | [.lost, .lost_packets, .lost_sockets, .unparsed_packets, .no_socket] | join(" ")')" "0 0 0 0 0"
	# Of two daemons on one CPU one may interrupt the other's probe.
	check_eq "probes left out are told" \
		"$(report '(.totals.missed > 0) == any(.warnings[]; test("left out by the kernel"))')" true
	check_eq "received and sent by the slaves" \
		"$(report '.totals | [.seen_rx_packets, .seen_tx_packets] | join(" ")')" \
		"$(report '.totals | [.rx_packets, .tx_packets] | join(" ")')"
	report '.foreign_senders[] | "\(.packets) packets: \(.functions | join(" "))"' | head -5 |
		while read -r line; do note "foreign: $line"; done
	note "$(report '.totals | "\(.connections) connections, shares local \(.rx_local) \(.app_local) \(.tx_local) \(.all_local), \(.reasons)"')"
}

# policy local|remote: sent by all slaves, by the policy's own counters.
policy() {
	local nic sum=0
	for nic in $(nics); do sum=$((sum + $(slave_stat "$nic" "$1"))); done
	echo "$sum"
}

up() {
	steer_up
	nginx_conf "$STEER/conf" '{port}' '[::]:{port} ipv6only=on'
	sed -i 's/^server {/keepalive_requests 1000000;\n&/' "$STEER/conf"
	run_service nat
	wait_for 30 bound
	# The neighbours of the other family become known.
	load 1 "$SERVER_IP6" >/dev/null
}
bound() { goes_to eth0 0 && goes_to eth1 1 && goes_to eth2 2 && goes_to eth3 3; }

# goes_to NIC CPU: its interrupt, which moves when it next comes.
goes_to() {
	local dev irq
	load 1 >/dev/null
	dev=$(basename "$(readlink "$SYS/$1/device")")
	irq=$(awk -v name="$dev-input.0" '$NF == name { sub(":", "", $1); print $1 }' /proc/interrupts)
	[ "$(<"/proc/irq/$irq/effective_affinity_list")" = "$2" ]
}

# all_local: received, used and sent.
all_local() {
	compare "$ALL"
	check_eq "received and used locally" "$(report '.totals | .rx_local == 1 and .app_local == 1')" true
	all_are '!= ""' "$ALL" -
}

# Also beside what the kernel's tracepoint and the policy count.
all_local4() {
	local before remote sent
	xmit_trace on
	before=$(policy local) remote=$(policy remote)
	judged "$EACH"
	xmit_trace show | grep ' eth' >"$STEER/xmit"
	xmit_trace off
	all_local
	sent=$(report .totals.tx_packets)
	check_eq "CPUs and slaves that sent" "$(awk '{ print $1 ":" $2 }' "$STEER/xmit" | tr '\n' ' ')" \
		"0:eth0 1:eth1 2:eth2 3:eth3 "
	check_ge "transmits that were traced" "$(awk '{ n += $3 } END { print n }' "$STEER/xmit")" "$sent"
	check_ge "frames local by the policy, in the report" "$(report .bonds[0].policy_local)" "$sent"
	check_le "frames local by the policy, in the report" "$(report .bonds[0].policy_local)" $(($(policy local) - before))
	check_eq "frames remote by the policy, in the report" "$(report .bonds[0].policy_remote)" 0
	check_eq "frames remote by the policy" $(($(policy remote) - remote)) 0
}

all_local6() {
	judged "$EACH" "$SERVER_IP6"
	all_local
}

# What the report states it costs, beside what bpftool finds meanwhile; of which nothing
# is left.
overhead() {
	local maps
	audit -j -d 10m
	load 5 >/dev/null
	wait_for 20 settled
	bpftool -j prog show | jq '[.[] | select(.name | startswith("audit_"))] | length' >"$STEER/programs"
	maps=$(bpftool -j map show | jq '[.[] | select(.name | startswith("pid_iter") | not) | .bytes_memlock] | add')
	audited
	note "$(report '.overhead | "\(.map_bytes) bytes, \(.ns_per_packet) ns a packet, \(.cpu_share) of a CPU"')"
	check_eq "programs" "$(<"$STEER/programs") $(report '.overhead.probes | length')" "7 7"
	check_eq "bytes of maps" "$(report .overhead.map_bytes)" "$maps"
	check_eq "each packet has run its probe, and each probe has a length" "$(report '
		(.overhead.probes | map({ (.probe): . }) | add) as $probes |
		$probes.netif_receive_skb.runs >= .totals.seen_rx_packets and .totals.seen_rx_packets > 0 and
		$probes.net_dev_start_xmit.runs >= .totals.seen_tx_packets and .totals.seen_tx_packets > 0 and
		$probes.tcp_sendmsg_locked.runs > 0 and $probes.inet_csk_accept.runs > 0 and
		all($probes[]; .instructions > 10)')" true
	check_eq "the time of the runs adds up" "$(report '
		([.overhead.probes[] | (.runs * (.ns_per_run // 0))] | add) as $ns |
		def near($b): . / $b | . > 0.99 and . < 1.01;
		$ns > 0 and
		(.overhead.ns_per_packet * (.totals.seen_rx_packets + .totals.seen_tx_packets) | near($ns)) and
		(.overhead.cpu_share * .seconds * 1e9 | near($ns)) and .overhead.cpu_share < 4')" true
	check_eq "programs left" "$(bpftool -j prog show | jq '[.[] | select(.name | startswith("audit_"))] | length')" 0
}

# live: connections that stay open, six of each client, until stopped.
live() {
	count_packets
	peer_do "for last in ${CLIENTS[*]}; do
			ab -q -k -r -s 20 -t 100 -n 1000000 -c 6 -B 10.0.0.\$last http://$SERVER_IP:$PUBLIC/ >/dev/null 2>&1 &
		done; wait" &
	LIVE=$!
	wait_for 20 established
}
established() { [ "$(ss -Htn state established 'sport >= :8000 and sport <= :8003' | wc -l)" = 48 ]; }
stop_live() {
	peer_do "pkill -x ab"
	wait "$LIVE" || :
}

# As text: a row for each.
rows() {
	live
	cpubond audit -d 3s --flows 100 --port "$PUBLIC" >"$STEER/audit" 2>"$STEER/audit.err"
	stop_live
	grep -v '10.0.0.1:80 ' "$STEER/audit" || :
	counted | awk '$1 == "rx" { print $2 ":" $3, $4 ":" $5 }' | sort >"$STEER/counted"
	# Every hop on the CPU that receives, by its slave, with at least one packet or call; but
	# see all_are.
	awk '$1 == "10.0.0.1:80" && $3 == $5 ":eth" $5 && $4 > 0 && $6 > 0 &&
		(NF == 8 && $7 == $3 && $8 > 0 || NF == 9 && $9 == "tx_several_cpus") { print $2, $3 }' \
		"$STEER/audit" | sort >"$STEER/flows"
	diff "$STEER/counted" "$STEER/flows"
	check_eq "rows" "$(wc -l <"$STEER/flows")" 48
	check_match "the line of port 80" "$(grep '^ *80 ' "$STEER/audit")" '^ +80 +48 +100.00 % +100.00 % +[0-9.]+ % +[0-9.]+ %( +tx_several_cpus [0-9]+)?$'
	check_match "its overhead" "$(grep '^Overhead' "$STEER/audit")" \
		"^Overhead: 7 BPF programs ran [0-9]+ times, [0-9]+ ns a packet, [0-9.]+ % of one CPU's time; [0-9]+ kB of kernel memory\$"
}

# repin CPU TO: its daemon, master and worker.
repin() {
	local pid
	for pid in $(daemon_of "$1"); do
		taskset -pc "$2" "$pid" >/dev/null
	done
}

app_elsewhere() {
	local moved
	repin 1 3
	PINNED[1]=3
	judged "$EACH"
	compare "$ALL"
	moved=$(wc -l <"$STEER/served.1")
	check_ge "flows of the daemon that was moved" "$moved" 1
	# The handshake is sent where it is received, the answer where the daemon runs.
	all_are '== "eth1"' "$moved" app_other_cpu,tx_several_cpus
	all_are '!= "eth1"' $((ALL - moved)) -
	check_ge "packets sent on a foreign CPU below sendmsg" "$(report \
		'[.foreign_senders[] | select(.functions | any(. == "tcp_sendmsg_locked")) | .packets] | add // 0')" "$moved"
	check_eq "flows that are not used locally, in all" \
		"$(report ".totals | [.reasons.app_other_cpu, (1 - .app_local) * $ALL] | map(round) | join(\" \")")" "$moved $moved"
}

# as_before: eth1's interrupts go to CPU 1 again, and the policy knows.
as_before() { goes_to eth1 1 && map_is 1 eth1 irq && map_is 2 eth2 irq; }

# The slave stays CPU 1's, for it is so by hand; its interrupts go elsewhere.
received_elsewhere() {
	local count
	repin 1 1
	echo 1 >"$SYS/eth1/bonding_slave/cpus"
	bind_irq eth1 2
	wait_for 30 goes_to eth1 2
	judged "$EACH"
	compare "$ALL"
	count=$(counted | awk '$1 == "rx" && $4 == 2 && $5 == "eth1" { n++ } END { print n + 0 }')
	check_ge "flows that eth1 received on CPU 2" "$count" 1
	all_are '== "eth1"' "$count" rx_other_slave
	all_are '!= "eth1"' $((ALL - count)) -
	echo >"$SYS/eth1/bonding_slave/cpus"
	bind_irq eth1 1
	wait_for 30 as_before
}

moved_by_rps() {
	local count
	echo 8 >"$SYS/eth1/queues/rx-0/rps_cpus"
	judged "$EACH"
	echo 0 >"$SYS/eth1/queues/rx-0/rps_cpus"
	compare "$ALL"
	count=$(counted | awk '$1 == "rx" && $4 == 3 && $5 == "eth1" { n++ } END { print n + 0 }')
	check_ge "flows of eth1 that RPS moved" "$count" 1
	all_are '== "eth1"' "$count" rx_rps
	all_are '!= "eth1"' $((ALL - count)) -
}

# Of connections that go on meanwhile.
interrupt_moved() {
	local flows
	live
	audit -j -d 10m --port "$PUBLIC" --flows 1000
	wait_for 20 by_slave 1
	bind_irq eth1 2
	wait_for 30 by_slave 2
	# The policy follows within a second.
	wait_for 10 eval '! map_is 2 eth2 irq'
	kill -INT "$AUDIT"
	wait "$AUDIT"
	stop_live
	bind_irq eth1 1
	flows=$(counted | awk '$1 == "rx" && $5 == "eth1" { print $2, $3 }' | sort -u | wc -l)
	check_eq "flows of eth1 that were received on several CPUs" "$(report '[.flows[] |
		select(.rx.slave == "eth1" and (.reasons | index("rx_several_cpus")) and .rx.cpu == 1 and
		.rx.elsewhere_cpu == 2 and .rx.other_cpu > 0 and .app.cpu == 1)] | length')" "$flows"
	check_eq "other flows that were not received locally" \
		"$(report '[.flows[] | select(.rx.slave != "eth1" and (.rx_local | not))] | length')" 0
	check_ge "warnings of it" "$(report '[.warnings[] | select(startswith("which slaves CPUs are bound to has changed"))] | length')" 1
	wait_for 30 as_before
}
# by_slave CPU: every flow of eth1 has been received on it.
by_slave() {
	counted | awk -v cpu="$1" '$1 == "rx" && $5 == "eth1" { all[$2, $3]; if ($4 == cpu && $6 > 1) there[$2, $3] }
		END { for (f in all) { n++; if (!(f in there)) exit 1 } exit !n }'
}

# A bond that sends packet by packet in turn.
sent_in_turn() {
	bond_up balance-rr
	wait_for 10 peer_do "ping -q -c 1 -W 1 $SERVER_IP"
	judged "$EACH"
	compare "$ALL" shared
	check_eq "mode, and what binds" "$(report '.bonds[0] | [.mode, .bound_by, .policy_local] | tojson')" '["balance-rr","irq",null]'
	check_eq "received and used locally" "$(report '.totals | .rx_local == 1 and .app_local == 1')" true
	# Chance may have sent all of one by its own slave.
	check_le "sent locally, of $ALL" "$(report ".totals.tx_local * $ALL | round")" $((ALL / 4))
	check_eq "hops and reasons told, one a flow" "$(report '[.flows[] | select(.tx_local | not) | .reasons |
		select(length != 1 or (.[0] | startswith("tx_") | not))] | length')" 0
	check_ge "flows sent by several slaves" "$(report .totals.reasons.tx_several_slaves)" 1
}

# Connections that nobody takes are told apart.
refused() {
	count_packets 81
	audit -j -d 10m --port 81
	peer_do "for i in 1 2 3; do : </dev/tcp/$SERVER_IP/81 || :; done" 2>/dev/null
	wait_for 10 answered 3
	kill -INT "$AUDIT"
	wait "$AUDIT"
	check_eq "connections, flows without a socket, their packets" \
		"$(report '.totals | [.connections, .no_socket, .no_socket_packets] | join(" ")')" "0 3 6"
}
answered() { [ "$(counted | grep -c '^tx')" = "$1" ]; }

# fails CODE WHAT CMD...: with this exit code and one line that says so.
fails() {
	local code=$1 what=$2 rc=0
	shift 2
	"$@" >"$STEER/out" 2>"$STEER/err" || rc=$?
	note "$(<"$STEER/err")"
	check_eq "exit code of $*" "$rc" "$code"
	check_match "error of $*" "$(<"$STEER/err")" "$what"
	check_eq "lines of error" "$(wc -l <"$STEER/err")" 1
	check_eq "output" "$(<"$STEER/out")" ""
}

unable() {
	local nobody='setpriv --reuid 65534 --regid 65534 --clear-groups'
	# shellcheck disable=SC2086 # a list of words
	fails 1 'no permission to load BPF programs; run as root, or with CAP_BPF and CAP_PERFMON' $nobody cpubond audit -d 1s
	fails 4 'type information .*/sys/kernel/btf/vmlinux: No such file.*CONFIG_DEBUG_INFO_BTF' \
		unshare -m bash -c 'mount -t tmpfs none /sys/kernel/btf && exec cpubond audit -d 1s'
	fails 1 'bond7: no such bond' cpubond audit bond7
	fails 2 '8 ports' cpubond audit --port 1 --port 2 --port 3 --port 4 --port 5 --port 6 --port 7 --port 8 --port 9
	# The two capabilities are enough, but for its own cost.
	# shellcheck disable=SC2086 # a list of words
	$nobody --inh-caps=+bpf,+perfmon --ambient-caps=+bpf,+perfmon cpubond audit -d 1s >"$STEER/audit"
	grep -q '^Overhead: 7 BPF programs; [0-9]* kB of kernel memory$' "$STEER/audit"
	grep -q '^warning: how long the probes ran is not known: measuring it takes CAP_SYS_ADMIN$' "$STEER/audit"
	bond_down
	fails 1 'there is no bond; make one' cpubond audit
}

ktap_plan 12
ktap_run "a daemon a CPU behind one port" up
ktap_run "IPv4: each flow is told as it was counted, all of it local" all_local4
ktap_run "IPv6: each flow is told as it was counted, all of it local" all_local6
ktap_run "live connections have a row each" rows
ktap_run "it states what it costs, and leaves nothing" overhead
ktap_run "a daemon on another CPU is told, and what it sends" app_elsewhere
ktap_run "a slave that is received on another CPU than its own is told" received_elsewhere
ktap_run "packets that RPS moves are told" moved_by_rps
ktap_run "an interrupt that moves is told of the flows it moves" interrupt_moved
ktap_run "connections that nobody takes are no connections" refused
ktap_run "balance-rr: that other slaves send is told" sent_in_turn
ktap_run "without privilege, type information or a bond it says so" unable
ktap_finished
