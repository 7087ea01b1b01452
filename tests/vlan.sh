#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# VLANs on the bond: what they send leaves by a slave of its CPU.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#   10.0.7.1  bond0.7                         bond0.7  10.0.7.2
#   10.0.8.1  bond0.8                         bond0.8  10.0.8.2
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"
. "$(dirname "$0")/talk.bash"

# add_vlan ID HOST: a command line.
add_vlan() {
	echo "ip link add link $BOND name $BOND.$1 type vlan id $1
		ip addr add 10.0.$1.$2/24 dev $BOND.$1
		ip link set $BOND.$1 up"
}

vlans() {
	local id
	policy_up
	for id in 7 8; do
		eval "$(add_vlan "$id" 1)"
		peer_do "$(add_vlan "$id" 2)"
	done
}

# received_tagged ID: frames with this tag that the peer has taken in.
received_tagged() { peer_do "cat $SYS/$BOND.$1/statistics/rx_packets"; }

on_vlan() {
	local before
	before=$(received_tagged "$1")
	talk "10.0.$1.1" "10.0.$1.2" 40
	check_ge "frames that reached the peer with tag $1" \
		$(($(received_tagged "$1") - before)) 400
}

ktap_plan 3
ktap_run "two VLANs on the bond come up" vlans
for id in 7 8; do
	ktap_run "requests both ways on VLAN $id are answered, all sent locally" on_vlan "$id"
done
ktap_finished
