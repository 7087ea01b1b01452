#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The profiler, held to programs of which the conflicts and transfers can be counted by
# hand: each must cost what `cpubond vm micro --help` says of it, for n = 100 turns of each CPU.
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

ktap_plan 7
ktap_run "a line that two CPUs read and write in turns" micro pass 0 $((2 * (2 * N - 1)))
ktap_run "a line that two CPUs write in turns" micro write 0 $((2 * N - 1))
ktap_run "a line that two CPUs update atomically in turns" micro update 0 $((2 * N - 1))
ktap_run "two CPUs with a line each" micro private '0|1' 0
ktap_run "a line written once and read by two CPUs" micro read-shared 0 1
ktap_run "two CPUs that write words of one line" micro false-sharing 0 $((2 * N - 1))
ktap_run "a thread that moves with its four lines" micro migration '[0-3]' $((8 * (N - 1)))
ktap_finished
