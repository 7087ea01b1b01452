#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# `cpubond apply` against the real kernel: what config.toml says is made, once; a
# change of it costs what it takes; drift is told and mended; what fails, is not
# confirmed or is interrupted leaves nothing behind.
#
#   server bond0 (cpu_bound)                        peer bond0 (balance-xor)
#     CPU 0 ⇄ eth0, by name ──────────────────────── eth0
#     CPU 1 ⇄ eth1, by permanent address ─────────── eth1
#     CPU 2 ⇄ eth2, by PCI device ────────────────── eth2
#             eth3, no slave ─────────────────────── eth3
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=240
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/apply.bash"

ORIGIN=/tmp/origin BEFORE=/tmp/before

pci_of() {
	local path
	path=$(readlink -f "$SYS/$1/device/..")
	echo "${path##*/}"
}

# three: a bond of eth0, eth1 and eth2.
three() {
	configure <<-END
		[[bond]]
		name = "$BOND"
		addresses = ["$SERVER_IP/24"]
		[[bond.slave]]
		name = "eth0"
		cpus = "0"
		[[bond.slave]]
		mac = "$(mac_of eth1)"
		cpus = "1"
		[[bond.slave]]
		pci = "$(pci_of eth2)"
		cpus = "2"
	END
}

# The address that it was made with, in a bond or not.
mac_of() { ip -d -j link show "$1" | jq -r '.[0] | .permaddr // .address'; }

# clean: the machine is what it was, whatever the case before has come to.
clean() {
	exits 0 cpubond undo
	unchanged "$ORIGIN"
}

# irqs_on NIC CPULIST: where its interrupts were sent.
irqs_on() {
	local irq
	for irq in $(nic_irqs "$1"); do
		check_eq "CPUs of irq/$irq of $1" "$(<"/proc/irq/$irq/smp_affinity_list")" "$2"
	done
}

