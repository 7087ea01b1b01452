#!/bin/bash
# The switch's end of the LAG: bond0 of the stock driver, with addresses for eight
# clients, in place of what there is.
#
#   peer.sh MODE [HASH [COUNT]]   bonding mode (`none`: the bare NICs, up),
#                                 xmit_hash_policy, and over how many of the NICs (all)
set -e
shopt -s nullglob

mode=$1 hash=${2:-layer3+4}
nics=(/sys/class/net/eth?{,?})
nics=("${nics[@]:0:${3:-${#nics[@]}}}")

# As on the server, see tests/lib.sh: no queue that drops what had to wait.
sysctl -qw net.core.default_qdisc=pfifo

# Takes and counts the datagrams of send_from: no answer goes back.
nft -f - <<'NFT'
flush ruleset
table ip lab {
	chain sink {
		type filter hook input priority 0;
		udp dport 9 counter drop
	}
}
NFT

if [ "$mode" = none ]; then
	for dev in "${nics[@]}"; do
		ip link set "${dev##*/}" up
	done
	exit 0
fi

modprobe bonding max_bonds=0
[ ! -e /sys/class/net/bond0 ] || ip link del bond0
ip link add bond0 type bond mode "$mode" miimon 50 xmit_hash_policy "$hash"
[ "$mode" != 802.3ad ] || echo fast >/sys/class/net/bond0/bonding/lacp_rate
for dev in "${nics[@]}"; do
	ip link set "${dev##*/}" down
	ip link set "${dev##*/}" master bond0
done
ip link set bond0 address 52:54:00:00:02:00
ip addr add 10.0.0.2/24 dev bond0
for last in {11..18}; do
	ip addr add "10.0.0.$last/24" dev bond0
done
ip link set bond0 up
