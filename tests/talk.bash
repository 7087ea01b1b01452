# shellcheck shell=bash
# What the tests of the whole LAG share: requests that are answered, both ways, and
# what the links and the policy counted meanwhile. Sourced after lib.sh and
# traffic.bash.

PORT=7000
# The peer's addresses for clients, as in the paper.
CLIENTS=$(printf ',10.0.0.%d' {11..18})
CLIENTS=${CLIENTS#,}
ANSWER=/tmp/answer.log

# at ADDR[,ADDR...]: with the port, as `vm traffic` takes it.
at() {
	local addr all=
	for addr in ${1//,/ }; do
		[[ $addr != *:* ]] || addr=[$addr]
		all+=,$addr:$PORT
	done
	echo "${all#,}"
}

# answer_on server|peer ADDR[,ADDR...]: requests are answered there; on the server by
# a thread pinned on each CPU.
answer_on() {
	local listening="ss -Hltn sport = :$PORT | grep -q ."
	local stop="pkill -x traffic || :; while pgrep -x traffic; do sleep 0.1; done"
	if [ "$1" = server ]; then
		eval "$stop"
		cpubond vm traffic answer --at "$(at "$2")" --cpus "0-$(($(nproc) - 1))" \
			<&- >"$ANSWER" 2>&1 &
		wait_for 10 eval "$listening"
	else
		peer_do "$stop; cpubond vm traffic answer --at $(at "$2") <&- >$ANSWER 2>&1 &"
		wait_for 10 peer_do "$listening"
	fi
}

# ask_from server|peer ADDR[,ADDR...] TO[,TO...] COUNT [tcp|udp [SIZE]]: each request
# is a flow of its own, and each must be answered.
ask_from() {
	local where=$1 report
	local cmd="cpubond vm traffic ask --from $2 --to $(at "$3") --count $4 --protocol ${5:-tcp} --size ${6:-128}"
	if [ "$where" = server ]; then
		report=$($cmd)
	else
		report=$(peer_do "$cmd")
	fi
	check_eq "requests of the $where by ${5:-tcp} that were answered" \
		"$(jq .answered <<<"$report")" "$4"
	note "$4 of $4 requests of the $where by ${5:-tcp} answered"
}

# talk SERVER_ADDR PEER_ADDR COUNT [TCP_SIZE [UDP_SIZE]]: requests by TCP and UDP,
# both ways, all answered, all that the server sends local to its CPU.
talk() {
	local server=$1 peer=$2 count=$3 tcp=${4:-128} udp=${5:-128}
	answer_on server "$server"
	answer_on peer "$peer"
	open_locality
	ask_from peer "$peer" "$server" "$count" tcp "$tcp"
	ask_from peer "$peer" "$server" "$count" udp "$udp"
	ask_from server "$server" "$peer" "$count" tcp "$tcp"
	ask_from server "$server" "$peer" "$count" udp "$udp"
	# A request by UDP takes one packet, one by TCP at least four.
	all_local $((2 * count * 5))
}

# sum_stat local|remote: of all slaves, by the policy's counters.
sum_stat() {
	local nic sum=0
	for nic in $(slaves); do
		sum=$((sum + $(slave_stat "$nic" "$1")))
	done
	echo "$sum"
}

# open_locality: all_local counts from here.
open_locality() {
	LOCAL=$(sum_stat local) REMOTE=$(sum_stat remote)
}

# all_local AT_LEAST: so many packets have been sent, all of them by a slave of their
# CPU, and by every slave.
all_local() {
	local local remote nic
	local=$(($(sum_stat local) - LOCAL)) remote=$(($(sum_stat remote) - REMOTE))
	check_ge "packets sent by a slave of their CPU" "$local" "$1"
	check_eq "packets sent by another slave" "$remote" 0
	for nic in $(slaves); do
		check_ge "packets sent by $nic" "$(slave_stat "$nic" local)" 1
	done
	note "$local of $local packets sent by a slave of their CPU"
}

# open_flows: the server notes which flow comes in by which link.
open_flows() {
	local nic
	nft "add table netdev flows
		delete table netdev flows
		add table netdev flows
		add set netdev flows seen { type inet_proto . ipv4_addr . inet_service . inet_service . ifname; flags dynamic; size 65535; }"
	for nic in $(nics); do
		nft "add chain netdev flows $nic { type filter hook ingress device $nic priority 0; }
			add rule netdev flows $nic meta l4proto { tcp, udp } update @seen { ip protocol . ip saddr . th sport . th dport . meta iifname }"
	done
}

# flows: "FLOWS LINKS SEVERAL": how many there were, by how many links in all, and how
# many flows came in by several.
flows() {
	nft -j list set netdev flows seen | jq -r '
		[.. | objects | .concat // empty | { flow: .[0:4], link: .[4] }] |
		[(group_by(.flow) | length), (group_by(.link) | length),
		 (group_by(.flow) | map(select(map(.link) | unique | length > 1)) | length)] | join(" ")'
}

# bulk FROM TO CPULIST SECONDS [ARG...]: one TCP stream from server or peer (FROM) to
# address TO of the other, by a thread that changes CPU every 10 ms; more arguments are
# those of `vm traffic bulk`. Tells in $SENT_JSON and $DRAINED_JSON what both ends say;
# all bytes must have come.
bulk() {
	local drain="cpubond vm traffic drain --at $2:$PORT"
	local send="cpubond vm traffic bulk --to $2:$PORT --cpus $3 --seconds $4 ${*:5}"
	local listening="ss -Hltn sport = :$PORT | grep -q ." out
	out=$(mktemp)
	if [ "$1" = server ]; then
		peer_do "$drain" >"$out" &
		wait_for 10 peer_do "$listening"
		SENT_JSON=$($send)
	else
		$drain >"$out" &
		wait_for 10 eval "$listening"
		SENT_JSON=$(peer_do "$send")
	fi
	wait $!
	DRAINED_JSON=$(<"$out")
	rm "$out"
	check_eq "bytes that came" "$(jq .bytes <<<"$DRAINED_JSON")" "$(jq .bytes <<<"$SENT_JSON")"
}
