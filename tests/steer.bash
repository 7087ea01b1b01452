# shellcheck shell=bash
# What the tests of steering share: daemons that log whom they served, connections from
# eight addresses, and where each was received. Sourced after lib.sh.
#
# The kernel notes on which CPU each SYN for the public port came in (an nftables set
# without connection tracking), the daemon of each CPU whom it served.

STEER=/tmp/steer
PUBLIC=80
SERVER_IP6=fd00::1
# Each client has an address of both families: 10.0.0.11..18, fd00::11..18.
CLIENTS=({11..18})
# Connections of each at a time.
AT_ONCE=2

# steer_up: a bond whose slave K is received on CPU K, both families.
steer_up() {
	rm -rf "$STEER"
	mkdir "$STEER"
	bind_irqs
	bond_up cpu_bound
	sysctl -qw "net.ipv6.conf.$BOND.disable_ipv6=0" "net.ipv6.conf.$BOND.accept_dad=0"
	ip addr add "$SERVER_IP6/64" dev "$BOND" nodad
	peer_do "sysctl -qw net.ipv6.conf.bond0.disable_ipv6=0 net.ipv6.conf.bond0.accept_dad=0
		for last in ${CLIENTS[*]}; do ip addr add fd00::\$last/64 dev bond0 nodad; done"
	wait_for 10 peer_do "ping -q -c 1 -W 1 $SERVER_IP && ping -q -c 1 -W 1 $SERVER_IP6"
}

# nginx_conf FILE LISTEN...: for one instance, `{cpu}` and `{port}` to be filled in.
nginx_conf() {
	local file=$1 listen dir
	shift
	{
		echo "daemon off; user root; worker_processes 1; pid $STEER/pid.{cpu}; error_log $STEER/error.{cpu};"
		echo "events { worker_connections 512; }"
		echo "http {"
		for dir in client_body proxy fastcgi uwsgi scgi; do
			echo "${dir}_temp_path $STEER/$dir.{cpu};"
		done
		echo "log_format who '\$remote_addr \$remote_port';"
		echo "access_log $STEER/served.{cpu} who;"
		echo "server {"
		for listen; do echo "listen $listen;"; done
		echo "return 200 '{cpu}'; } }"
	} >"$file"
}

# open_received: where connections come in is noted from here.
open_received() {
	nft -f - <<-NFT
		table inet received
		delete table inet received
		table inet received {
			set v4 { typeof ip saddr . th sport . meta cpu; flags dynamic; size 65536; }
			set v6 { typeof ip6 saddr . th sport . meta cpu; flags dynamic; size 65536; }
			chain in {
				type filter hook prerouting priority -400;
				tcp dport $PUBLIC tcp flags & (syn | ack) == syn jump note
				udp dport $PUBLIC jump note
			}
			chain note {
				meta nfproto ipv4 update @v4 { ip saddr . th sport . meta cpu }
				meta nfproto ipv6 update @v6 { ip6 saddr . th sport . meta cpu }
			}
		}
	NFT
	: | tee "$STEER"/served.* >/dev/null
}

# judge: "SERVED LOCAL ELSEWHERE" of those that were served since open_received.
judge() {
	local set log
	for set in v4 v6; do
		nft -j list set inet received "$set" |
			jq -r '.nftables[].set.elem[]? | (.elem.val? // .) | .concat | join(" ")'
	done >"$STEER/received"
	for log in "$STEER"/served.*; do
		sed "s/\$/ ${log##*.}/" "$log"
	done >"$STEER/served"
	awk 'FNR == NR { cpu[$1, $2] = $3; next }
		{ n++ }
		($1, $2) in cpu && cpu[$1, $2] == $3 { local++ }
		END { print n + 0, local + 0, n - local }' "$STEER/received" "$STEER/served"
}

