#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Steering by sk_lookup: an unmodified nginx a CPU, each on a port of its own, behind one
# port, with neither NAT nor connection tracking.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=300
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/steer.bash"

# What the killed daemon had in hand: at most two connections of each client.
RESET_AT_MOST=16

up() {
	steer_up
	nginx_conf "$STEER/conf" '{port}' '[::]:{port} ipv6only=on'
	run_service sk_lookup
	check_eq "links to the network namespace" \
		"$(bpftool -j link | jq -r '.[] | select(.attach_type == "sk_lookup") | .type')" netns
	check_eq "listeners in the map" "$(bpftool -j map dump pinned /sys/fs/bpf/cpubond/web/listeners |
		jq '[.[] | select(.value | type == "array" and (map(tonumber? // 1) | add != 0))] | length')" 8
}

# tracked: the connections that conntrack knows, by addresses and ports. Those of a test
# before this one may be among them for two minutes.
tracked() {
	[ ! -e /proc/net/nf_conntrack ] ||
		awk '{
			key = $3
			for (i = 1 + (n = 0); i <= NF && n < 4; i++)
				if ($i ~ /^(src|dst|sport|dport)=/) { key = key " " $i; n++ }
			print key
		}' /proc/net/nf_conntrack | sort
}

untracked() {
	tracked >"$STEER/tracked"
	local4
	check_eq "connections that are tracked" "$(tracked | comm -13 "$STEER/tracked" - | wc -l)" 0
}

drift() {
	bpftool map delete pinned /sys/fs/bpf/cpubond/web/listeners key 0 0 0 0
	local rc=0
	cpubond steer list web || rc=$?
	check_eq "exit code of steer list when a listener is gone" "$rc" 3
}

no_udp() {
	local rc=0
	cpubond run --port 53 --protocol udp --steer sk_lookup -- true '{cpu}' 2>"$STEER/udp" || rc=$?
	check_eq "exit code" "$rc" 4
	check_match "what it says" "$(<"$STEER/udp")" '--steer nat'
}

ktap_plan 9
ktap_run "each CPU has its listeners in the map" up
ktap_run "IPv4: every connection is served on the CPU that received it, none tracked" untracked
ktap_run "IPv6: every connection is served on the CPU that received it" local6
ktap_run "a daemon killed under load: none refused, and it comes back" kill_one
ktap_run "a drained daemon gets none, others serve its CPU, and it comes back" drained
ktap_run "three of four killed three times under load: none refused" storm
ktap_run "steer list tells what is not as it should be" drift
ktap_run "UDP is refused, with what to use" no_udp
ktap_run "nothing is left" ended
ktap_finished
