#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Cables pulled and put back under load: what becomes of a steady flow of numbered
# datagrams, 250 a second, with cpu_bound and, beside it, balance-xor and balance-rr.
#
#   server bond0                              peer bond0 (balance-xor)
#   cpu_bound, balance-xor, balance-rr        counts what arrives
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# with the cable that carries the flow (balance-rr: eth1, which carries a quarter)
# pulled and put back in each trial. Then, with all cables in, that cable is made 50 ms
# longer: what of the flow goes by others overtakes.
#
# Absolute times here are the emulator's: gaps of some 15 ms are there with nothing
# wrong. So modes are compared with each other, and by their medians.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=420
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"
. "$(dirname "$0")/talk.bash"

TRIALS=30
TRIAL=150 PULL=30 RESTORE=90
LATE=200
RESULTS=/tmp/failover

# stream TRIALS RECEIVE_ARGS [SEND_ARGS]: one flow from CPU 1; its report in $REPORT,
# the sender's in $SENT_JSON.
stream() {
	local out receiver
	out=$(mktemp)
	peer_do "cpubond vm traffic receive --at $PEER_IP:$PORT $2" >"$out" &
	receiver=$!
	# shellcheck disable=SC2086 # words
	SENT_JSON=$(taskset -c 1 cpubond vm traffic send --from "$SERVER_IP:$PORT" --to "$PEER_IP:$PORT" \
		--trials "$1" $2 ${3:-})
	wait "$receiver"
	REPORT=$(<"$out")
	rm "$out"
}

# carrier: the cable by which the flow's datagrams go, if all go by one
carrier() {
	local nic
	local -A before=() after=()
	by_cable before
	stream 1 "--trial 50"
	by_cable after
	for nic in "${!after[@]}"; do
		[ $((after[$nic] - before[$nic])) -lt 50 ] || echo "$nic"
	done
}

# trials MODE: with the figures in $RESULTS/MODE.
trials() {
	local mode=$1 cable nic changes others=0
	local -A before=() after=()
	mkdir -p "$RESULTS"
	bind_irqs
	case $mode in
	cpu_bound) policy_up ;;
	balance-xor) bond_up balance-xor:layer3+4 ;;
	*) bond_up "$mode" ;;
	esac
	all_up
	cable=$(carrier)
	case $mode in
	cpu_bound) check_eq "cable of CPU 1's flow" "$cable" eth1 ;;
	balance-xor) check_match "cable of the flow" "$cable" '^eth[0-3]$' ;;
	balance-rr)
		check_eq "cable that carries all of the flow" "$cable" ""
		cable=eth1
		;;
	esac

	changes=$(cat "$SYS/$cable/carrier_changes")
	by_cable before
	stream "$TRIALS" "--trial $TRIAL --pull $PULL --restore $RESTORE" "--cable $cable"
	by_cable after
	echo "$REPORT" >"$RESULTS/$mode"
	note "$mode: $REPORT"
	note "$mode: $SENT_JSON"

	# Proof of work: the cable was pulled and put back, and the flow went elsewhere
	# meanwhile and came back.
	check_eq "carrier changes of $cable" \
		$(($(cat "$SYS/$cable/carrier_changes") - changes)) $((2 * TRIALS))
	check_eq "trials" "$(jq .trials <<<"$REPORT")" "$TRIALS"
	for nic in "${!after[@]}"; do
		[ "$nic" = "$cable" ] || others=$((others + after[$nic] - before[$nic]))
	done
	check_ge "datagrams by other cables" "$others" $((TRIALS * (RESTORE - PULL) * 6 / 10))
	if [ "$mode" != balance-rr ]; then
		# One that did not come back would leave it those of the first trial.
		check_ge "datagrams by $cable" $((after[$cable] - before[$cable])) \
			$((TRIALS * (PULL + (TRIAL - RESTORE) / 2)))
	fi
	note "$mode: $others of $((TRIALS * TRIAL)) datagrams by cables other than $cable"

	tc qdisc replace dev "$cable" root netem delay 50ms
	stream 1 "--trial $LATE"
	tc qdisc del dev "$cable" root
	echo "$REPORT" >"$RESULTS/$mode.late"
	note "$mode, $cable 50 ms longer: $REPORT"
}

