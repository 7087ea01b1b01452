#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# IPv6 over the bond: what it sends leaves by a slave of its CPU, neighbour discovery
# by multicast included.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#   fd00::1                                   fd00::2
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"
. "$(dirname "$0")/talk.bash"

# add_ipv6 ADDR: a command line. The lab has IPv6 off.
add_ipv6() {
	echo "sysctl -qw net.ipv6.conf.$BOND.disable_ipv6=0
		ip addr add $1/64 dev $BOND nodad"
}

discovered() {
	policy_up
	eval "$(add_ipv6 fd00::1)"
	peer_do "$(add_ipv6 fd00::2)"
	wait_for 10 ping -q -c 1 -W 1 fd00::2
	check_match "neighbour entry" "$(ip -6 neigh show fd00::2 dev "$BOND")" "lladdr $(peer_mac)"
}

ktap_plan 2
ktap_run "the peer is found by neighbour discovery" discovered
ktap_run "requests both ways are answered, all sent locally" talk fd00::1 fd00::2 60
ktap_finished
