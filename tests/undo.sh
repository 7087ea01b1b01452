#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# `cpubond undo` after a kill at every write, and what it leaves alone.
#
#   server bond0 (cpu_bound)                        peer bond0 (balance-xor)
#     CPU 0-1 ⇄ eth0, up before ──────────────────── eth0
#     CPU 2-3 ⇄ eth1, down before ────────────────── eth1
#
# strace kills on entry of each system call in turn that writes, to a file or by netlink:
# so the machine is seen after every write, and before the next one.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=300
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/apply.bash"

ORIGIN=/tmp/origin BEFORE=/tmp/before

# killed_at CALLS N CMD...: kill CMD at its Nth of any of these; fails if it has ended
# before that. strace counts them apart.
killed_at() {
	local calls=$1 n=$2 rc=0
	shift 2
	{ slowly -e trace="$calls" -e inject="$calls:signal=KILL:when=$n" "$@"; } >/tmp/out 2>&1 || rc=$?
	case $rc in
	137) ;;
	0) return 1 ;;
	*) fail "exit code $rc: $(</tmp/out)" ;;
	esac
}

# writes: of what `slowly` has traced, those calls that change anything, as "CALL N".
writes() {
	sed -E "/$CHANGES/s/^/change /" "$TRACE" |
		awk '{ call = $0; sub(/^change /, "", call); sub(/\(.*/, "", call); n[call]++ }
			/^write\([12],/ { next }
			/^(write|rename|unlink)\(|^change / { print call, n[call] }'
}

# undone: `cpubond undo` restores all, and has nothing to report.
undone() {
	exits 0 cpubond undo
	check_eq "what undo has to report" "$ERR" ""
	unchanged "$ORIGIN"
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
}

apply_killed() {
	local call n sum=0 most=0
	local -A kills=()
	of_two "addresses = [\"$SERVER_IP/24\"]" 'follow = "flow"'
	exits 0 slowly -e trace="$WRITES" cpubond apply
	writes >/tmp/writes
	undone
	while read -r call n; do
		trap 'note "killed at $call $n of: $(tr "\n" " " </tmp/writes)"' EXIT
		killed_at "$call" "$n" cpubond apply || fail "it ended before that"
		undone
		trap - EXIT
		kills[$call]=$((${kills[$call]:-0} + 1))
		sum=$((sum + ${OUT%% *}))
		[ "${OUT%% *}" -le "$most" ] || most=${OUT%% *}
	done </tmp/writes
	note "killed at ${kills[write]} write, ${kills[rename]} rename, ${kills[sendto]:-0} sendto; $sum changes taken back, up to $most at a time"
	# Twelve changes and the end of it, each written down before; six are by netlink.
	check_ge "kills at rename" "${kills[rename]}" 13
	check_ge "kills at sendto" "${kills[sendto]:-0}" 6
	check_ge "kills at write" "${kills[write]}" 20
	check_ge "changes taken back at most" "$most" 8
}

# Each goes on where the one before was killed.
undo_killed() {
	local n
	of_two "addresses = [\"$SERVER_IP/24\"]"
	exits 0 cpubond apply
	for ((n = 1; ; n++)); do
		killed_at "$WRITES" "$n" cpubond undo || break
	done
	note "killed at write 1, 2, … $((n - 1))"
	check_ge "kills" $((n - 1)) 5
	unchanged "$ORIGIN"
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
}

others() {
	local irq
	of_two "addresses = [\"$SERVER_IP/24\"]"
	exits 0 cpubond apply
	irq=$(nic_irqs eth1 | head -n 1)
	echo 1 >"/proc/irq/$irq/smp_affinity_list"
	exits 0 cpubond undo
	check_eq "undo" "$ERR" "cpubond: eth1: CPUs of irq/$irq: holds '1', neither what cpubond set ('2') nor what was there before ('0-3'), left as it is"
	check_eq "CPUs of irq/$irq" "$(<"/proc/irq/$irq/smp_affinity_list")" 1
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
	echo 0-3 >"/proc/irq/$irq/smp_affinity_list"
	unchanged "$ORIGIN"
}

# Taken out by somebody, and into a bridge.
elsewhere() {
	exits 0 cpubond apply
	ip link add br0 type bridge
	ip link set eth1 nomaster
	ip link set eth1 up master br0
	exits 0 cpubond undo
	check_match "undo" "$ERR" "^cpubond: eth1: master: holds 'br0', neither"
	check_eq "master of eth1" "$(basename "$(readlink "$SYS/eth1/master")")" br0
	[ ! -e "$SYS/$BOND" ] || fail "$BOND is there"
	ip link del br0
	ip link set eth1 down
	unchanged "$ORIGIN"
}

replaced() {
	local line
	exits 0 cpubond apply
	replug eth1
	of eth1 >"$BEFORE"
	exits 0 cpubond undo
	while read -r line; do
		check_match "undo" "$line" "^cpubond: eth1: .*: eth1 is another device than the one that cpubond changed \(index [0-9]+, .*\), left as it is$"
	done <<<"$ERR"
	check_ge "lines of undo" "$(lines "$ERR")" 3
	of eth1 | diff "$BEFORE" - || fail "eth1 was changed"
	[ ! -e "$SYS/$BOND" ] || fail "$BOND is there"
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
	# It has another index now, and comes last.
	of eth0 | diff /tmp/eth0 - || fail "eth0 is not what it was"
}

# Two NICs that change names: it is not the name that is restored to.
renamed() {
	exits 0 cpubond apply
	of eth2 >"$BEFORE"
	ip link set eth1 down
	ip link set eth1 name old
	ip link set eth2 name eth1
	exits 0 cpubond undo
	check_match "undo" "$ERR" "eth1 is another device than the one that cpubond changed \(index [0-9]+, permanent address ..:..:..:..:..:.2, not index [0-9]+, permanent address ..:..:..:..:..:.1\)"
	ip link set eth1 name eth2
	ip link set old name eth1
	bind_irq eth1 0-3
	of eth2 | diff "$BEFORE" - || fail "the one that was named eth1 meanwhile was changed"
	of eth0 | diff /tmp/eth0 - || fail "eth0 is not what it was"
}

ktap_plan 6
modprobe bonding max_bonds=0
modprobe bond_cpu_bound
open_once
machine >"$ORIGIN"
of eth0 >/tmp/eth0
ktap_run "an apply killed at any write is undone, byte for byte" apply_killed
ktap_run "an undo that is killed again and again is finished by the last" undo_killed
ktap_run "an interrupt that somebody moved meanwhile is left, and the rest restored" others
ktap_run "a slave that somebody put elsewhere is left there" elsewhere
ktap_run "of NICs that changed names, neither is taken for the other" renamed
ktap_run "a NIC that was replaced is left alone" replaced
ktap_finished
