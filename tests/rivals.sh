#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# What else moves interrupts or takes packets to other CPUs is found and named with its
# fix; irqbalance, which runs here for real, is told to leave them alone.
#
#   server bond0 (cpu_bound)                        peer bond0 (balance-xor)
#     CPU 0-1 ⇄ eth0, four queues ────────────────── eth0
#     CPU 2-3 ⇄ eth1, four queues ────────────────── eth1
#
# vm: cpus=4 nics=2 queues=4 peer=balance-xor timeout=240
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/apply.bash"

ORIGIN=/tmp/origin LOG=/tmp/irqbalance.log

# balance [ARG...]: irqbalance looks every second, not every ten, and says what it does.
balance() {
	mkdir -p /run/irqbalance
	irqbalance --foreground --debug --interval=1 "$@" >"$LOG" 2>&1 </dev/null &
	wait_for 10 test -e "/run/irqbalance/irqbalance$!.sock"
}

unbalance() {
	pkill -x irqbalance
	wait_for 10 no_irqbalance
}

no_irqbalance() { ! pgrep -x irqbalance; }

rounds() { grep -c '^Package' "$LOG" || :; }
after_round() { [ "$(rounds)" -ge "$1" ]; }

# three_rounds: irqbalance looks at what there is three times more.
three_rounds() { wait_for 60 after_round $(($(rounds) + 3)); }

# config_irq NIC: of its vector that serves no queue.
config_irq() {
	local dev
	dev=$(basename "$(readlink "$SYS/$1/device")")
	awk -v name="$dev-config" '$NF == name { sub(":", "", $1); print $1 }' /proc/interrupts
}

ours() { nic_irqs eth0; nic_irqs eth1; }
# shellcheck disable=SC2046 # a list of words
affinities() { grep -H . $(printf '/proc/irq/%s/smp_affinity_list ' $(ours)); }

refused() {
	local irqs
	irqs=$(ours | sort -n | paste -sd,)
	balance
	exits 1 cpubond apply
	check_eq "error" "${ERR##*$'\n'}" "cpubond: irqbalance: runs (process $(pgrep -x irqbalance)) and moves interrupts $irqs; --ban-irqbalance (of up and apply) has it leave them alone, \"systemctl disable --now irqbalance\" ends it, --allow-rivals puts up with it"
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
	[ ! -e "$SYS/$BOND" ] || fail "there is a bond"
	exits 3 cpubond apply --check --allow-rivals
	check_match "warning" "$ERR" 'cpubond: warning: irqbalance: runs \(process [0-9]+\) and moves interrupts'
	unbalance
}

# rethinks: irqbalance places all interrupts anew that it may place, that of eth0 which
# serves no queue among them.
rethinks() {
	local free
	free=$(config_irq eth0)
	echo 0-3 >"/proc/irq/$free/smp_affinity_list"
	pkill -HUP -x irqbalance
	wait_for 30 placed "$free"
	three_rounds
}

# placed IRQ: on a CPU of irqbalance's choice.
placed() { [ "$(<"/proc/irq/$1/smp_affinity_list")" != 0-3 ]; }

# The user has banned one himself, of eth1, and keeps that.
banned() {
	local own irq sent
	own=$(config_irq eth1)
	echo 0-3 >"/proc/irq/$own/smp_affinity_list"
	balance "--banirq=$own"
	exits 0 slowly -f --seccomp-bpf -s 4096 -e trace=sendmsg cpubond apply --ban-irqbalance
	sent=$(grep -o 'settings ban irqs [0-9 ]*' "$TRACE" | tail -n 1)
	for irq in "$own" $(ours); do
		check_match "the last list sent" "$sent " " $irq "
	done
	check_eq "interrupts sent" "$(wc -w <<<"$sent")" $((3 + 1 + 16))
	affinities >/tmp/affinities
	rethinks
	affinities | diff /tmp/affinities - || fail "irqbalance has moved them (< before, > now)"
	check_eq "CPUs of irq/$own" "$(<"/proc/irq/$own/smp_affinity_list")" 0-3
	exits 0 cpubond verify
	for irq in $(ours); do
		grep -qx "IRQ $irq was BANNED." "$LOG" || fail "irqbalance does not say that it leaves irq/$irq alone"
	done
}

