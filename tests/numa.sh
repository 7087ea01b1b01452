#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Two sockets: a CPU without a slave of its own sends by that of its socket, is served by
# a daemon of its socket, and a daemon's memory is its socket's.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     socket 0: CPU 0 ⇄ eth0 ─────────────────── eth0
#               CPU 1
#     socket 1: CPU 2 ⇄ eth1 ─────────────────── eth1
#               CPU 3
#
# vm: cpus=4 nics=2 sockets=2 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

up() {
	bind_irq eth0 0
	bind_irq eth1 2
	bond_up cpu_bound eth0 eth1
	open_sink
	wait_for 10 map_is 0 eth0 irq
	wait_for 10 map_is 2 eth1 irq
	all_up
}

# nearest CPU SLAVE
nearest() {
	falls_back "$1"
	note "CPU $1: $(bond_map "$1")"
	check_match "map of CPU $1" "$(bond_map "$1")" "^$2 (smt|llc|node)$"
	spreads "$1" 200 "$2"
}

# With the slave of its socket gone, the other is better than none.
far() {
	ip link set eth0 down
	wait_for 10 map_is 1 eth1
	check_match "map of CPU 1" "$(bond_map 1)" "^eth1 (node|any)$"
	spreads 1 200 eth1
}

# Each daemon takes 8 MB, and then becomes one that listens.
daemons() {
	mkdir -p "$RUN_DIR"
	printf '%s\n' "server.document-root = \"$RUN_DIR\"" 'server.port = env.CPUBOND_PORT' \
		'setenv.add-response-header = ( "CPU" => env.CPUBOND_CPU )' 'server.modules = ( "mod_setenv" )' >"$RUN_DIR/conf"
	# shellcheck disable=SC2016 # the daemon's shell expands it
	cpubond run --port 80 --name numa -- bash -c '
		memory=$(head -c 8388608 /dev/zero | tr "\0" x)
		echo "$$" >"$0/pid.$CPUBOND_CPU"
		lighttpd -D -f "$0/conf"
		echo "${#memory}"' "$RUN_DIR" </dev/null >"$RUN_DIR/log" 2>&1 &
	wait_for 60 live 4
}
live() {
	[ "$(cpubond steer list numa -j | jq '[.services[].daemons[] | select(.phase == "live")] | length')" = "$1" ]
}

# memory CPU NODE: what its daemon has allocated, by the kernel's account.
memory() {
	local own other
	awk -v node="$2" '/ anon=/ && !/ file=/ {
			if ($2 != "prefer:" node && !/ (vdso|vvar)/) { print "policy: " $0; bad++ }
			for (i = 3; i <= NF; i++)
				if (split($i, n, "=") == 2 && n[1] ~ /^N[0-9]+$/) pages[n[1] == "N" node] += n[2]
		}
		END { print pages[1] + 0, pages[0] + 0; exit bad }' "/proc/$(<"$RUN_DIR/pid.$1")/numa_maps" >"$RUN_DIR/memory"
	read -r own other <"$RUN_DIR/memory"
	note "CPU $1: $own pages of node $2, $other of the other"
	check_ge "pages of node $2" "$own" 2048
	check_eq "pages of the other node" "$other" 0
}

memories() {
	daemons
	memory 0 0
	memory 1 0
	memory 2 1
	memory 3 1
}

# asked CPU: which CPU's daemon answers what starts on this one.
asked() {
	taskset -c "$1" bash -c 'exec 3<>/dev/tcp/127.0.0.1/80; printf "GET / HTTP/1.0\r\n\r\n" >&3; cat <&3' |
		sed -n 's/^CPU: \([0-9]*\).*/\1/p'
}

# all_asked: of each CPU.
all_asked() { for cpu in 0 1 2 3; do asked "$cpu"; done | tr '\n' ' '; }

# With its own daemon drained a CPU goes to the one beside it; with both, to the others.
neighbours() {
	local cpu
	note "$(grep '^cpubond: ' "$RUN_DIR/log")"
	check_eq "who serves CPUs 0 to 3" "$(all_asked)" "0 1 2 3 "
	cpubond steer drain numa 0
	check_eq "who serves them without 0" "$(all_asked)" "1 1 2 3 "
	cpubond steer drain numa 3
	check_eq "who serves them without 0 and 3" "$(all_asked)" "1 1 2 2 "
	cpubond steer drain numa 1
	check_eq "who serves them without 0, 1 and 3" "$(all_asked)" "2 2 2 2 "
	check_fails cpubond steer drain numa 2
	for cpu in 0 1 3; do cpubond steer undrain numa "$cpu"; done
	check_eq "who serves them in the end" "$(all_asked)" "0 1 2 3 "
	cpubond steer del numa
}

RUN_DIR=/tmp/numa

ktap_plan 6
ktap_run "one CPU of each socket has a slave" up
ktap_run "CPU 1 sends by the slave of its socket" nearest 1 eth0
ktap_run "CPU 3 sends by the slave of its socket" nearest 3 eth1
ktap_run "a socket without a slave sends by the other's" far
ktap_run "a daemon's memory is of its CPU's node" memories
ktap_run "a CPU whose daemon drains is served by its socket's" neighbours
ktap_finished
