# shellcheck shell=bash
# What the guest tests share.
#
# How to write one
# ----------------
# tests/NAME.sh, executable, one behaviour a case. It runs as root with real bash
# and real tools in the *server* VM, cabled NIC to NIC to the *peer* VM:
#
#     #!/bin/bash
#     # SPDX-License-Identifier: GPL-2.0
#     # What it shows, and the topology where that is not the usual one.
#     #
#     # vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=120
#     . "$(dirname "$0")/lib.sh"
#
#     pinned_sender() {
#             local before
#             bond_up cpu_bound
#             bind_irqs
#             before=$(tx_packets eth2)
#             send_from 2 100
#             check_ge "packets left by eth2" $(($(tx_packets eth2) - before)) 100
#     }
#
#     ktap_plan 1
#     ktap_run "a pinned sender's packets leave by its CPU's slave" pinned_sender
#     ktap_finished
#
# The `# vm:` line (each key may be left out; these are the defaults):
#   cpus=4            CPUs of the server (the peer has 2)
#   nics=4            cables: ethK of the server to ethK of the peer
#   queues=1          queue pairs of each server NIC; more than 1 means tap devices
#                     and bridges on the host
#   offload=1         0: such NICs leave checksums and the cutting of long packets to the
#                     kernel, as NICs of one queue always do
#   sockets=1         CPU sockets of the server, each a NUMA node
#   profiler=0        1: the server runs under the profiler ('make profiler'), for
#                     `cpubond vm mark` and `cpubond vm call profile show LABEL`
#   peer=balance-xor  mode of the peer's bond0 (10.0.0.2/24 and 10.0.0.11..18/24, all
#                     its NICs, xmit_hash_policy layer3+4, stock bonding): balance-xor,
#                     802.3ad, or none for bare NICs
#   timeout=120       seconds after which the test has failed
#
# Before each test the harness puts both VMs back: no bond, bonding unloaded, all
# cables in, all CPUs online, IRQ affinity spread over all, no RPS, no nft rules, no
# network namespaces, no daemons; then it makes the peer's bond. So a test need not
# clean up for the next.
# VMs are shared by tests that want the same cpus, nics, queues, offload, sockets and
# profiler.
#
# A case is a function run by ktap_run in a subshell under `set -e`, so any command
# that fails fails the case; what it sets in the kernel stays for the next case.
# In it: `fail TEXT` and `skip TEXT` end it; `note TEXT` shows a diagnostic; the
# check_* functions fail with both values. A kernel splat in either VM, a missing
# or short plan, a timeout: the harness counts each as a failure by itself.
#
# Server: 10.0.0.1/24 on bond0. IPv6 is off in both, so that no stray packet is sent.

set -u
shopt -s lastpipe

SERVER_IP=10.0.0.1
PEER_IP=10.0.0.2
BOND=bond0
SYS=/sys/class/net

# --- KTAP ------------------------------------------------------------------

KTAP_N=0 KTAP_FAILED=0 KTAP_SKIPPED=0 KTAP_PLAN=0

# ktap_plan N: first call of every test.
ktap_plan() {
	KTAP_PLAN=$1
	printf 'KTAP version 1\n1..%d\n' "$1"
}

# ktap_run NAME FUNCTION [ARG...]: one case.
ktap_run() {
	local name=$1 rc
	shift
	KTAP_N=$((KTAP_N + 1))
	(
		set -eE
		trap 'note "failed: $BASH_COMMAND (${BASH_SOURCE[0]##*/}:$LINENO)"' ERR
		"$@"
	)
	rc=$?
	case $rc in
	0) printf 'ok %d - %s\n' "$KTAP_N" "$name" ;;
	4)
		KTAP_SKIPPED=$((KTAP_SKIPPED + 1))
		printf 'ok %d - %s # SKIP\n' "$KTAP_N" "$name"
		;;
	*)
		KTAP_FAILED=$((KTAP_FAILED + 1))
		printf 'not ok %d - %s\n' "$KTAP_N" "$name"
		;;
	esac
}

# ktap_skip_all TEXT: the whole test cannot run here. Instead of ktap_plan.
ktap_skip_all() {
	printf 'KTAP version 1\n1..0 # SKIP %s\n' "$1"
	exit 4
}