# late MODE: reordered when the cable is longer than the others.
late() { jq '.windows[0].reordered.sum' "$RESULTS/$1.late"; }

# figure MODE WINDOW FIGURE VALUE
figure() {
	jq --arg window "$2" --arg figure "$3" --arg value "$4" \
		'.windows[] | select(.window == $window)[$figure][$value]' "$RESULTS/$1"
}

# The table, then what it must say on any machine that is not broken.
compare() {
	local mode window row='%-12s %-9s %14s %5s %10s %22s'
	local -a figures
	note "$TRIALS trials a mode, each of $TRIAL datagrams; p50/p99/max of a trial, sums of all"
	# shellcheck disable=SC2059 # one format for head and rows
	note "$(printf "$row" mode cable lost dup. reordered "gap ms")"
	for mode in cpu_bound balance-xor balance-rr; do
		for window in before pulled restored; do
			jq -r --arg window "$window" '.windows[] | select(.window == $window) |
				"\(.lost.p50)/\(.lost.p99)/\(.lost.max) \(.duplicated.sum) \(.reordered.sum) " +
				(.gap_us | [.p50, .p99, .max] | map(. / 100 | round / 10 | tostring) | join("/"))' "$RESULTS/$mode" |
				read -ra figures
			# shellcheck disable=SC2059
			note "$(printf "$row" "$mode" "$window" "${figures[@]}")"
		done
	done

	for mode in cpu_bound balance-xor balance-rr; do
		for window in before pulled restored; do
			check_eq "duplicates, $mode, $window" "$(figure "$mode" "$window" duplicated sum)" 0
		done
		check_eq "lost with nothing wrong, median, $mode" "$(figure "$mode" before lost p50)" 0
		# Most of what is sent while the cable is out goes elsewhere.
		check_le "lost when pulled, median, $mode" "$(figure "$mode" pulled lost p50)" \
			$(((RESTORE - PULL) / 2))
	done
	# miimon is 50 ms, in which 12 are sent: a mode may be lucky by as much.
	check_le "lost when pulled, median of cpu_bound" "$(figure cpu_bound pulled lost p50)" \
		$(($(figure balance-xor pulled lost p50) + 12))
	check_le "lost when put back, median of cpu_bound" "$(figure cpu_bound restored lost p50)" \
		$(($(figure balance-xor restored lost p50) + 12))
	check_le "gap when pulled in us, median of cpu_bound" "$(figure cpu_bound pulled gap_us p50)" \
		$((2 * $(figure balance-xor pulled gap_us p50) + 50000))
	# What moves between slaves may be overtaken there, by a vCPU that the host prefers.
	for window in before pulled restored; do
		check_le "reordered, $window, median of cpu_bound" \
			"$(figure cpu_bound "$window" reordered p50)" \
			$(($(figure balance-xor "$window" reordered p50) + 1))
	done
	# A flow that stays on one slave is not reordered, however long its cable. Of
	# balance-rr's, a quarter goes by that cable, and is.
	note "reordered of $LATE with one cable 50 ms longer: cpu_bound $(late cpu_bound)," \
		"balance-xor $(late balance-xor), balance-rr $(late balance-rr)"
	check_ge "reordered by balance-rr, one cable longer" "$(late balance-rr)" $((LATE / 8))
	check_eq "reordered by cpu_bound, one cable longer" "$(late cpu_bound)" 0
	check_eq "reordered by balance-xor, one cable longer" "$(late balance-xor)" 0
}

ktap_plan 4
for mode in cpu_bound balance-xor balance-rr; do
	ktap_run "$TRIALS trials with $mode: the flow leaves the cable and returns" trials "$mode"
done
ktap_run "cpu_bound fails over as well as the stock modes" compare
ktap_finished
