#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The profiler and packets: pktgen's, to devices that drop them, a single path of the kernel.
#
#   CPU 0 ⇒ pktgen ⇒ dummy0          both ⇒ pktgen ⇒ eth0 (one queue) ─── peer eth0
#   CPU 1 ⇒ pktgen ⇒ dummy1
#
# vm: cpus=2 nics=1 queues=1 profiler=1 peer=none timeout=120
. "$(dirname "$0")/lib.sh"

N=100

# figures FILTER LABEL: a jq filter over the profile of a region.
figures() { jq -r "$1" "/tmp/$2.json"; }

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
	cpubond vm mark open "$1" --packet pktgen:mod_cur_headers --range dummy_xmit,consume_skb
	start_pktgen
	cpubond vm mark close
	cpubond vm call profile show "$1" >"/tmp/$1.json"
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

# replayed LABEL: transfers a packet, over 2 × N packets that must be there.
replayed() {
	check_eq "whole packets" "$(figures '.packets | join(" ")' "$1")" "$((N - 1)) $((N - 1))"
	figures .replay.transfers.mean "$1"
}

private() {
	local transfers
	pktgen dummy0 0 "$N"
	pktgen dummy1 1 "$N"
	start_pktgen
	profile private
	transfers=$(replayed private)
	note "transfers a packet, a device each: $transfers"
	check_eq "transfers at all" "$(figures '.replay.transfers.max < 0.05' private)" true
}

shared() {
	local transfers
	ip link set eth0 up
	pktgen eth0 0 "$N"
	pktgen eth0 1 "$N"
	start_pktgen
	profile shared
	transfers=$(replayed shared)
	note "transfers a packet, one queue for both: $transfers"
	check_eq "at least one transfer a packet" "$(figures '.replay.transfers.min >= 1' shared)" true
}

range() {
	note "$(figures '.ranges[0] | "\(.from) to \(.to): \(.times) times, \(.interrupted) interrupted, \(.min) to \(.max) instructions"' run1)"
	check_eq "times from one function to the other" \
		"$(figures '.ranges[0] | .times + .interrupted' run1)" "$N"
	check_ge "fewest instructions between them" "$(figures '.ranges[0].min' run1)" 3
}

ktap_plan 5
ktap_run "instructions of a packet are the same in three runs" repeats
ktap_run "generator, interrupts and scheduler are apart" apart
ktap_run "instructions from one function to another" range
ktap_run "two CPUs that send by devices of their own share no line" private
ktap_run "two CPUs that send by one queue share lines" shared
ktap_finished
