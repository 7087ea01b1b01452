#!/bin/bash
# The server, set up as is usual or as in the paper, behind one address and port; and
# what becomes of each request.
#
#   setup.sh start usual none CPUS BYTES
#       eth0 alone, its interrupt on CPU 0; one lighttpd, one listener, CPUS workers,
#       which run where the scheduler has them
#   setup.sh start cpu_bound nat|sk_lookup|reuseport CPUS BYTES
#       a bond of as many NICs, each NIC's interrupt and one pinned server on a CPU of
#       its own: `cpubond up`, `cpubond run --steer`. The server is lighttpd; under
#       reuseport nginx, for lighttpd does not set SO_REUSEPORT
#   setup.sh start balance-rr|balance-xor none CPUS BYTES
#       the same bond in a stock mode; pinned nginx servers that share the port by
#       SO_REUSEPORT, and the kernel's hash says whose a connection is
#   setup.sh start multiqueue reuseport CPUS BYTES
#       eth0 alone, with a queue pair for each CPU, interrupts and XPS by CPU; the
#       servers as for cpu_bound reuseport
#   setup.sh audit       from here on each connection is followed by `cpubond audit`
#   setup.sh audited     once all are closed: what it says, as JSON
#   setup.sh accepted    connections that the kernel has accepted since boot
#   setup.sh open        connections that are open, with their timers and queues
#   setup.sh stop        all of it is gone again
#
# Both serve BYTES bytes at http://10.0.0.1:80/ from CPUs 0 to CPUS - 1.
set -eu
. /cpubond/tests/lib.sh
set -o pipefail

DIR=/tmp/setup
PORT=80
SERVICE=web

# What is wrong is for the host to see, with what the servers said last.
note() { printf '%s\n' "$*" >&2; }
trap '[ $? = 0 ] || tail -qn 3 "$DIR"/*.log >&2 2>/dev/null' EXIT

# first COUNT: so many NICs.
first() { nics | cut -d ' ' -f "1-$1"; }

lighttpd_conf() {
	cat <<-CONF
		server.document-root = "$DIR/www"
		server.port = $1
		server.errorlog = "$DIR/lighttpd.log"
		index-file.names = ("index.html")
		$2
	CONF
}

nginx_conf() {
	local dir
	cat <<-CONF
		daemon off; user root; worker_processes 1; pid $DIR/nginx.$1; error_log $DIR/nginx.log;
		events { worker_connections 512; }
		http {
			access_log off;
			server { listen $PORT reuseport; root $DIR/www; }
	CONF
	for dir in client_body proxy fastcgi uwsgi scgi; do
		echo "${dir}_temp_path $DIR/$dir.$1;"
	done
	echo "}"
}

start_usual() {
	local cpus=$2
	bind_irq eth0 0
	ip addr add "$SERVER_IP/24" dev eth0
	ip link set eth0 up
	lighttpd_conf "$PORT" "server.max-worker = $cpus" >"$DIR/conf"
	taskset -c "0-$((cpus - 1))" lighttpd -f "$DIR/conf"
}

start_cpu_bound() {
	local steer=$1 cpus=$2
	# shellcheck disable=SC2046 # a list of words
	cpubond up "$BOND" $(first "$cpus") --cpus "0-$((cpus - 1))" --address "$SERVER_IP/24"
	serve "$steer" "$cpus"
}

# balance MODE CPUS: all as for cpu_bound, but nobody looks at CPUs.
balance() {
	local mode=$1 cpus=$2 cpu
	# shellcheck disable=SC2046 # a list of words
	cpubond up "$BOND" $(first "$cpus") --mode "$mode" --cpus "0-$((cpus - 1))" --address "$SERVER_IP/24"
	for ((cpu = 0; cpu < cpus; cpu++)); do
		nginx_conf "$cpu" >"$DIR/conf.$cpu"
		setsid taskset -c "$cpu" nginx -c "$DIR/conf.$cpu" </dev/null >>"$DIR/run.log" 2>&1 &
	done
	wait_for 60 listening "$cpus"
}

# listening COUNT: so many sockets have the port.
listening() { [ "$(ss -Htln "sport = :$PORT" | wc -l)" = "$1" ]; }

start_multiqueue() {
	local steer=$1 cpus=$2 queue irq dev
	dev=$(basename "$(readlink "$SYS/eth0/device")")
	for ((queue = 0; queue < cpus; queue++)); do
		awk -v dev="$dev-" -v queue=".$queue" '
				$NF == dev "input" queue || $NF == dev "output" queue { print +$1 }' /proc/interrupts |
			while read -r irq; do
				echo "$queue" >"/proc/irq/$irq/smp_affinity_list"
			done
		# A NIC of one queue has nothing to choose.
		[ "$cpus" = 1 ] || printf '%x\n' "$((1 << queue))" >"$SYS/eth0/queues/tx-$queue/xps_cpus"
	done
	[ "$(find "$SYS/eth0/queues" -name 'rx-*' | wc -l)" = "$cpus" ] || fail "eth0 has not a queue for each CPU"
	ip addr add "$SERVER_IP/24" dev eth0
	ip link set eth0 up
	serve "$steer" "$cpus"
}

# serve STEER CPUS: a pinned server on each CPU, each given what its CPU receives.
serve() {
	local steer=$1 cpus=$2 list cpu server
	list=0-$((cpus - 1))
	server="lighttpd -D -f"
	[ "$steer" != reuseport ] || server="nginx -c"
	for ((cpu = 0; cpu < cpus; cpu++)); do
		case $server in
		nginx*) nginx_conf "$cpu" ;;
		*) lighttpd_conf "$((8000 + cpu))" "" ;;
		esac >"$DIR/conf.$cpu"
	done
	# shellcheck disable=SC2086 # a list of words
	cpubond run --name "$SERVICE" --port "$PORT" --cpus "$list" --steer "$steer" -- \
		$server "$DIR/conf.{cpu}" </dev/null >"$DIR/run.log" 2>&1 &
	wait_for 60 steered "$cpus"
	# An entry outlives its connection by two minutes.
	[ "$steer" != nat ] || sysctl -qw net.netfilter.nf_conntrack_max=262144
}

