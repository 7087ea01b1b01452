#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Interrupts moved by hand under traffic: the map follows within 2 s, nothing is lost.
#
#   server bond0 (cpu_bound)                  peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0 ───────────────────────────── eth0
#     CPU 1 ⇄ eth1 ───────────────────────────── eth1
#     CPU 2 ⇄ eth2 ───────────────────────────── eth2
#     CPU 3 ⇄ eth3 ───────────────────────────── eth3
#
# then CPU 1 ⇄ eth2 and CPU 2 ⇄ eth1.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=180
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/traffic.bash"

# swap_ms: have eth1 and eth2 change CPUs, and say after how long the map followed.
# Only builtins while the clock runs: to start a program may take longer here.
swap_ms() {
	local irq irqs1 irqs2 start
	irqs1=$(nic_irqs eth1)
	irqs2=$(nic_irqs eth2)
	start=${EPOCHREALTIME/./}
	for irq in $irqs1; do echo 2 >"/proc/irq/$irq/smp_affinity_list"; done
	for irq in $irqs2; do echo 1 >"/proc/irq/$irq/smp_affinity_list"; done
	until swapped; do
		[ $((${EPOCHREALTIME/./} - start)) -lt 20000000 ] || break
		read -rt 0.05 -u "$NEVER" || :
	done
	echo $(((${EPOCHREALTIME/./} - start) / 1000))
}

swapped() {
	local cpu slave reason seen=
	while read -r cpu slave reason; do
		seen+=" $cpu $slave $reason;"
	done <"$SYS/$BOND/bonding/cpu_bound_map"
	[[ $seen == *" 1 eth2 irq;"* && $seen == *" 2 eth1 irq;"* ]]
}

unswapped() { map_is 1 eth1 irq && map_is 2 eth2 irq; }

# The host may not run an emulated CPU for seconds when it is busy, so the time gets
# three chances. That nothing is lost gets one.
swap() {
	local ms try
	policy_up
	leaves_by 1 eth1
	open_sink
	start_traffic 0 1 2 3
	# To wait without a program: nothing is ever written to it.
	mkfifo /tmp/never
	exec {NEVER}<>/tmp/never
	for try in 1 2 3; do
		ms=$(swap_ms)
		note "try $try: the map followed after $ms ms"
		[ "$ms" -gt 2000 ] || break
		if [ "$try" -lt 3 ]; then
			bind_irq eth1 1
			bind_irq eth2 2
			wait_for 20 unswapped
		fi
	done
	sleep 0.5
	stop_traffic
	nothing_lost
	check_le "ms until the map followed, at best" "$ms" 2000
}

moved() {
	leaves_by 1 eth2
	leaves_by 2 eth1
	leaves_by 0 eth0
}

gather() {
	bind_irq eth3 0
	wait_for 10 map_is 0 eth0,eth3 irq
	wait_for 10 falls_back 3
	spreads 0 200 eth0 eth3
}

ktap_plan 3
ktap_run "the map follows two interrupts that change places, and nothing is lost" swap
ktap_run "packets leave by the new slaves" moved
ktap_run "two slaves on one CPU share its flows, and the other CPU falls back" gather
ktap_finished
