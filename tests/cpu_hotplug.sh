#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# A CPU offline and online under traffic.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# with CPU 3 gone for a while.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

CPU3=/sys/devices/system/cpu/cpu3/online

# The CPU that takes the interrupts of NIC now.
irq_cpu() {
	local irq
	for irq in $(nic_irqs "$1"); do
		cat "/proc/irq/$irq/effective_affinity_list"
	done | sort -u
}

offline() {
	policy_up
	leaves_by 3 eth3
	open_sink
	start_traffic 0 1 2
	echo 0 >"$CPU3"
	sleep 2
	stop_traffic
	nothing_lost
}

# Whatever CPUs the interrupts are on now: virtio-net spreads those of all its
# devices anew when CPUs come and go.
map_follows() {
	local nic cpu
	for nic in $(slaves); do
		for cpu in $(irq_cpu "$nic"); do
			has_slave "$cpu" "$nic" irq || return 1
		done
	done
}

taken_over() {
	local nic
	for nic in $(slaves); do
		note "$nic interrupts CPU $(irq_cpu "$nic" | tr '\n' ' ')"
		check_match "CPUs that $nic interrupts" "$(irq_cpu "$nic" | tr -d '\n')" "^[0-2]+$"
	done
	wait_for 10 map_follows
	falls_back 3
	open_sink
	send 0 200 many
	arrive 200
}

online() {
	open_sink
	start_traffic 0 1 2
	echo 1 >"$CPU3"
	sleep 1
	stop_traffic
	nothing_lost
	wait_for 10 map_follows
	bind_irqs
	wait_for 10 map_is 3 eth3 irq
	wait_for 10 map_is 0 eth0 irq
	leaves_by 3 eth3
	leaves_by 0 eth0
}

again_and_again() {
	open_sink
	start_traffic 0 1 2
	for _ in 1 2 3 4; do
		echo 0 >"$CPU3"
		echo 1 >"$CPU3"
	done
	stop_traffic
	nothing_lost
}

ktap_plan 4
ktap_run "a CPU goes offline under traffic, and nothing is lost" offline
ktap_run "each slave serves the CPU that takes its interrupts now" taken_over
ktap_run "the CPU comes back and takes its slave again" online
ktap_run "CPUs that come and go lose nothing" again_and_again
ktap_finished
