#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# `cpubond plan` on a machine of two sockets: what it proposes is applied, and the
# kernel's map is then, line for line, what it has predicted.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     socket 0: CPU 0, 1 ⇄ eth0 ──────────────── eth0
#     socket 1: CPU 2, 3 ⇄ eth1 ──────────────── eth1
#
# vm: cpus=4 nics=2 sockets=2 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/plan.bash"

# What the two nodes are to each other shows in what is predicted.
proposes() {
	propose
	check_eq "CPUs that are proposed" "$(slaves_of cpus)" "0-1 2-3"
	check_eq "MACs that are proposed" "$(slaves_of mac)" "52:54:00:00:01:00 52:54:00:00:01:01"
	check_eq "NUMA nodes" "$(jq -c .host.nodes "$DIR/plan.json")" '{"0":"0-1","1":"2-3"}'
	check_eq "CPUs with a slave of their own" "$(predicted | grep -c ' irq$')" 2
	check_match "CPU 1" "$(predicted | sed -n 2p)" "^1 eth0 (llc|node)$"
	check_match "CPU 3" "$(predicted | sed -n 4p)" "^3 eth1 (llc|node)$"
}

ktap_plan 6
ktap_run "a plan is the same twice, and needs no privilege" repeats
ktap_run "it gives each NIC the CPUs of a socket" proposes
ktap_run "applied, the kernel's map is what was predicted" predicts 10
ktap_run "the next plan is the same, and verify finds nothing" again
ktap_run "a configuration of less than all is predicted too" by_config
ktap_run "undo puts everything back" undone
ktap_finished