# A new one has forgotten.
restarted() {
	local irq
	irq=$(nic_irqs eth1 | head -n 1)
	unbalance
	balance "--banirq=$(config_irq eth1)"
	wait_for 30 moved
	exits 3 cpubond verify
	check_match "verify" "$OUT" "irqbalance: leaves irq/$irq alone: wanted 'banned', found nothing; \"cpubond apply\" mends it"
	check_match "verify" "$OUT" 'eth[01]: CPUs of irq/[0-9]+: wanted'
	check_match "show" "$(cpubond show 2>&1)" 'irqbalance: runs'
	# That it is to be told was said before.
	exits 0 cpubond apply
	rethinks
	affinities | diff /tmp/affinities - || fail "irqbalance has moved them (< before, > now)"
	exits 0 cpubond verify
}

moved() { ! affinities | cmp -s /tmp/affinities -; }

# Now irqbalance has them again, and leaves the user's alone as before.
unbanned() {
	local own irq
	own=$(config_irq eth1)
	irq=$(nic_irqs eth0 | head -n 1)
	exits 0 slowly -f --seccomp-bpf -s 4096 -e trace=sendmsg cpubond undo
	check_eq "the last list sent" "$(grep -o 'settings ban irqs [0-9 ]*' "$TRACE" | tail -n 1)" "settings ban irqs $own"
	echo 0-3 >"/proc/irq/$irq/smp_affinity_list"
	rethinks
	wait_for 30 placed "$irq"
	check_eq "CPUs of irq/$own" "$(<"/proc/irq/$own/smp_affinity_list")" 0-3
	unbalance
}

# warns PATTERN: that something would disturb, and goes on all the same.
warns() {
	exits 3 cpubond apply --check
	check_match "warnings" "$ERR" "(^|"$'\n'")cpubond: warning: $1"
	note "${BASH_REMATCH[0]#*warning: }"
}

quiet() {
	exits 3 cpubond apply --check
	! grep "$1" <<<"$ERR" || fail "there is nothing of it"
}

# Virtio's driver spreads its queues when it has one for each CPU.
xps() {
	local queue mask
	warns "XPS: 4 transmit queues of eth0 have CPUs already; cpubond replaces them and restores them; "
	exits 0 cpubond apply
	for queue in 0 1 2 3; do
		mask=$(<"$SYS/eth0/queues/tx-$queue/xps_cpus")
		check_eq "CPUs of tx-$queue of eth0 that are not its share" $((0x$mask & ~3)) 0
	done
	exits 0 cpubond undo
	check_eq "what undo has to report" "$ERR" ""
	unchanged "$ORIGIN"
}

rps() {
	quiet RPS
	echo 6 >"$SYS/eth1/queues/rx-2/rps_cpus"
	warns "RPS: queue 2 of eth1 passes received packets on to CPUs 1-2; cpubond turns it off and restores it; "
	machine >/tmp/before
	exits 0 cpubond apply
	check_eq "RPS" "$(<"$SYS/eth1/queues/rx-2/rps_cpus")" 0
	# Set by somebody, after that.
	echo 8 >"$SYS/eth1/queues/rx-3/rps_cpus"
	check_match "show" "$(cpubond show)" "RPS: queue 3 of eth1 .*; \"echo 0 > $SYS/eth1/queues/rx-3/rps_cpus\""
	exits 3 cpubond verify
	check_match "verify" "$OUT" "eth1: rx-3/rps_cpus: wanted nothing, found '3'"
	exits 0 cpubond apply
	exits 0 cpubond undo
	check_eq "RPS that somebody set meanwhile" "$(<"$SYS/eth1/queues/rx-3/rps_cpus")" 8
	echo 0 >"$SYS/eth1/queues/rx-3/rps_cpus"
	unchanged /tmp/before
	echo 0 >"$SYS/eth1/queues/rx-2/rps_cpus"
}

