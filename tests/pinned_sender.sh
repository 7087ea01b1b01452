#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Every packet of a pinned sender leaves by the slave whose interrupts its CPU takes.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

traced() {
	local cpu dev count own=0 other=0
	xmit_trace on
	send 2 200
	xmit_trace show | while read -r cpu dev count; do
		case $cpu/$dev in
		2/eth2) own=$count ;;
		2/eth*) other=$((other + count)) ;;
		esac
	done
	xmit_trace off
	check_eq "transmits of CPU 2 by eth2, by the tracepoint" "$own" 200
	check_eq "transmits of CPU 2 by another slave" "$other" 0
}

# No packet of the sender is local to a slave that is another CPU's.
foreign() {
	local before
	before=$(cpu_stat eth1 0 remote)
	send 0 100
	check_eq "packets of CPU 0 by eth1" "$(cpu_stat eth1 0 remote)" "$before"
	check_eq "packets of CPU 0 that eth1 calls local" "$(cpu_stat eth1 0 local)" 0
	check_ge "packets of CPU 0 that eth0 calls local" "$(cpu_stat eth0 0 local)" 100
	check_eq "sum of the CPUs and the total of eth0" \
		"$(awk '$1 ~ /^cpu/ { n += $3 } END { print n }' "$SYS/eth0/bonding_slave/cpu_bound_stats")" \
		"$(slave_stat eth0 local)"
}

ktap_plan 7
ktap_run "the bond comes up with each CPU bound to its slave" policy_up
for cpu in 0 1 2 3; do
	ktap_run "all packets of CPU $cpu leave by eth$cpu" leaves_by "$cpu" "eth$cpu"
done
ktap_run "the kernel's tracepoint says the same" traced
ktap_run "the counters tell CPUs and slaves apart" foreign
ktap_finished
