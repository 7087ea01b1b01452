#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The multiqueue set-up of `cpubond bench system`: each CPU has a queue, and each server
# gets what its own CPU receives. Function only.
#
# vm: cpus=4 nics=1 queues=4 timeout=300
. "$(dirname "$0")/lib.sh"

serves() {
	local out cpu
	/cpubond/guest/setup.sh start multiqueue reuseport 4 300
	for cpu in {0..3}; do
		check_eq "CPUs of tx queue $cpu" "$((16#$(<"$SYS/eth0/queues/tx-$cpu/xps_cpus")))" $((1 << cpu))
	done
	check_eq "CPUs of the queues' interrupts" "$(nic_irqs eth0 | while read -r irq; do
		cat "/proc/irq/$irq/smp_affinity_list"
	done | sort | uniq -c | awk '{ print $1 "x" $2 }' | paste -sd ' ')" "2x0 2x1 2x2 2x3"
	out=$(peer_do "cpubond bench ask --to $SERVER_IP:80 --requests 8 --first-port 20001 --bytes 300 \
		--from $(echo 10.0.0.{11..18} | tr ' ' ,)")
	note "$out"
	check_eq "answered" "$(jq .complete <<<"$out")" 64
	check_eq "not answered" "$(jq .failed <<<"$out")" 0
	/cpubond/guest/setup.sh stop
	check_eq "servers left" "$(pgrep -x nginx | wc -l)" 0
}

ktap_plan 1
ktap_run "multiqueue, reuseport: serves every request" serves
ktap_finished
