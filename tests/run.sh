#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# `cpubond run` as a supervisor: daemons pinned with all they start, looked after, and
# nothing of them left, whoever is killed. Who gets which connection is for the
# steer_* tests.
#
# vm: cpus=4 nics=4 queues=1 peer=none timeout=180
. "$(dirname "$0")/lib.sh"

DIR=/tmp/run
NAME="test"
# The daemons are lighttpd, wrapped in a shell that says what it was given.
CONF=$DIR/conf

# prepare: nothing is left of a case that failed.
prepare() {
	if pkill -KILL -f '^cpubond run '; then
		wait_for 20 no_keepers
		cpubond steer del "$NAME"
	fi
	rm -rf "$DIR"
	mkdir -p "$DIR/www"
	# shellcheck disable=SC2016 # lighttpd expands it
	printf '%s\n' "server.document-root = \"$DIR/www\"" 'server.port = env.CPUBOND_PORT' >"$CONF"
}

no_keepers() { ! pgrep -f '^cpubond keep '; }

# start ARG... -- CMD...: `cpubond run` in the background; $RUN is its process. Its
# output is in $DIR/out and $DIR/err.
start() {
	cpubond run --port 80 --name "$NAME" "$@" >"$DIR/out" 2>"$DIR/err" </dev/null &
	RUN=$!
}

# daemons: "CPU PHASE PID RESTARTS" a line.
daemons() {
	cpubond steer list "$NAME" -j |
		jq -r '.services[].daemons[] | "\(.cpu) \(.phase) \(.pid // "-") \(.restarts)"'
}

count() { daemons | awk -v phase="$1" '$2 == phase { n++ } END { print n + 0 }'; }
has() { [ "$(count "$1")" = "$2" ]; }
pid_of() { daemons | awk -v cpu="$1" '$1 == cpu { print $3 }'; }
restarts_of() { daemons | awk -v cpu="$1" '$1 == cpu { print $4 }'; }
# back CPU RESTARTS: all four are live, this one after so many restarts.
back() { [ "$(restarts_of "$1")" = "$2" ] && has live 4; }
gone() { [ ! -e "/proc/$1" ]; }