rfs() {
	quiet RFS
	echo 1024 >"$SYS/eth0/queues/rx-0/rps_flow_cnt"
	quiet RFS
	sysctl -qw net.core.rps_sock_flow_entries=4096
	warns 'RFS: packets received by eth0 are passed on .*aRFS.*; "sysctl -w net.core.rps_sock_flow_entries=0"'
	sysctl -qw net.core.rps_sock_flow_entries=0
	quiet RFS
	echo 0 >"$SYS/eth0/queues/rx-0/rps_flow_cnt"
}

# A process of its name, with a profile that moves interrupts.
tuned() {
	mkdir -p /etc/tuned/profiles/mine
	printf '%s\n' '[main]' '[scheduler]' 'isolated_cores=1-3' >/etc/tuned/profiles/mine/tuned.conf
	echo mine >/etc/tuned/active_profile
	quiet tuned
	cp "$(command -v sleep)" /tmp/tuned
	/tmp/tuned 600 &
	warns 'tuned: \[scheduler\] isolated_cores=1-3 of profile mine moves all interrupts when tuned starts; set irq_process=false in \[scheduler\]'
	kill $!
	rm -r /etc/tuned
}

# By the real udev, which writes down the file that it has applied.
link_file() {
	mkdir -p /etc/systemd/network /run/udev/rules.d
	echo 'SUBSYSTEM=="net", ACTION=="add", IMPORT{builtin}="net_setup_link"' >/run/udev/rules.d/80-link.rules
	printf '%s\n' '[Match]' 'OriginalName=eth1' '[Link]' 'NTupleFilter=no' 'CombinedChannels=4' >/etc/systemd/network/10-nic.link
	/usr/lib/systemd/systemd-udevd --daemon
	udevadm trigger --action=add --settle "$SYS/eth0" "$SYS/eth1"
	warns 'systemd .link: CombinedChannels=4 makes its queues and interrupts anew whenever udev adds eth1: .*10-nic.link; take the line out, or have the file not match eth1'
	check_eq "warnings of .link files" "$(grep -c 'systemd .link' <<<"$ERR")" 1
	udevadm control --exit
	rm -r /etc/systemd/network /run/udev
}

managers() {
	local index
	index=$(<"$SYS/eth1/ifindex")
	mkdir -p /run/NetworkManager/devices /run/systemd/netif/links
	printf '%s\n' '[device]' 'managed=true' >"/run/NetworkManager/devices/$index"
	printf '%s\n' 'ADMIN_STATE=configured' >"/run/systemd/netif/links/$index"
	warns 'NetworkManager: manages eth1 and may take it down, or out of the bond; "nmcli device set eth1 managed no", and unmanaged-devices='
	warns 'systemd-networkd: manages eth1 .*; \[Link\] Unmanaged=yes'
	rm -r /run/NetworkManager /run/systemd
	quiet anage
}

# But for the interrupts, which irqbalance has had.
rest() {
	local irq
	for irq in $(ours) $(config_irq eth0) $(config_irq eth1); do
		echo 0-3 >"/proc/irq/$irq/smp_affinity_list"
	done
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
	machine | grep -v ^/proc/irq/ >/tmp/machine
	grep -v ^/proc/irq/ "$ORIGIN" | diff - /tmp/machine || fail "the machine is not what it was (< before, > now)"
}

ktap_plan 11
modprobe bonding max_bonds=0
modprobe bond_cpu_bound
open_once
machine >"$ORIGIN"
of_two 'mode = "cpu_bound"'
ktap_run "XPS of the driver's is named, replaced and restored" xps
ktap_run "RPS is named, turned off and restored" rps
ktap_run "RFS is named once it works" rfs
ktap_run "tuned is named if its profile moves interrupts" tuned
ktap_run "a .link file that udev has applied is named" link_file
ktap_run "network managers are named" managers
ktap_run "a running irqbalance is refused" refused
ktap_run "irqbalance is told, and moves others only; the user's ban stays" banned
ktap_run "a new irqbalance is told again" restarted
ktap_run "after undo, irqbalance has what is not the user's" unbanned
ktap_run "and the rest of the machine is what it was" rest
ktap_finished
