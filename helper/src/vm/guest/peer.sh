#!/bin/bash
# The switch's end of the LAG: bond0 of the stock driver over all NICs, in the mode
# given (`none`: the bare NICs, up), with addresses for eight clients.
set -e

mode=$1

# Takes and counts the datagrams of send_from: no answer goes back.
nft -f - <<'NFT'
table ip lab {
	chain sink {
		type filter hook input priority 0;
		udp dport 9 counter drop
	}
}
NFT

if [ "$mode" = none ]; then
	for dev in /sys/class/net/eth*; do
		ip link set "${dev##*/}" up
	done
	exit 0
fi

modprobe bonding max_bonds=0
ip link add bond0 type bond mode "$mode" miimon 50 xmit_hash_policy layer3+4
[ "$mode" != 802.3ad ] || echo fast >/sys/class/net/bond0/bonding/lacp_rate
for dev in /sys/class/net/eth*; do
	ip link set "${dev##*/}" down
	ip link set "${dev##*/}" master bond0
done
ip link set bond0 address 52:54:00:00:02:00
ip addr add 10.0.0.2/24 dev bond0
for last in {11..18}; do
	ip addr add "10.0.0.$last/24" dev bond0
done
ip link set bond0 up