# tree PID: it and all its descendants.
tree() {
	local child
	echo "$1"
	for child in $(cat "/proc/$1"/task/*/children 2>/dev/null || :); do
		tree "$child"
	done
}

# family PID: the keepers that a cpubond run has started, and all their descendants; not
# what it starts for a moment itself.
family() {
	local keeper
	for keeper in $(pgrep -P "$1" -f '^cpubond keep '); do
		tree "$keeper"
	done
}

# all_gone PID...
all_gone() {
	local pid
	for pid; do
		gone "$pid" || return 1
	done
}

# ended CODE: $RUN ends with this exit code.
ended() {
	local code=0
	wait_for 30 gone_or_zombie "$RUN"
	wait "$RUN" || code=$?
	check_eq "exit code of cpubond run" "$code" "$1"
	[ ! -e "/run/cpubond/steer/$NAME.json" ] || fail "it left its state file behind"
	check_eq "files left in /run/cpubond/steer" "$(ls /run/cpubond/steer)" ""
	check_eq "nft rules left" "$(nft list ruleset)" ""
}
gone_or_zombie() { [ ! -e "/proc/$1" ] || grep -q '^State:.Z' "/proc/$1/status"; }

zombies() { grep -ls '^State:.Z' /proc/[0-9]*/status | wc -l; }

pinned() {
	local cpu pid all=0
	prepare
	# A daemon, and what has left the family by forking twice.
	# shellcheck disable=SC2016 # the daemon's shell expands it
	start -- bash -c '
		echo "cpu $CPUBOND_CPU port $CPUBOND_PORT index $CPUBOND_INDEX args $*"
		echo "to stderr" >&2
		printf "no end of line"
		(sleep 1000 &)
		lighttpd -D -f "$0"' "$CONF" '{cpu}/{port}/{index}'
	wait_for 30 has live 4
	for cpu in 0 1 2 3; do
		# Output takes a way of its own.
		wait_for 10 grep -qx "\[cpu $cpu\] cpu $cpu port 800$cpu index $cpu args $cpu/800$cpu/$cpu" "$DIR/out"
		wait_for 10 grep -qx "\[cpu $cpu\] to stderr" "$DIR/err"
	done
	for pid in $(family "$RUN"); do
		cpu=$(awk '$1 == "Cpus_allowed_list:" { print $2 }' "/proc/$pid/status")
		check_match "CPUs of $(tr '\0' ' ' <"/proc/$pid/cmdline")" "$cpu" '^[0-3]$'
		all=$((all + 1))
	done
	# Keeper, lighttpd (which the shell has become), sleep.
	check_eq "processes that are pinned" "$all" 12
	for cpu in 0 1 2 3; do
		check_eq "CPU that the daemon of CPU $cpu is allowed" \
			"$(awk '$1 == "Cpus_allowed_list:" { print $2 }' "/proc/$(pid_of "$cpu")/status")" "$cpu"
		check_eq "port that the daemon of CPU $cpu listens on" \
			"$(daemon_port "$(pid_of "$cpu")")" "$((8000 + cpu))"
	done
	echo "$RUN" >"$DIR/pid"
}

# daemon_port PID: where it listens, by its sockets' inodes.
daemon_port() {
	local inode
	for inode in $(readlink "/proc/$1/fd"/* | sed -n 's/^socket:\[\([0-9]*\)\]$/\1/p'); do
		awk -v inode="$inode" '$10 == inode && $4 == "0A" { split($2, a, ":"); print a[2] }' \
			/proc/net/tcp /proc/net/tcp6
	done | sort -u | while read -r port; do echo $((16#$port)); done
}

restarted() {
	local old all
	RUN=$(<"$DIR/pid")
	old=$(pid_of 2)
	kill -9 "$old"
	wait_for 10 grep -q 'cpu 2: ended with exit code 137, is started again in 1 s' "$DIR/err"
	wait_for 20 back 2 1
	[ "$(pid_of 2)" != "$old" ] || fail "CPU 2 has its old process"
	# The keeper itself: what it kept ends up with its parent, who ends it.
	all=$(tree "$(ppid "$(pid_of 1)")")
	# shellcheck disable=SC2086 # a list of words
	set -- $all
	check_eq "processes of CPU 1" $# 3
	kill -9 "$1"
	wait_for 10 all_gone "$@"
	# That all are live may still be the account of before.
	wait_for 20 back 1 1
	check_eq "restarts of CPU 0" "$(restarts_of 0)" 0
	check_eq "zombies" "$(zombies)" 0
}
ppid() { awk '$1 == "PPid:" { print $2 }' "/proc/$1/status"; }

stopped() {
	local all
	RUN=$(<"$DIR/pid")
	all=$(family "$RUN")
	kill -TERM "$RUN"
	# shellcheck disable=SC2086 # a list of words
	wait_for 20 all_gone "$RUN" $all
	check_eq "lines of stdout that were not ended" "$(grep -cx '\[cpu .\] no end of line' "$DIR/out")" 6
	check_eq "files left in /run/cpubond/steer" "$(ls /run/cpubond/steer)" ""
	check_eq "nft rules left" "$(nft list ruleset)" ""
}

codes() {
	prepare
	start --cpus 0-1 -- lighttpd -D -f "$CONF"
	wait_for 20 has live 2
	kill -INT "$RUN"
	ended 0

	# One that refuses SIGTERM is killed after its time.
	# shellcheck disable=SC2016 # the daemon's shell expands it
	start --cpus 2 --grace 1 -- bash -c 'trap "" TERM; lighttpd -D -f "$0"; while :; do sleep 1; done' "$CONF"
	wait_for 20 has live 1
	kill -TERM "$RUN"
	ended 137

	# And one that ends with a code of its own.
	# shellcheck disable=SC2016 # the daemon's shell expands it
	start --cpus 3 -- bash -c 'trap "kill \$!; exit 7" TERM; lighttpd -D -f "$0" & wait' "$CONF"
	wait_for 20 has live 1
	cpubond steer del "$NAME"
	ended 7
}

gives_up() {
	local seconds=$SECONDS
	prepare
	start --cpus 0-1 --give-up 3 -- bash -c 'echo "try"; exit 5'
	ended 5
	check_eq "tries of each of two daemons" "$(grep -c '^\[cpu [01]\] try$' "$DIR/out")" 6
	check_eq "exit codes, all told" "$(grep -c 'ended with exit code 5' "$DIR/err")" 6
	# 1 s, then 2 s between them.
	check_ge "seconds it took" $((SECONDS - seconds)) 3
	grep -q 'is started again in 2 s' "$DIR/err" || fail "the wait was not doubled"
	start --cpus 0 --give-up 1 -- /no/such/program
	ended 127
	grep -q '/no/such/program: cannot be started' "$DIR/err" || fail "it does not say what is wrong"
}

# Nobody is left to tidy up: the kernel tells the keepers.
killed() {
	local all
	prepare
	# shellcheck disable=SC2016 # the daemon's shell expands it
	start -- bash -c '(sleep 1000 &); lighttpd -D -f "$0"; exit $?' "$CONF"
	wait_for 30 has live 4
	all=$(family "$RUN")
	# shellcheck disable=SC2086 # a list of words
	set -- $all
	# Keeper, shell, lighttpd, sleep.
	check_eq "processes" $# 16
	kill -9 "$RUN"
	wait "$RUN" || :
	wait_for 20 all_gone "$@"
	# What is in the kernel stays, and is known.
	check_eq "exit code of steer list" "$(cpubond steer list >/dev/null 2>&1 || echo $?)" 3
	check_fails cpubond steer drain "$NAME" 1
	# The next one takes over.
	start --cpus 1 -- lighttpd -D -f "$CONF"
	wait_for 20 has live 1
	check_fails cpubond run --port 80 --name "$NAME" -- true
	check_fails cpubond run --port 80 --name other -- true
	check_fails cpubond run --port 81 --name other --base-port 8000 -- true
	kill -9 "$RUN"
	wait "$RUN" || :
	cpubond steer del "$NAME"
	check_eq "files left in /run/cpubond/steer" "$(ls /run/cpubond/steer)" ""
	check_eq "nft rules left" "$(nft list ruleset)" ""
	check_fails cpubond steer del "$NAME"
}

# Every line of a burst arrives, whole, with its prefix.
output() {
	local cpu
	prepare
	# shellcheck disable=SC2016 # the daemon's shell expands it
	start --give-up 1 -- bash -c 'for ((i = 0; i < 3000; i++)); do echo "line $i of $CPUBOND_CPU xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"; done'
	ended 0
	for cpu in 0 1 2 3; do
		seq -f "[cpu $cpu] line %.0f of $cpu xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" 0 2999 >"$DIR/want"
		grep "^\[cpu $cpu\]" "$DIR/out" | cmp - "$DIR/want"
	done
	check_eq "lines in all" "$(wc -l <"$DIR/out")" 12000
}

# By its words in the configuration.
configured() {
	prepare
	cat >"$DIR/config.toml" <<-CONF
		[[service]]
		name = "$NAME"
		port = 80
		cpus = "1-2"
		command = ["lighttpd", "-D", "-f", "$CONF"]
	CONF
	cpubond run --service "$NAME" --config "$DIR/config.toml" >"$DIR/out" 2>"$DIR/err" &
	RUN=$!
	wait_for 20 has live 2
	check_eq "its daemons" "$(daemons | cut -d ' ' -f 1 | tr '\n' ' ')" "1 2 "
	check_fails cpubond run --service other --config "$DIR/config.toml"
	cpubond steer del "$NAME"
	ended 0
}

# `cpubond undo` ends a service, and what a cpubond run that was killed has left of one.
undone() {
	local method killed all
	for method in nat sk_lookup; do
		for killed in "" killed; do
			prepare
			start --cpus 0-1 --steer "$method" -- lighttpd -D -f "$CONF"
			wait_for 30 has live 2
			all=$(family "$RUN")
			[ "$(in_kernel)" != "0 0 0" ] || fail "$method: nothing is in the kernel"
			if [ -n "$killed" ]; then
				kill -9 "$RUN"
				wait "$RUN" || :
			fi
			check_match "output of undo" "$(cpubond undo)" "^$NAME: service ended"
			[ -n "$killed" ] || ended 0
			# shellcheck disable=SC2086 # a list of words
			wait_for 20 all_gone $all
			check_eq "left in /run/cpubond/steer" "$(ls /run/cpubond/steer)" ""
			check_eq "left in the kernel by $method $killed" "$(in_kernel)" "0 0 0"
			check_eq "steer list" "$(cpubond steer list)" "no services"
		done
	done
}
# in_kernel: lines of nft rules, BPF links, files in the BPF file system.
in_kernel() {
	echo "$(nft list ruleset | wc -l) $(bpftool -j link | jq length) $(find /sys/fs/bpf -mindepth 1 | wc -l)"
}

ktap_plan 9
ktap_run "each daemon is pinned with all it starts, and its words are filled in" pinned
ktap_run "what is killed is started again, and leaves nothing behind" restarted
ktap_run "SIGTERM stops all processes and removes all traces" stopped
ktap_run "the exit code is the daemon's, by the rule of --help" codes
ktap_run "a daemon that fails waits longer each time, and is given up" gives_up
ktap_run "no process outlives a cpubond that is killed" killed
ktap_run "output is passed on by the line, and none is lost" output
ktap_run "a service of the configuration runs" configured
ktap_run "undo removes a service, and what is left of one" undone
ktap_finished
