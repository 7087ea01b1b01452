# shellcheck shell=bash
# What the tests of apply, verify and undo share. Sourced after lib.sh.

CONFIG=/etc/cpubond/config.toml
JOURNAL=/run/cpubond/journal.json
# What `slowly` has seen.
TRACE=/tmp/trace
# System calls by which cpubond changes anything: files, and the kernel by netlink, which
# is asked by the same call.
WRITES=write,sendto,rename,unlink

# configure: standard input is the configuration from now on.
configure() {
	mkdir -p "${CONFIG%/*}"
	cat >"$CONFIG"
}

# of_two [KEY=VALUE...]: a bond of eth0 and eth1, with these lines of its own.
of_two() {
	printf '%s\n' '[[bond]]' "name = \"$BOND\"" "$@" \
		'[[bond.slave]]' 'name = "eth0"' '[[bond.slave]]' 'name = "eth1"' | configure
}

# open_once: the kernel gives a device its queueing discipline when it is first opened,
# and leaves it there. After this, eth0 is up and the others are down.
open_once() {
	local nic
	for nic in $(nics); do
		ip link set "$nic" up
		[ "$nic" = eth0 ] || ip link set "$nic" down
	done
	# Carrier comes by and by.
	wait_for 5 grep -qx up "$SYS/eth0/operstate"
}

# machine: what cpubond may change of this machine, a line a fact. Where an interrupt
# does go is not there, for that only follows when it fires; nor is the map, and counts.
machine() {
	ip -d addr
	ip route show table all
	# Not everything can be read: single queues have files, but no use for them.
	grep -rs --exclude=cpu_bound_stats --exclude=cpu_bound_map . /proc/irq/*/smp_affinity_list \
		"$SYS"/*/queues/*/{xps_cpus,xps_rxqs,rps_cpus,rps_flow_cnt} "$SYS"/*/bonding* || :
}

# of NIC: all that cpubond may have changed of it.
of() {
	local irq
	ip -d addr show "$1"
	grep -Hs . "$SYS/$1"/queues/*/*ps_cpus || :
	for irq in $(nic_irqs "$1"); do
		grep -H . "/proc/irq/$irq/smp_affinity_list"
	done
}

# replug NIC: its driver lets go of it and takes it again: a new device with new
# interrupts, of the same name and address.
replug() {
	local dev
	dev=$(basename "$(readlink "$SYS/$1/device")")
	echo "$dev" >/sys/bus/virtio/drivers/virtio_net/unbind
	[ ! -e "$SYS/$1" ] || fail "$1 is there"
	echo "$dev" >/sys/bus/virtio/drivers/virtio_net/bind
	wait_for 10 test -e "$SYS/$1"
}

# hardware: what the NICs themselves were told.
hardware() {
	local nic
	for nic in $(nics); do
		ethtool -l "$nic" 2>&1 || :
		ethtool -k "$nic"
	done
}

# unchanged FILE: the machine is as it was when that was written. The kernel may take a
# moment to see a carrier.
unchanged() {
	local try
	for try in {1..20}; do
		machine >/tmp/machine
		! cmp -s "$1" /tmp/machine || return 0
		sleep 0.2
	done
	diff "$1" /tmp/machine || fail "the machine is not what it was (< before, > now)"
}

# exits CODE CMD...: what CMD says is in $OUT, and stderr in $ERR.
exits() {
	local wanted=$1 got=0
	shift
	OUT=$("$@" 2>/tmp/stderr) || got=$?
	ERR=$(</tmp/stderr)
	[ "$got" = "$wanted" ] || fail "exit code $got, expected $wanted: $*: $OUT $ERR"
}

# slowly ARG... CMD...: strace with these arguments, on one CPU with what it traces:
# it stops at each call, and to wake another CPU each time takes long here.
slowly() { taskset -c 0 strace -qq -o "$TRACE" "$@"; }

# Of such a trace, requests that change anything: RTM_NEWLINK, DELLINK, SETLINK, NEWADDR
# and DELADDR. By number where strace cannot find out which netlink it is.
CHANGES='^sendto\(.*nlmsg_type=(RTM_(NEW|SET|DEL)|0x1[01345] )'

# lines TEXT: how many.
lines() { grep -c . <<<"$1" || :; }