# traced CODE CMD...: as `exits`; its writes, a line each, are in $WRITTEN. That it opens
# its lock file and asks the kernel by netlink are none.
traced() {
	local code=$1
	shift
	exits "$code" slowly -f --seccomp-bpf \
		-e trace=openat,mkdir,rename,unlink,fsync,write,sendto "$@"
	WRITTEN=$(sed -nE 's/^[0-9]+ +//; / = -1 E/d; /\/run\/cpubond\/lock|\/dev\/null/d
		/^openat.*O_(WRONLY|RDWR)/p; /^(mkdir|rename|unlink|fsync)/p
		/^write\([12],/d; /^write/p; /'"$CHANGES"'/p' "$TRACE")
}

check() {
	three
	traced 3 cpubond apply --check --diff
	check_eq "writes" "$WRITTEN" ""
	unchanged "$ORIGIN"
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
	# The bond, two options, its address and up; of each slave, the master and two
	# interrupts; and the one that is up is taken down to be enslaved.
	check_eq "changes shown" "$(lines "$OUT")" $((5 + 3 * 3 + 1 + 1))
	check_match "last line" "${OUT##*$'\n'}" '^15 changes needed$'
	check_match "output" "$OUT" "$BOND: mode: 'balance-rr' -> 'cpu_bound'"
	check_match "output" "$OUT" "eth2: master: nothing -> '$BOND'"
	SHOWN=$OUT
	traced 0 cpubond apply --diff
	check_ge "writes of an apply" "$(lines "$WRITTEN")" 60
	# The bond, eth0 down, three masters, the address, up.
	check_eq "writes by netlink" "$(grep -c '^sendto' <<<"$WRITTEN" || :)" 7
	# But for the index of the new bond and the count.
	diff <(head -n 15 <<<"$SHOWN" | grep -v "$BOND: bond:") \
		<(head -n 15 <<<"$OUT" | grep -v "$BOND: bond:") || fail "--check has shown other changes (<) than were made (>)"
}

works() {
	local cpu
	for cpu in 0 1 2; do
		wait_for 5 map_is "$cpu" "eth$cpu" irq
	done
	check_eq "slaves" "$(cat "$SYS/$BOND/bonding/slaves")" "eth0 eth1 eth2"
	ip neigh replace "$PEER_IP" lladdr "$(peer_mac)" dev "$BOND" nud permanent
	wait_for 10 ping -q -c 1 -W 1 "$PEER_IP"
	send_from 1 100
	check_ge "packets of CPU 1 by eth1" "$(slave_stat eth1 local)" 100
	exits 0 cpubond verify
	check_eq "verify" "$OUT" "all as it should be"
}

again() {
	local journal
	machine >"$BEFORE"
	journal=$(stat -c '%i %y' "$JOURNAL")
	traced 0 cpubond apply --diff
	check_eq "output" "$OUT" "nothing to change"
	check_eq "writes" "$WRITTEN" ""
	check_eq "the journal's file" "$(stat -c '%i %y' "$JOURNAL")" "$journal"
	unchanged "$BEFORE"
	exits 0 cpubond apply --check
}

changed() {
	local sent a b c d
	sent=$(slave_stat eth0 local)
	send_from 0 100
	read -rd '' a b <<<"$(nic_irqs eth1)" || :
	read -rd '' c d <<<"$(nic_irqs eth2)" || :
	configure <<-END
		[[bond]]
		name = "$BOND"
		follow = "flow"
		addresses = ["$SERVER_IP/24", "10.0.0.3/24"]
		slave = [ { name = "eth0", cpus = "0" }, { name = "eth1", cpus = "3" } ]
	END
	exits 0 cpubond apply --diff
	# What is wanted no more goes first.
	diff - <(printf '%s\n' "$OUT") <<-END || fail "other changes (>) than it takes (<)"
		eth2: CPUs of irq/$d: '2' -> '0-3'
		eth2: CPUs of irq/$c: '2' -> '0-3'
		eth2: master: '$BOND' -> nothing
		$BOND: cpu_bound_follow: 'cpu' -> 'flow'
		eth1: CPUs of irq/$a: '1' -> '3'
		eth1: CPUs of irq/$b: '1' -> '3'
		$BOND: address 10.0.0.3/24: nothing -> 'present'
		7 changes made
	END
	wait_for 5 map_is 3 eth1 irq
	[ ! -e "$SYS/eth2/master" ] || fail "eth2 has a master"
	# A slave that was out of the bond for a moment counts from nought.
	check_ge "packets of CPU 0 by eth0 since it was enslaved" "$(slave_stat eth0 local)" $((sent + 100))
	exits 0 cpubond verify
}

drift() {
	local irq
	irq=$(nic_irqs eth0 | head -n 1)
	machine >"$BEFORE"
	echo 2 >"/proc/irq/$irq/smp_affinity_list"
	ip link set eth1 nomaster
	echo 50 >"$SYS/$BOND/bonding/miimon"
	ip addr del 10.0.0.3/24 dev "$BOND"
	ip link set eth3 down
	ip link set eth3 master "$BOND"
	exits 3 cpubond verify
	check_match verify "$OUT" "eth0: CPUs of irq/$irq: wanted '0', found '2'; \"cpubond apply\" mends it"
	check_match verify "$OUT" "eth1: master: wanted '$BOND', found nothing; \"cpubond apply\" mends it"
	check_match verify "$OUT" "$BOND: miimon: wanted '100', found '50'; \"cpubond apply\" mends it"
	check_match verify "$OUT" "$BOND: address 10.0.0.3/24: wanted 'present', found nothing"
	check_match verify "$OUT" "eth3: master: wanted not this bond, found $BOND; \"ip link set eth3 nomaster\""
	exits 3 cpubond verify -j
	check_eq "places in JSON" "$(jq -r '.schema, (.drift[] | select(.place | startswith("eth0")) | .place, .wanted, .found)' <<<"$OUT" | tr '\n' ' ')" \
		"1 eth0: CPUs of irq/$irq '0' '2' "
	ip link set eth3 nomaster
	exits 0 cpubond apply
	check_match "changes" "$OUT" '^4 changes made$'
	exits 0 cpubond verify
	unchanged "$BEFORE"
}

# lag CPU: eth1 is to be on this CPU, and the rest as `changed` has it.
lag() {
	sed -i "s/\"eth1\", cpus = \"[0-9]\"/\"eth1\", cpus = \"$1\"/" "$CONFIG"
}

no_guard() { ! pgrep -f 'cpubond rollback --guard'; }

unconfirmed() {
	machine >"$BEFORE"
	cp "$JOURNAL" /tmp/journal
	lag 2
	exits 0 cpubond apply --rollback-after 3s
	check_match "output" "$OUT" '^2 changes made; "cpubond confirm" keeps them, otherwise they are taken back in 3 s$'
	wait_for 20 no_guard
	unchanged "$BEFORE"
	irqs_on eth1 3
	diff /tmp/journal "$JOURNAL" || fail "the journal is not what it was"
	exits 1 cpubond confirm
	check_match "confirm" "$ERR" 'nothing waits to be confirmed; the last one: it was not confirmed in time and was rolled back: 2 changes taken back, 0 errors$'
	exits 1 cpubond rollback
	check_eq "lines of an error" "$(lines "$ERR")" 1
}

confirmed() {
	exits 0 cpubond apply --rollback-after 60s
	irqs_on eth1 2
	exits 1 cpubond apply
	check_match "another apply" "$ERR" 'an earlier one waits to be confirmed; "cpubond confirm" keeps it'
	exits 3 cpubond verify
	check_match "verify" "$OUT" 'confirm'
	exits 0 cpubond confirm
	wait_for 20 no_guard
	irqs_on eth1 2
	exits 0 cpubond verify
	# Taken back by hand.
	machine >"$BEFORE"
	lag 3
	exits 0 cpubond apply --rollback-after 60s
	irqs_on eth1 3
	exits 0 cpubond rollback
	wait_for 20 no_guard
	unchanged "$BEFORE"
}

# An apply that is killed has a guard, who does not wait then.
killed() {
	local rc=0
	{ slowly -e trace=rename -e inject=rename:signal=KILL:when=3 \
		cpubond apply --rollback-after 60s; } >/dev/null 2>&1 || rc=$?
	check_eq "exit code of who was killed" "$rc" 137
	wait_for 20 no_guard
	unchanged "$BEFORE"
	exits 1 cpubond confirm
	check_match "confirm" "$ERR" 'the last one: it was killed and was rolled back: [12] changes taken back, 0 errors$'
}

# refused CODE PATTERN: this configuration is, with one line, and nothing is changed.
refused() {
	configure
	exits "$1" cpubond apply
	check_eq "lines of the error" "$(lines "$ERR")" 1
	check_match "error" "$ERR" "$2"
	note "refused as it should be: $ERR"
}

bad() {
	local good
	good=$(<"$CONFIG")
	cp "$JOURNAL" /tmp/journal
	refused 2 "$CONFIG:2: unknown field .nmae., expected one of .*slave" <<<$'[[bond]]\nnmae = "bond0"'
	refused 2 "$CONFIG:2" <<<$'[[bond]]\nname = "bond0'
	refused 2 "$CONFIG:3: bond.mode: .*cpubound.*cpu_bound" <<<$'[[bond]]\nname = "bond0"\nmode = "cpubound"'
	refused 2 "$CONFIG:3: .*cpus: .x. is no CPU number" <<<$'[[bond]]\nname = "bond0"\ncpus = "0-x"\nslave = [ { name = "eth0" } ]'
	refused 2 'eth0.* is there twice' <<<$'[[bond]]\nname = "bond0"\nslave = [ { name = "eth0" }, { name = "eth0" } ]'
	refused 2 'is eth0, as eth0 is; name each slave once' \
		<<<"[[bond]]"$'\nname = "bond0"\nslave = [ { name = "eth0" }, { mac = "'"$(mac_of eth0)"'" } ]'
	refused 1 'CPUs 4-9 are not online; choose from 0-3' <<<$'[[bond]]\nname = "bond0"\ncpus = "3-9"\nslave = [ { name = "eth0" } ]'
	refused 1 'eth9: no such network device' <<<$'[[bond]]\nname = "bond0"\nslave = [ { name = "eth9" } ]'
	rm "$CONFIG"
	exits 1 cpubond apply
	check_match "error" "$ERR" "$CONFIG: cannot be read: .*; write it"
	configure <<<"$good"
	unchanged "$BEFORE"
	diff /tmp/journal "$JOURNAL" || fail "the journal is not what it was"
}

# A VLAN device is an Ethernet device that cannot be opened while the one below is
# down: the kernel refuses it, when the others are slaves already.
midway() {
	clean
	ip link add link eth3 name vlan7 type vlan id 7
	machine >"$BEFORE"
	printf '%s\n' '[[bond]]' "name = \"$BOND\"" "addresses = [\"$SERVER_IP/24\"]" \
		'slave = [ { name = "eth0" }, { name = "eth1" }, { name = "vlan7" } ]' | configure
	exits 5 cpubond apply
	check_match "error" "$ERR" "^cpubond: failed, everything was rolled back"$'\n'"cpubond: vlan7: cannot be enslaved to $BOND: "
	note "${ERR##*$'\n'}"
	unchanged "$BEFORE"
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
	# Without it, on top of what is there.
	sed -i 's/, { name = "vlan7" }//' "$CONFIG"
	exits 0 cpubond apply
	machine >"$BEFORE"
	sed -i 's/{ name = "eth1" }/{ name = "vlan7" }/; s/^slave/miimon = 50\nslave/' "$CONFIG"
	exits 5 cpubond apply
	unchanged "$BEFORE"
	exits 0 cpubond undo
	ip link del vlan7
	unchanged "$ORIGIN"
}

# Ctrl-C, or systemd that loses patience.
interrupted() {
	clean
	three
	exits 5 slowly -e trace=rename -e inject=rename:signal=TERM:when=8 cpubond apply
	check_match "error" "$ERR" 'cpubond: interrupted$'
	unchanged "$ORIGIN"
	[ ! -e "$JOURNAL" ] || fail "there is a journal"
}

two() {
	local first
	clean
	three
	# The first sleeps over its first line in the journal.
	slowly -f --seccomp-bpf -e trace=rename -e inject=rename:delay_enter=4s:when=1 \
		cpubond apply >/tmp/first 2>&1 &
	first=$!
	wait_for 20 test -e "$JOURNAL.new"
	exits 1 cpubond apply
	check_match "error" "$ERR" '^cpubond: /run/cpubond/lock: another cpubond is changing things; wait for it to end$'
	exits 3 cpubond verify --wait 0
	# Undo waits, and then undoes all of it.
	exits 0 cpubond undo
	check_match "undo" "$OUT" '^[0-9]+ changes taken back$'
	check_ge "changes taken back" "${OUT%% *}" 11
	wait "$first" || fail "the first has failed: $(</tmp/first)"
	unchanged "$ORIGIN"
}

back() {
	clean
	hardware | diff /tmp/hardware - || fail "the NICs are not what they were (< before, > now)"
}

ktap_plan 13
modprobe bonding max_bonds=0
modprobe bond_cpu_bound
open_once
machine >"$ORIGIN"
hardware >/tmp/hardware
ktap_run "--check says what will be changed, and changes nothing" check
ktap_run "names, permanent addresses and PCI devices are found, and verify is content" works
ktap_run "a second apply writes nothing" again
ktap_run "a changed file is applied by the changes it takes" changed
ktap_run "verify names each drift, and apply mends it" drift
ktap_run "what nobody confirms in time is rolled back" unconfirmed
ktap_run "what is confirmed stays, and what is rolled back goes at once" confirmed
ktap_run "an apply that is killed is rolled back by its guard" killed
ktap_run "nonsense is refused in a line, and changes nothing" bad
ktap_run "what fails midway is rolled back" midway
ktap_run "an interruption rolls back" interrupted
ktap_run "two at a time: the second is told, undo waits" two
ktap_run "and the machine is what it was" back
ktap_finished
