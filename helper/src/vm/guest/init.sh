#!/bin/bash
# The first process of a guest. Sets up the bare machine, starts the agent that
# the host talks to, and powers off when the host is gone.

export PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C TERM=${TERM:-linux}
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/pts /dev/shm
# For <(…).
ln -s /proc/self/fd /dev/fd
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf
exec </dev/null >/dev/console 2>&1

read -r cmdline </proc/cmdline
[[ $cmdline =~ cpubond\.vm=([a-z]+) ]] && hostname "${BASH_REMATCH[1]}"

# No router solicitations, no multicast joins: no packet that a test did not send.
sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
# Hundreds of new connections a second.
sysctl -qw net.ipv4.tcp_max_syn_backlog=4096 net.core.somaxconn=4096
ip link set lo up

# Our modules came with the second archive: `updates` goes before `kernel`.
[ ! -d "/lib/modules/$(uname -r)/updates" ] || depmod "$(uname -r)"
modprobe virtio_net

if [[ $cmdline == *cpubond.shell* ]]; then
	(
		cd /cpubond || exit
		while :; do
			setsid -c bash -i </dev/hvc0 >/dev/hvc0 2>&1
		done
	) &
fi

cpubond vm agent
echo o >/proc/sysrq-trigger
sleep 10
