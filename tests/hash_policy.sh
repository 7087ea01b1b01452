#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The policy as xmit_hash_policy of balance-xor, changed while packets flow.
#
#   server bond0 (balance-xor)                peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

HASH=$SYS/$BOND/bonding/xmit_hash_policy

bound() {
	policy_up balance-xor:cpu_bound
	check_eq "mode" "$(cat "$SYS/$BOND/bonding/mode")" "balance-xor 2"
	check_eq "xmit_hash_policy" "$(cat "$HASH")" "cpu_bound 6"
	leaves_by 1 eth1
	leaves_by 3 eth3
}

away() {
	open_sink
	start_traffic 0 1 2 3
	echo layer3+4 >"$HASH"
	check_eq "map without the policy" "$(cat "$SYS/$BOND/bonding/cpu_bound_map")" ""
	sleep 1
	stop_traffic
	nothing_lost
	spreads 1 400 eth0 eth1 eth2 eth3
}

back() {
	open_sink
	start_traffic 0 1 2 3
	echo cpu_bound >"$HASH"
	wait_for 10 has_slave 1 eth1 irq
	sleep 1
	stop_traffic
	nothing_lost
	leaves_by 1 eth1
}

ktap_plan 3
ktap_run "balance-xor with xmit_hash_policy cpu_bound binds CPUs to slaves" bound
ktap_run "another hash policy takes over under traffic, and nothing is lost" away
ktap_run "and cpu_bound again" back
ktap_finished