# steered COUNT: so many daemons, each live and given what its own CPU receives, and the
# kernel's tables are as they should be.
steered() {
	local live
	live=$(cpubond steer list -j "$SERVICE" |
		jq '[.services[].daemons[] | select(.phase == "live" and .takes == (.cpu | tostring))] | length') &&
		[ "$live" = "$1" ]
}

start() {
	local setup=$1 steer=$2 cpus=$3 bytes=$4
	rm -rf "$DIR"
	mkdir -p "$DIR/www"
	head -c "$bytes" /dev/zero | tr '\0' x >"$DIR/www/index.html"
	case $setup in
	balance-*) balance "$setup" "$cpus" ;;
	*) "start_$setup" "$steer" "$cpus" ;;
	esac
	wait_for 20 ping -q -c 1 -W 1 "$PEER_IP"
	xmit_trace on
}

audit() {
	local of=eth0
	[ ! -e "$SYS/$BOND" ] || of=$BOND
	cpubond audit "$of" --port "$PORT" --duration 1h --json </dev/null \
		>"$DIR/audit.json" 2>"$DIR/audit.log" &
	echo $! >"$DIR/audit.pid"
	wait_for 30 grep -q watching "$DIR/audit.log"
}

audited() {
	local pid
	pid=$(<"$DIR/audit.pid")
	wait_for 30 closed
	kill -TERM "$pid"
	wait_for 30 eval "! kill -0 $pid"
	cat "$DIR/audit.json"
}

# closed: no connection is open, but for the wait after its end.
closed() {
	local open
	open=$(open) && [ -z "$open" ]
}

open() { ss -Htnoip state connected exclude time-wait; }

# PassiveOpens, found by its name.
accepted() {
	awk '$1 == "Tcp:" && !n { for (n = NF; $n != "PassiveOpens"; n--); next }
		$1 == "Tcp:" { print $n }' /proc/net/snmp
}

stop() {
	if [ -n "$(cpubond steer list -j | jq -r '.services[].name')" ]; then
		cpubond steer del "$SERVICE"
	else
		pkill -x 'lighttpd|nginx'
		wait_for 10 eval "! pgrep -x 'lighttpd|nginx'"
	fi
	if [ -e "$SYS/$BOND" ]; then
		cpubond down "$BOND"
	else
		ip link set eth0 down
		ip addr flush dev eth0
	fi
	xmit_trace off
}

case $1 in
start) start "$2" "$3" "$4" "$5" ;;
audit | audited | accepted | open | stop) "$1" ;;
*) fail "setup.sh: want start, audit, audited, accepted, open or stop" ;;
esac
