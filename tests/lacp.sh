#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# LACP with the policy as xmit_hash_policy: the aggregate forms, CPUs send by their slaves.
#
#   server bond0 (802.3ad)                    peer bond0 (802.3ad)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=802.3ad timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

# LACP sends on each slave once a second.
STRAY=30

aggregate() {
	policy_up 802.3ad:cpu_bound
	check_eq "xmit_hash_policy" "$(cat "$SYS/$BOND/bonding/xmit_hash_policy")" "cpu_bound 6"
	check_eq "ports of the aggregate" "$(cat "$SYS/$BOND/bonding/ad_num_ports")" 4
}

# A slave that has carrier but is not in the aggregate must not be sent to.
out_of_aggregate() {
	peer_do "ip link set eth1 nomaster; ip link set eth1 up"
	wait_for 15 falls_back 1 eth1
	check_eq "carrier of eth1" "$(cat "$SYS/eth1/carrier")" 1
	open_sink
	send 1 300 many
	arrive 300
	peer_do "ip link set eth1 down; ip link set eth1 master $BOND"
	wait_for 30 map_is 1 eth1 irq
	wait_for 10 slave_up eth1
	leaves_by 1 eth1
}

ktap_plan 6
ktap_run "an aggregate of four ports forms" aggregate
for cpu in 0 1 2 3; do
	ktap_run "all packets of CPU $cpu leave by eth$cpu" leaves_by "$cpu" "eth$cpu"
done
ktap_run "a slave that leaves the aggregate leaves the map, and comes back" out_of_aggregate
ktap_finished
