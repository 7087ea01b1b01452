#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The profiler. Programs of which the conflicts and transfers can be counted by hand: each
# must cost what `cpubond vm micro` says of it, for n = 100 turns of each CPU. And packets
# of pktgen's to a device that drops them, a single path of the kernel:
#
#   CPU 0, CPU 1 ⇒ pktgen ⇒ dummy0, dummy1
#
# vm: cpus=2 nics=1 queues=1 profiler=1 peer=none timeout=120
. "$(dirname "$0")/lib.sh"

N=100

# figures FILTER LABEL: a jq filter over the profile of a region.
figures() { cpubond vm call profile show "$2" | jq -r "$1"; }

# micro CASE LINES EXPECTED: run it; what its LINES (a pattern) cost together.
micro() {
	local got
	cpubond vm micro "$1" "$1" --rounds "$N"
	got=$(figures "[.functions[] | select(.name | test(\"^line:($2)\$\")) | .cpus[]] |
		\"\(map(.conflicts) | add // 0) \(map(.transfers) | add // 0)\"" "$1")
	note "$1: conflicts and transfers $got"
	check_eq "conflicts and transfers of $1" "$got" "$3 $3"
}

# pktgen DEV CPU COUNT: have CPU make COUNT packets for DEV, once it is started.
pktgen() {
	local dir=/proc/net/pktgen line
	echo rem_device_all >"$dir/kpktgend_$2"
	echo "add_device $1@$2" >"$dir/kpktgend_$2"
	for line in "count $3" "pkt_size 60" "delay 0" "clone_skb 0" "dst_mac $(peer_mac)"; do
		echo "$line" >"$dir/$1@$2"
	done
}

start_pktgen() { echo start >/proc/net/pktgen/pgctrl; }

# profile LABEL: count what pktgen is set up to send.
profile() {
	cpubond vm mark open "$1" --packet pktgen:pktgen_xmit --range dummy_xmit,consume_skb
	start_pktgen
	cpubond vm mark close
}

repeats() {
	local run medians=""
	modprobe dummy numdummies=0
	modprobe pktgen
	ip link add dummy0 type dummy
	ip link add dummy1 type dummy
	ip link set dummy0 up
	ip link set dummy1 up
	pktgen dummy0 0 "$N"
	start_pktgen
	for run in 1 2 3; do
		profile "run$run"
		# The last packet's end is not told from pktgen's own.
		check_eq "whole packets" "$(figures '.packets | join(" ")' "run$run")" "$((N - 1)) 0"
		medians+=" $(figures .median_insns "run$run")"
	done
	note "instructions in the median packet:$medians"
	# shellcheck disable=SC2086 # words
	check_eq "different medians" "$(printf '%s\n' $medians | sort -u | wc -l)" 1
	check_ge "instructions of a packet" "${medians##* }" 30
}

# of CLASS FIGURE LABEL: the sum over all functions and CPUs.
of() { figures "[.functions[] | select(.class == \"$1\") | .cpus[].$2] | add // 0" "$3"; }

apart() {
	local wrong
	check_eq "the generator's functions in other classes" "$(figures '[.functions[] |
		select(.module == "pktgen" and .class == "path")] | length' run1)" 0
	check_ge "instructions of the generator" "$(of generator insns run1)" $((100 * N))
	check_ge "instructions of the path" "$(of path insns run1)" $((30 * N))
	wrong=$(figures '.functions[] | select(.class == "path" and .cpus[0].insns > 0) | .name' run1 |
		grep -E '^(asm_)?(sysvec|exc)_|hrtimer|^tick_|schedule$|idle|slowpath' || :)
	check_eq "functions of no packet in class path" "$wrong" ""
}

private() {
	pktgen dummy0 0 "$N"
	pktgen dummy1 1 "$N"
	start_pktgen
	profile private
	note "two CPUs, a device each: $(figures '.replay | "replayed transfers a packet \(.transfers.mean)"' private)"
	check_eq "transfers between CPUs that share nothing" \
		"$(figures '.replay.transfers.max | if . < 0.05 then "none" else . end' private)" none
}

range() {
	note "$(figures '.ranges[0] | "\(.from) to \(.to): \(.times) times, \(.interrupted) interrupted, \(.min) to \(.max) instructions"' run1)"
	check_eq "times from one function to the other" \
		"$(figures '.ranges[0] | .times + .interrupted' run1)" "$N"
	check_ge "fewest instructions between them" "$(figures '.ranges[0].min' run1)" 3
}

ktap_plan 11
ktap_run "a line that two CPUs read and write in turns" micro pass 0 $((2 * (2 * N - 1)))
ktap_run "a line that two CPUs write in turns" micro write 0 $((2 * N - 1))
ktap_run "a line that two CPUs update atomically in turns" micro update 0 $((2 * N - 1))
ktap_run "two CPUs with a line each" micro private '0|1' 0
ktap_run "a line written once and read by two CPUs" micro read-shared 0 1
ktap_run "two CPUs that write words of one line" micro false-sharing 0 $((2 * N - 1))
ktap_run "a thread that moves with its four lines" micro migration '[0-3]' $((8 * (N - 1)))
ktap_run "instructions of a packet are the same in three runs" repeats
ktap_run "generator, interrupts and scheduler are apart" apart
ktap_run "instructions from one function to another" range
ktap_run "two CPUs that send by devices of their own share no line" private
ktap_finished
