#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Slaves with several queues: a packet leaves by the slave and by the queue of its CPU.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 queue 0 ┐
#     CPU 1 ⇄ eth0 queue 1 ┴───────────────────── eth0
#     CPU 2 ⇄ eth1 queue 0 ┐
#     CPU 3 ⇄ eth1 queue 1 ┴───────────────────── eth1
#
# vm: cpus=4 nics=2 queues=4 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

EVENT=/sys/kernel/tracing/events/net/net_dev_start_xmit
HIST=hist:keys=common_cpu,name,queue_mapping:size=4096

# bind_queue NIC QUEUE CPU: its two interrupts.
bind_queue() {
	local dev irq
	dev=$(basename "$(readlink "$SYS/$1/device")")
	awk -v rx="$dev-input.$2" -v tx="$dev-output.$2" '
		$NF == rx || $NF == tx { sub(":", "", $1); print $1 }
	' /proc/interrupts | while read -r irq; do
		echo "$3" >"/proc/irq/$irq/smp_affinity_list"
	done
}

# xps NIC QUEUE CPU, or none for no CPU.
xps() {
	local mask=0
	[ "$3" = none ] || mask=$(printf %x $((1 << $3)))
	echo "$mask" >"$SYS/$1/queues/tx-$2/xps_cpus"
}

# queues_of CPU: "NIC QUEUE COUNT" a line, for what CPU sends now, by the kernel's
# tracepoint.
queues_of() {
	echo "$HIST" >"$EVENT/trigger"
	send "$1" "$2" "$3"
	sed -nE "s/^\{ common_cpu: +$1, name: (eth[0-9]+) *, queue_mapping: +([0-9]+) *\} hitcount: +([0-9]+).*/\1 \2 \3/p" "$EVENT/hist"
	echo "!$HIST" >"$EVENT/trigger"
}

# Two slaves of four queues on four CPUs: each has two of its queues on each of two
# CPUs, and sends by the first of them.
share() {
	local nic queue first=0
	check_eq "transmit queues of eth0" "$(find "$SYS/eth0/queues" -name 'tx-*' | wc -l)" 4
	bond_up cpu_bound
	open_sink
	for nic in eth0 eth1; do
		for queue in 0 1 2 3; do
			bind_queue "$nic" "$queue" $((first + queue % 2))
			if [ "$queue" -lt 2 ]; then
				xps "$nic" "$queue" $((first + queue))
			else
				xps "$nic" "$queue" none
			fi
		done
		first=2
	done
	for cpu in 0 1 2 3; do
		wait_for 10 map_is "$cpu" "eth$((cpu / 2))" irq
	done
	all_up
}

own_queue() {
	local cpu=$1 got
	leaves_by "$cpu" "eth$((cpu / 2))"
	got=$(queues_of "$cpu" 200 many)
	check_eq "slave, queue and packets of CPU $cpu" "$got" "eth$((cpu / 2)) $((cpu % 2)) 200"
}

# Every slave has a queue on every CPU: all are local, flows share.
everywhere() {
	local nic queue cpu got
	for nic in eth0 eth1; do
		for queue in 0 1 2 3; do
			bind_queue "$nic" "$queue" "$queue"
			xps "$nic" "$queue" "$queue"
		done
	done
	for cpu in 0 1 2 3; do
		wait_for 10 map_is "$cpu" eth0,eth1 irq
		spreads "$cpu" 200 eth0 eth1
		queues_of "$cpu" 100 many | while read -r nic queue got; do
			check_eq "queue of $nic for CPU $cpu" "$queue" "$cpu"
			note "CPU $cpu: $got packets by queue $queue of $nic"
		done
	done
}

ktap_plan 6
ktap_run "each slave serves the CPUs of its queues" share
for cpu in 0 1 2 3; do
	ktap_run "CPU $cpu sends by its slave and its queue" own_queue "$cpu"
done
ktap_run "slaves with a queue for every CPU share flows, by the CPU's queue" everywhere
ktap_finished