# load COUNT [ADDRESS]: so many connections from each client, one request each, all
# clients at once. Prints "ANSWERED FAILED REFUSED SILENT" in all. Not by ab: it loses
# count of its own connections when servers die, and waits for one that is long reset.
load() {
	local count=$1 to=$SERVER_IP from
	from=$(from 10.0.0.)
	[ $# = 1 ] || to="[$2]" from=$(from fd00::)
	peer_do "cpubond bench ask --to $to:$PUBLIC --from $from --requests $count \
		--at-once $AT_ONCE --bytes 1 --patience 30" >"$STEER/asked"
	jq -r '[.complete, .failed, .refused, .silent] | join(" ")' "$STEER/asked"
}

# from PREFIX: the clients' addresses, a list with commas.
from() { local last all=; for last in "${CLIENTS[@]}"; do all+=,$1$last; done; echo "${all#,}"; }

# all_local COUNT [ADDRESS]: COUNT connections a client, none failed, every one served on
# the CPU that received it, and each CPU had some.
all_local() {
	local complete failed served here there cpu
	open_received
	load "$@" | read -r complete failed _
	check_eq "failed connections" "$failed" 0
	check_eq "connections" "$complete" $((${#CLIENTS[@]} * $1))
	judge | read -r served here there
	check_eq "connections that were served" "$served" "$complete"
	check_eq "connections served on another CPU than received them" "$there" 0
	for cpu in 0 1 2 3; do
		check_ge "connections served on CPU $cpu" "$(wc -l <"$STEER/served.$cpu")" 1
	done
	note "$here of $served connections to ${2:-$SERVER_IP} served on the CPU that received them"
}

# run_service METHOD: an nginx a CPU behind the public port, until it is steered.
run_service() {
	local cpu
	for cpu in 0 1 2 3; do
		sed "s/{cpu}/$cpu/g; s/{port}/$([ "$1" = reuseport ] && echo $PUBLIC || echo $((8000 + cpu)))/g" \
			"$STEER/conf" >"$STEER/conf.$cpu"
	done
	cpubond run --name web --port $PUBLIC --steer "$1" -- nginx -c "$STEER/conf.{cpu}" \
		<&- >"$STEER/log" 2>&1 &
	echo $! >"$STEER/supervisor"
	wait_for 60 steered
	cat "$STEER/log"
}

# daemons: "CPU STATE PID RESTARTS" a line, by the supervisor's own account.
daemons() {
	jq -r '.daemons[] | [.cpu, .phase, .pid, .restarts] | join(" ")' /run/cpubond/steer/web.json
}

# steered: all are live by both families, and the kernel has the table that sends each
# CPU's to its own.
steered() {
	[ "$(daemons | grep -c live)" = 4 ] &&
		[ "$(jq -r '[.table[].sockets | length] | join(" ")' /run/cpubond/steer/web.json)" = "2 2 2 2" ] &&
		cpubond steer list web >/dev/null &&
		[ "$(jq -r '[.table[].cpu] | join(" ")' /run/cpubond/steer/web.json)" = "0 1 2 3" ]
}

# daemon_of CPU: the processes of its nginx, master and worker.
daemon_of() {
	pgrep -f "conf[.]$1( |\$)" | while read -r pid; do pgrep -P "$pid"; echo "$pid"; done |
		sort -u | while read -r pid; do [ "$(cat "/proc/$pid/comm")" != nginx ] || echo "$pid"; done
}

# killed CPU: its daemon dies, master, worker and all, at once.
killed() {
	local pids
	pids=$(daemon_of "$1")
	[ -n "$pids" ] || fail "CPU $1 has no daemon to kill"
	# One may be gone by itself already, after the other.
	# shellcheck disable=SC2086 # a list of words
	kill -9 $pids || :
}

# back CPU RESTARTS: its daemon is live again, after so many restarts.
back() { daemons | grep -q "^$1 live [0-9]* $2\$" && steered; }

# under_load DO...: connections all the while, then what became of each: none may be
# refused, and none left without a word; what the daemon had in hand when it was killed
# is reset.
under_load() {
	local complete failed refused silent served here there
	open_received
	load 150 >"$STEER/result" &
	until [ "$(cat "$STEER"/served.* | wc -l)" -ge 100 ]; do sleep 0.1; done
	"$@"
	wait $!
	read -r complete failed refused silent <"$STEER/result"
	judge | read -r served here there
	note "$complete connections answered, $failed not: $(jq -r '.why // "-"' "$STEER/asked"); $there of $served served on another CPU"
	check_eq "connections" $((complete + failed)) $((${#CLIENTS[@]} * 150))
	check_eq "refused connections" "$refused" 0
	check_eq "connections that heard nothing more" "$silent" 0
	# A daemon may be killed when it has answered, before it has logged that.
	check_ge "connections that were served" "$served" $((complete - RESET_AT_MOST))
	check_le "connections reset with the daemon" "$failed" "$RESET_AT_MOST"
}

# ended: the service stops on SIGTERM, if it has not ended yet; nothing of it is left.
ended() {
	local pid
	pid=$(<"$STEER/supervisor")
	kill "$pid" || :
	wait_for 30 eval "! kill -0 $pid"
	tail -3 "$STEER/log"
	! pgrep -x nginx || fail "nginx is still there"
	[ ! -e /run/cpubond/steer/web.json ] || fail "the state is still there"
	check_eq "left of BPF links" "$(bpftool -j link | jq length)" 0
	check_eq "left of BPF programs of ours" "$(bpftool -j prog | jq '[.[] | select(.name // "" | startswith("cpubond"))] | length')" 0
	check_eq "left in the BPF file system" "$(find /sys/fs/bpf -mindepth 1 | wc -l)" 0
}

# --- cases -----------------------------------------------------------------

local4() { all_local 25; }
local6() { all_local 25 "$SERVER_IP6"; }

kill_one() {
	under_load killed 2
	wait_for 30 back 2 1
	all_local 10
}

drained() {
	local before complete failed served here there
	before=$(cpubond steer list -j web | jq -c '.services[0].daemons | map(.pid)')
	cpubond steer drain web 1
	open_received
	load 10 | read -r complete failed _
	judge | read -r served here there
	check_eq "failed connections" "$failed" 0
	check_eq "connections served by the drained daemon" "$(wc -l <"$STEER/served.1")" 0
	check_ge "its CPU's connections, served by others" "$there" 1
	cpubond steer undrain web 1
	wait_for 10 steered
	check_eq "daemons" "$(cpubond steer list -j web | jq -c '.services[0].daemons | map(.pid)')" "$before"
	all_local 10 "$SERVER_IP6"
}

storm() {
	local cpu
	storm_of() {
		for _ in 1 2 3; do
			for cpu in 0 1 2; do killed "$cpu"; done
			wait_for 60 steered
		done
	}
	RESET_AT_MOST=150
	under_load storm_of
	wait_for 60 steered
	all_local 10
}
