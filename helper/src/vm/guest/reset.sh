#!/bin/bash
# Put a guest back to what it was after boot, so that the next test starts from a
# known state. Fails when that cannot be done; the harness then boots a new one.

rc=0
pkill -x 'lighttpd|nginx|ab|iperf3|irqbalance|tcpdump|ping|strace|traffic'
# The agent has the same program name. What `cpubond run` keeps ends with it.
pkill -KILL -f '^cpubond (run|audit) '
for _ in {1..100}; do
	pgrep -f '^cpubond keep ' >/dev/null || break
	sleep 0.1
done
pkill -KILL -f '^cpubond keep ' && rc=1
# A container, with all that is in it; to its end, or new NICs would be its udev's.
if pkill -KILL -x 'systemd|systemd-udevd'; then
	for _ in {1..100}; do
		pgrep -x 'systemd|systemd-udevd' >/dev/null || break
		sleep 0.1
	done
	umount /sys/fs/cgroup
	rm -rf /run/systemd /run/udev
fi

# The only CPU of a machine has no such file.
for online in /sys/devices/system/cpu/cpu*/online; do
	[ ! -e "$online" ] || [ "$(<"$online")" = 1 ] || echo 1 >"$online" || rc=1
done

for event in /sys/kernel/tracing/events/net/*/trigger; do
	grep -v '^#' "$event" | while read -r trigger; do
		echo "!${trigger%% \[*}" >"$event"
	done
done
# What `cpubond up` wrote down is about a bond that goes now.
rm -rf /run/cpubond /etc/cpubond
nft flush ruleset 2>/dev/null
sysctl -qw net.ipv6.conf.lo.disable_ipv6=1

ip -all netns delete
for dev in /sys/class/net/*; do
	dev=${dev##*/}
	case $dev in
	lo | eth* | bonding_masters) ;;
	*) ip link del "$dev" 2>/dev/null ;;
	esac
done
for module in pktgen bond_cpu_bound bonding; do
	[ ! -d "/sys/module/$module" ] || rmmod "$module" || rc=1
done

# What a `cpubond run` that was killed leaves of its steering.
rm -rf /sys/fs/bpf/cpubond
sysctl -qw net.ipv4.tcp_migrate_req=0

# New NICs: addresses, IRQ affinity, queue counts, XPS and RPS as they were at boot.
rmmod virtio_net && modprobe virtio_net || rc=1
nics=$(grep -o 'cpubond.nics=[0-9]*' /proc/cmdline)
for _ in {1..50}; do
	# bash's own `[ -e` on the last one is enough: they come in order.
	[ ! -e "/sys/class/net/eth$((${nics#*=} - 1))" ] || break
	sleep 0.1
done
[ -e "/sys/class/net/eth$((${nics#*=} - 1))" ] || rc=1
exit $rc
