#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Steering by reuseport: an nginx a CPU, all listening on one port, and classic BPF
# that picks the one of the CPU.
#
# vm: cpus=4 nics=4 queues=1 peer=balance-xor timeout=300
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/steer.bash"

# What the killed daemon had in hand: at most two connections of each client.
RESET_AT_MOST=16

up() {
	steer_up
	BEFORE=$(sysctl -n net.ipv4.tcp_migrate_req)
	echo "$BEFORE" >"$STEER/migrate_req"
	nginx_conf "$STEER/conf" '{port} reuseport' '[::]:{port} ipv6only=on reuseport'
	run_service reuseport
	check_eq "net.ipv4.tcp_migrate_req" "$(sysctl -n net.ipv4.tcp_migrate_req)" 1
}

removed() {
	ended
	check_eq "net.ipv4.tcp_migrate_req" "$(sysctl -n net.ipv4.tcp_migrate_req)" "$(<"$STEER/migrate_req")"
}

ktap_plan 7
ktap_run "the group of each family has a program" up
ktap_run "IPv4: every connection is served on the CPU that received it" local4
ktap_run "IPv6: every connection is served on the CPU that received it" local6
ktap_run "a daemon killed under load: none refused, and it comes back" kill_one
ktap_run "a drained daemon gets none, others serve its CPU, and it comes back" drained
ktap_run "three of four killed three times under load: none refused" storm
ktap_run "nothing is left" removed
ktap_finished
