#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The units and the udev rule of dist/ with the real systemd, udev and irqbalance, in a
# container of the server that has all of its network.
#
#   server bond0 (cpu_bound)                        peer bond0 (balance-xor)
#     CPU 0-1 ⇄ eth0 ─────────────────────────────── eth0
#     CPU 2-3 ⇄ eth1, replugged ──────────────────── eth1
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=240
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/apply.bash"

ORIGIN=/tmp/origin
UNITS=/run/systemd/system
DIST=/cpubond/dist
# What the services say.
SAID=/tmp/said

# install_units: where systemd and udev look for what is this boot's.
install_units() {
	local unit
	mkdir -p "$UNITS"/{irqbalance.service.d,multi-user.target.wants} /run/udev/rules.d
	cp "$DIST"/*.service "$UNITS"
	cp "$DIST/irqbalance.conf" "$UNITS/irqbalance.service.d/50-cpubond.conf"
	cp "$DIST/90-cpubond.rules" /run/udev/rules.d
	for unit in cpubond.service cpubond-run@.service; do
		mkdir "$UNITS/$unit.d"
		printf '%s\n' '[Service]' "StandardOutput=append:$SAID" >"$UNITS/$unit.d/lab.conf"
	done
	ln -s "$UNITS/cpubond.service" /usr/lib/systemd/system/systemd-udevd.service "$UNITS/multi-user.target.wants/"
	# In a container it would not be started, and it is to look every second.
	printf '%s\n' '[Unit]' 'ConditionVirtualization=' '[Service]' 'Environment=IRQBALANCE_ARGS=--interval=1' \
		>"$UNITS/irqbalance.service.d/lab.conf"
	# No first boot, on which systemd enables what there is.
	echo 0123456789abcdef0123456789abcdef >/etc/machine-id
}

# boot: systemd, on its way to multi-user.target. It ends with this test.
boot() {
	mkdir -p /sys/fs/cgroup
	mount -t cgroup2 cgroup /sys/fs/cgroup
	unshare --fork --pid --kill-child --mount --cgroup --mount-proc env -i container=lab PATH="$PATH" \
		/usr/lib/systemd/systemd --unit=multi-user.target --log-target=kmsg --log-level=warning \
		>/tmp/systemd 2>&1 </dev/null &
	INIT=$!
	trap shut_down EXIT
}

# shut_down: what is in the container ends with its first process, a moment later.
shut_down() {
	kill -KILL "$INIT"
	for _ in {1..100}; do
		! umount /sys/fs/cgroup || break
		sleep 0.1
	done 2>/dev/null
	rm -rf "$UNITS" /run/udev
}

# inside CMD...: as if logged in there.
inside() {
	local pid
	pid=$(cat "/proc/$INIT/task/$INIT/children") || return
	nsenter --target "${pid%% *}" --pid --mount --cgroup "$@"
}

# active UNIT...: all of them; systemctl is content with one.
active() {
	local unit
	for unit; do
		inside systemctl is-active --quiet "$unit" || return
	done
}

# verified: all is as it should be; says what is not.
verified() { exits 0 inside cpubond verify; }

# explained: a case that fails shows what systemd makes of it.
explained() { trap 'rc=$?; [ "$rc" = 0 ] || state; exit "$rc"' EXIT; }

state() {
	trap - ERR
	inside systemctl status --no-pager --lines=0 cpubond.service irqbalance.service systemd-udevd.service
	cat "$SAID" /tmp/systemd
}

boots() {
	explained
	wait_for 60 active multi-user.target
	note "$(inside systemctl --version | head -n 1)"
	wait_for 60 active cpubond.service
	verified
	check_eq "slaves" "$(cat "$SYS/$BOND/bonding/slaves")" "eth0 eth1"
}

reloads() {
	explained
	echo 3 >"/proc/irq/$(nic_irqs eth0 | head -n 1)/smp_affinity_list"
	ip link set eth1 nomaster
	exits 3 inside cpubond verify
	inside systemctl reload cpubond.service
	verified
}

stops() {
	explained
	inside systemctl stop cpubond.service
	unchanged "$ORIGIN"
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
	inside systemctl start cpubond.service
	verified
}

comes_back() {
	local index
	explained
	index=$(<"$SYS/eth1/ifindex")
	replug eth1
	wait_for 60 enslaved eth1
	[ "$(<"$SYS/eth1/ifindex")" -gt "$index" ] || fail "eth1 is no new device"
	wait_for 30 inside cpubond verify
	wait_for 10 map_is 2 eth1 irq
}

enslaved() { [ "$(basename "$(readlink "$SYS/$1/master")")" = "$BOND" ]; }

# Without any of its NICs the bond cannot be made; when they come, it is.
comes_late() {
	local dev0 dev1 driver=/sys/bus/virtio/drivers/virtio_net
	explained
	inside systemctl stop cpubond.service
	dev0=$(basename "$(readlink "$SYS/eth0/device")")
	dev1=$(basename "$(readlink "$SYS/eth1/device")")
	echo "$dev0" >"$driver"/unbind
	echo "$dev1" >"$driver"/unbind
	check_fails inside systemctl start cpubond.service
	echo "$dev0" >"$driver"/bind
	echo "$dev1" >"$driver"/bind
	wait_for 60 enslaved eth0
	wait_for 60 enslaved eth1
	wait_for 30 inside cpubond verify
	# One that was stopped is not started by a NIC.
	inside systemctl stop cpubond.service
	replug eth1
	inside udevadm settle
	check_eq "state of the service" "$(inside systemctl show -P ActiveState cpubond.service)" inactive
	inside systemctl start cpubond.service
}

# bans: how many interrupts irqbalance was told to leave alone.
bans() { jq '[.changes[] | select(.item.ban)] | length' "$JOURNAL"; }

told() { inside cpubond verify && ! inside cpubond show 2>&1 | grep 'irqbalance: runs'; }

irqbalance_starts() {
	explained
	inside systemctl start irqbalance.service
	wait_for 60 told
	check_eq "interrupts that it leaves alone" "$(bans)" 4
	inside systemctl restart irqbalance.service
	# Its bans are gone until it is told again.
	wait_for 60 told
	active irqbalance.service cpubond.service
	inside systemctl stop irqbalance.service
}

# Whoever wants the daemons wants the bond, and they end before it.
runs() {
	explained
	mkdir -p /tmp/www
	printf '%s\n' 'server.document-root = "/tmp/www"' 'server.port = env.CPUBOND_PORT' >/tmp/web.conf
	printf '%s\n' '[[service]]' 'name = "web"' 'port = 80' 'command = ["lighttpd", "-D", "-f", "/tmp/web.conf"]' >>"$CONFIG"
	inside systemctl start cpubond-run@web.service
	wait_for 60 live 4
	inside systemctl restart cpubond.service
	wait_for 60 live 4
	active cpubond.service cpubond-run@web.service
	verified
	inside systemctl stop cpubond.service
	! active cpubond-run@web.service || fail "it runs without its bonds"
	[ "$(inside systemctl show -P Result cpubond-run@web.service cpubond.service | tr -d '\n')" = successsuccess ] ||
		fail "ended otherwise"
	! pgrep -x lighttpd || fail "daemons are left"
	check_eq "rules left" "$(nft list ruleset)" ""
}

live() {
	[ "$(inside cpubond steer list web -j | jq '[.services[].daemons[] | select(.phase == "live")] | length')" = "$1" ]
}

# New NICs as they are made, but for what irqbalance has moved.
ends() {
	[ ! -e "$SYS/$BOND" ] || fail "$BOND is there"
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
	check_eq "interrupts on one CPU" "$(of eth0 | grep -c 'list:[0-3]$' || :)" 0
}

ktap_plan 8
modprobe bonding max_bonds=0
modprobe bond_cpu_bound
open_once
machine >"$ORIGIN"
of_two "addresses = [\"$SERVER_IP/24\"]"
install_units
boot
ktap_run "at boot, all is made" boots
ktap_run "a reload mends drift" reloads
ktap_run "a stop undoes, and a start makes it again" stops
ktap_run "a NIC that is unplugged and comes back is in its bond again" comes_back
ktap_run "a bond whose NICs come late is made when they come, unless it was stopped" comes_late
ktap_run "irqbalance is told when it starts, and when it starts anew" irqbalance_starts
ktap_run "services stop and restart with their bonds" runs
ktap_run "and nothing is left" ends
ktap_finished