# ktap_finished: last call of every test.
ktap_finished() {
	printf '# Totals: pass:%d fail:%d skip:%d\n' \
		$((KTAP_N - KTAP_FAILED - KTAP_SKIPPED)) "$KTAP_FAILED" "$KTAP_SKIPPED"
	[ "$KTAP_FAILED" = 0 ] && [ "$KTAP_N" = "$KTAP_PLAN" ] || exit 1
	[ "$KTAP_SKIPPED" != "$KTAP_N" ] || exit 4
	exit 0
}

note() { printf '# %s\n' "$*"; }
fail() { note "$*"; trap - ERR; exit 1; }
skip() { note "$*"; exit 4; }

# check_eq WHAT GOT WANTED, and the like for numbers.
check_eq() { [ "$2" = "$3" ] || fail "$1: got '$2', expected '$3'"; }
check_ge() { [ "$2" -ge "$3" ] || fail "$1: got $2, expected at least $3"; }
check_le() { [ "$2" -le "$3" ] || fail "$1: got $2, expected at most $3"; }
check_match() { [[ $2 =~ $3 ]] || fail "$1: got '$2', expected a match of '$3'"; }

# check_fails CMD...: CMD must fail; its message is shown.
check_fails() {
	local out
	if out=$("$@" 2>&1); then
		fail "succeeded, but should have been refused: $*"
	fi
	note "refused as it should be: ${out##*$'\n'}"
}

# wait_for SECONDS CMD...: until CMD succeeds; fails the case when it does not.
wait_for() {
	local end=$((SECONDS + $1 + 1)) what
	shift
	what=$*
	until "$@" >/dev/null 2>&1; do
		[ "$SECONDS" -lt "$end" ] || fail "did not come true in time: $what"
		sleep 0.1
	done
}

# --- the lab ---------------------------------------------------------------

# peer_do CMD: run a bash command line in the peer; its output and exit code are ours.
peer_do() { cpubond vm call run peer "$*"; }

# set_link NIC on|off: pull the cable of NIC, or put it back; both ends see it.
set_link() { cpubond vm call link "$1" "$2"; }

# The distribution's default, fq_codel, drops a packet that had to wait, and on this
# emulator any may: a device that comes up gets a queue that drops nothing. In a
# guest only: tests/host/ sources this too.
[ ! -e /run/cpubond.sock ] || sysctl -qw net.core.default_qdisc=pfifo

# --- bonds -----------------------------------------------------------------

