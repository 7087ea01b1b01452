#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# `cpubond plan` for NICs with more queues than CPUs: it proposes fewer channels, apply
# sets them, and undo puts back channels and interrupts.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 queue 0 ┐
#     CPU 1 ⇄ eth0 queue 1 ┴───────────────────── eth0
#     CPU 2 ⇄ eth1 queue 0 ┐
#     CPU 3 ⇄ eth1 queue 1 ┴───────────────────── eth1
#
# vm: cpus=4 nics=2 queues=4 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/plan.bash"

channels() {
	local nic
	for nic in $(nics); do
		find "$SYS/$nic/queues" -name 'tx-*' | wc -l
	done | xargs
}

proposes() {
	check_eq "transmit queues" "$(channels)" "4 4"
	propose
	check_eq "channels there may be" \
		"$(jq -r '[.host.nics[].channels.combined_max] | join(" ")' "$DIR/plan.json")" "4 4"
	check_eq "channels that are proposed" "$(slaves_of channels)" "2 2"
	check_eq "CPUs with a slave of their own" "$(predicted | grep -c ' irq$')" 4
}

set_channels() {
	predicts 10
	check_eq "transmit queues" "$(channels)" "2 2"
}

restored() {
	undone
	check_eq "transmit queues" "$(channels)" "4 4"
}

ktap_plan 4
ktap_run "it proposes a channel for each CPU" proposes
ktap_run "applied, channels and the kernel's map are what was predicted" set_channels
ktap_run "the next plan is the same, and verify finds nothing" again
ktap_run "undo puts back channels and interrupts" restored
ktap_finished
