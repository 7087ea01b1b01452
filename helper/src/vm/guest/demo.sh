#!/bin/bash
# The server's side of the demo.
#
#   demo.sh start MODE   `cpubond up` over all NICs, and a lighttpd pinned on each CPU,
#                        on a port of its own
#   demo.sh read         what the kernel has counted up to now, of NICs with a link, a
#                        fact a line:
#                          own CPU DEV         the NIC whose IRQs are on CPU
#                          xmit CPU DEV COUNT  packets CPU gave to the NIC
#                          tx DEV COUNT        packets the NIC says it sent
#                          policy DEV LOCAL REMOTE
set -eu
. /cpubond/tests/lib.sh
set -o pipefail

start() {
	local cpu
	# shellcheck disable=SC2046 # a list of words
	cpubond up "$BOND" $(nics) --mode "$1" --address "$SERVER_IP/24"
	mkdir -p /tmp/www
	head -c 128 /dev/zero | tr '\0' x >/tmp/www/index.html
	for cpu in $(seq 0 $(($(nproc) - 1))); do
		cat >"/tmp/lighttpd-$cpu.conf" <<-CONF
			server.document-root = "/tmp/www"
			server.bind = "$SERVER_IP"
			server.port = $((8000 + cpu))
			server.errorlog = "/tmp/lighttpd-$cpu.log"
			index-file.names = ("index.html")
		CONF
		taskset -c "$cpu" lighttpd -f "/tmp/lighttpd-$cpu.conf"
	done
	wait_for 10 ping -q -c 1 -W 1 "$PEER_IP"
	xmit_trace on
}

read_all() {
	local nic irq
	for nic in $(nics); do
		[ "$(<"$SYS/$nic/operstate")" = up ] || continue
		# Effective, not asked for: where the interrupt really goes.
		irq=$(nic_irqs "$nic" | head -n 1)
		echo "own $(<"/proc/irq/$irq/effective_affinity_list") $nic"
		echo "tx $nic $(tx_packets "$nic")"
		if [ -e "$SYS/$nic/bonding_slave/cpu_bound_stats" ]; then
			echo "policy $nic $(slave_stat "$nic" local) $(slave_stat "$nic" remote)"
		fi
	done
	xmit_trace show | awk '$2 ~ /^eth/ { print "xmit", $0 }'
}

case $1 in
start) start "$2" ;;
read) read_all ;;
esac