# bond_up MODE [SLAVE...]: bond0 at 10.0.0.1/24 in MODE with these slaves (default:
# all NICs), up, and the peer's neighbour entry fixed, so that no ARP is in the
# counts. MODE may be `balance-xor:cpu_bound` or `802.3ad:cpu_bound`, for the
# policy as xmit_hash_policy. IRQs and `cpus` are left alone.
bond_up() {
	local mode=${1%%:*} policy=${1#"${1%%:*}"} slave
	shift
	# shellcheck disable=SC2046 # a list of words
	[ $# -gt 0 ] || set -- $(nics)
	bond_down
	modprobe bonding max_bonds=0
	ip link add "$BOND" type bond
	echo 50 >"$SYS/$BOND/bonding/miimon"
	echo "$mode" >"$SYS/$BOND/bonding/mode"
	[ -z "$policy" ] || echo "${policy#:}" >"$SYS/$BOND/bonding/xmit_hash_policy"
	[ "$mode" != 802.3ad ] || echo fast >"$SYS/$BOND/bonding/lacp_rate"
	for slave; do
		ip link set "$slave" down
		ip link set "$slave" master "$BOND"
	done
	ip addr add "$SERVER_IP/24" dev "$BOND"
	ip link set "$BOND" up
	ip neigh replace "$PEER_IP" lladdr "$(peer_mac)" dev "$BOND" nud permanent
}

bond_down() {
	[ ! -e "$SYS/$BOND" ] || ip link del "$BOND"
}

# nics: the NICs of this VM, eth0 first.
nics() {
	local d
	for d in "$SYS"/eth*; do
		basename "$d"
	done | sort -V | tr '\n' ' '
}

peer_mac() { echo 52:54:00:00:02:00; }

# bond_map CPU: "SLAVE[,SLAVE...] REASON" that the policy has for CPU.
bond_map() {
	awk -v cpu="$1" '$1 == cpu { print $2, $3 }' "$SYS/$BOND/bonding/cpu_bound_map"
}

# map_is CPU SLAVE [REASON]: for wait_for.
map_is() {
	local slave reason
	read -r slave reason <<<"$(bond_map "$1")"
	[ "$slave" = "$2" ] && [ "${3:-$reason}" = "$reason" ]
}

# slave_stat SLAVE local|remote: the policy's own counters.
slave_stat() {
	awk -v what="$2" '$1 == what { print $2 }' "$SYS/$1/bonding_slave/cpu_bound_stats"
}

# --- IRQs ------------------------------------------------------------------

# nic_irqs NIC: the numbers of its queue vectors (the config vector serves no queue).
nic_irqs() {
	local dev
	dev=$(basename "$(readlink "$SYS/$1/device")")
	awk -v dev="$dev-" 'index($NF, dev "input") == 1 || index($NF, dev "output") == 1 { sub(":", "", $1); print $1 }' /proc/interrupts
}

# bind_irq NIC CPULIST: all queue vectors of NIC to these CPUs.
bind_irq() {
	local irq
	for irq in $(nic_irqs "$1"); do
		echo "$2" >"/proc/irq/$irq/smp_affinity_list"
	done
}

# bind_irqs: ethK to CPU K, for as many as there are of both.
bind_irqs() {
	local nic cpu=0
	for nic in $(nics); do
		[ "$cpu" -lt "$(nproc --all)" ] || break
		bind_irq "$nic" "$cpu"
		cpu=$((cpu + 1))
	done
}

# irqs_moved: for wait_for, by those who say where packets are received. An interrupt that
# was bound moves when it next occurs, on the CPU that it leaves; so the peer has each
# NIC receive something first.
irqs_moved() {
	local nic
	peer_do "for i in {1..8}; do ping -q -c 1 -W 1 $SERVER_IP; done"
	for nic in $(nics); do
		[ "$(rx_packets "$nic")" -ge 3 ] || return 1
	done
}

# --- traffic and counters --------------------------------------------------

# send_from CPU COUNT: COUNT small UDP datagrams to the peer, each one frame, by a
# process pinned on CPU; each call is a flow of its own.
send_from() {
	taskset -c "$1" bash -euc '
		exec 3>"/dev/udp/$1/9"
		for ((i = 0; i < $2; i++)); do
			echo x >&3
		done' send_from "$PEER_IP" "$2"
}

# peer_received: how many of send_from's datagrams have reached the peer since reset.
peer_received() {
	peer_do nft -j list chain ip lab sink | jq '[.nftables[].rule.expr[]?.counter.packets // empty] | add'
}

# tx_packets DEV, rx_packets DEV: the device's own counters.
tx_packets() { cat "$SYS/$1/statistics/tx_packets"; }
rx_packets() { cat "$SYS/$1/statistics/rx_packets"; }

# tx_all: "DEV COUNT" a line, for every NIC.
tx_all() {
	local nic
	for nic in $(nics); do
		printf '%s %d\n' "$nic" "$(tx_packets "$nic")"
	done
}

# xmit_trace on|off|show: count transmits by CPU and device in the kernel, whatever
# the bond's mode (a histogram on the net_dev_start_xmit tracepoint).
# show: "CPU DEV COUNT" a line.
xmit_trace() {
	local event=/sys/kernel/tracing/events/net/net_dev_start_xmit
	local hist=hist:keys=common_cpu,name:size=4096
	case $1 in
	on)
		echo "!$hist" >"$event/trigger" 2>/dev/null || :
		echo "$hist" >"$event/trigger"
		;;
	off) echo "!$hist" >"$event/trigger" ;;
	show)
		sed -nE 's/^\{ common_cpu: +([0-9]+), name: ([^ ]+) +\} hitcount: +([0-9]+).*/\1 \2 \3/p' "$event/hist" |
			sort -k1,1n -k2,2V
		;;
	esac
}
