// SPDX-License-Identifier: GPL-2.0
/*
 * Where each TCP flow through a bond's slaves is received, used and sent: CPU and
 * slave, counted per flow. Read by helper/src/audit/probe.rs, which has the same
 * structures. Nothing is judged here.
 *
 * A flow is known by its addresses and ports on the wire, seen from this host. The
 * application's calls know the socket only, whose local port differs behind NAT: the
 * sender's packets, which have both, tell which socket belongs to which flow.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_endian.h>

/* The macro names every argument of what is probed, needed or not. */
#pragma clang diagnostic ignored "-Wunused-parameter"

char LICENSE[] SEC("license") = "GPL";

/* --- what is read of the kernel's structures, found by its type information --- */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct net_device {
	int ifindex;
	possible_net_t nd_net;
};

struct in6_addr {
	union {
		__be32 u6_addr32[4];
	} in6_u;
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	unsigned char skc_state;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};

struct sock {
	struct sock_common __sk_common;
	__u16 sk_type;
};

struct sk_buff {
	struct sock *sk;
	struct net_device *dev;
	unsigned int len;
	unsigned int data_len;
	__u16 mac_header;
	unsigned char *head;
	unsigned char *data;
};

#pragma clang attribute pop

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define ETH_HLEN 14
#define VLAN_HLEN 4
#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define IPPROTO_TCP 6
#define TCP_TIME_WAIT 6
#define TCP_NEW_SYN_RECV 12
#define IP_OFFSET 0x1fff

/* --- what userspace reads ------------------------------------------------------ */

/* Addresses in network byte order, IPv4 as ::ffff:a.b.c.d; ports in the host's. */
struct key {
	__u32 local[4];
	__u32 remote[4];
	__u16 local_port;
	__u16 remote_port;
};

/* Where packets or calls were. A place is (ifindex << 32 | CPU + 1), 0 for none. */
struct hop {
	__u64 first;
	__u64 elsewhere;	/* the last that was not the first */
	__u64 total;
	__u64 other_cpu;	/* of these, on another CPU than the first */
	__u64 other_slave;	/* on its CPU, but by another slave */
};

#define SEEN_SYN_RX 1
#define SEEN_SYN_TX 2
#define SEEN_FIN_RX 4
#define SEEN_FIN_TX 8
#define SEEN_RST 16
#define SEEN_SOCKET 32

struct flow {
	struct hop rx;
	struct hop tx;
	struct hop app;
	__u64 rps;		/* packets that RPS had moved to another CPU's backlog */
	__u64 closed_ns;	/* when the last FIN or RST was seen, 0 if none */
	struct key socket;	/* as the socket has it; valid with SEEN_SOCKET */
	__u32 isn;		/* sequence number of the SYN */
	__u32 seen;
	__u32 pad;
};

/* A flow whose addresses and ports have come to be another connection's. */
struct ended {
	struct key key;
	__u32 pad;
	struct flow flow;
};

enum counter {
	RX_PACKETS,		/* TCP packets received by the slaves */
	TX_PACKETS,		/* sent by them */
	FLOWS,			/* entries made in `flows` */
	LOST_CONNECTIONS,	/* connections that found no room in it */
	LOST_PACKETS,		/* packets of flows that have no entry */
	LOST_SOCKETS,		/* flows behind NAT that found no room in `aliases` */
	UNPARSED,		/* headers that are fragmented, or not in the linear part */
	COUNTERS
};

/* Sizes are the loader's defaults; audit's --map-flows sets that of `flows`. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct key);
	__type(value, struct flow);
} flows SEC(".maps");

/* From the socket's addresses and ports to the wire's, where NAT makes them differ. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, struct key);
} aliases SEC(".maps");

/* The bonds' slaves, by ifindex. Filled last and emptied first: it is the switch. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u32);
} slaves SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* Whether this CPU is at work on what RPS passed on to it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} in_backlog SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} ended SEC(".maps");

/* With --stacks: kernel stacks that sent on another CPU than the flow's, counted. */
struct {
	__uint(type, BPF_MAP_TYPE_STACK_TRACE);
	__uint(max_entries, 1024);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, 48 * sizeof(__u64));
} stacks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u64);
} stack_counts SEC(".maps");

#define MAX_PORTS 8

/* ifindexes are of one network namespace; other ones have devices with the same. */
const volatile __u32 netns;
const volatile __u32 want_stacks;
/* Only flows with one of these ports at either end; 0 ends the list. */
const volatile __u16 ports[MAX_PORTS];

/* --- helpers ------------------------------------------------------------------- */

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += 1;
}

static __always_inline int ours(struct net_device *dev)
{
	__u32 ifindex = dev->ifindex;

	return bpf_map_lookup_elem(&slaves, &ifindex) && dev->nd_net.net->ns.inum == netns;
}

/* Several CPUs may do this for one flow at once. */
static __always_inline void note(struct hop *hop, __u32 ifindex)
{
	__u64 place = (__u64)ifindex << 32 | (bpf_get_smp_processor_id() + 1);
	__u64 first = hop->first;

	if (!first)
		first = __sync_val_compare_and_swap(&hop->first, 0, place);
	__sync_fetch_and_add(&hop->total, 1);
	if (!first || first == place)
		return;
	hop->elsewhere = place;
	if ((__u32)first != (__u32)place)
		__sync_fetch_and_add(&hop->other_cpu, 1);
	else
		__sync_fetch_and_add(&hop->other_slave, 1);
}

static __always_inline void saw(struct flow *flow, __u32 what)
{
	if (what & ~flow->seen)
		__sync_fetch_and_or(&flow->seen, what);
	if (what & (SEEN_FIN_RX | SEEN_FIN_TX | SEEN_RST))
		flow->closed_ns = bpf_ktime_get_ns();
}

static __always_inline void set_ipv4(__u32 *to, __be32 address)
{
	to[0] = 0;
	to[1] = 0;
	to[2] = bpf_htonl(0xffff);
	to[3] = address;
}

struct ipv4_header {
	__u8 version_ihl;
	__u8 tos;
	__be16 length, id, offset;
	__u8 ttl, protocol;
	__u16 check;
	__be32 source, destination;
};

struct ipv6_header {
	__be32 version_class_label;
	__be16 length;
	__u8 next, hops;
	__be32 source[4], destination[4];
};

struct tcp_header {
	__be16 source, destination;
	__be32 sequence, acknowledged;
	__u8 offset, flags;
};

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

struct packet {
	struct key key;
	__u32 sequence;
	__u8 flags;
};

static __always_inline int wanted(const struct key *key)
{
	if (!ports[0])
		return 1;
	for (int i = 0; i < MAX_PORTS && ports[i]; i++)
		if (ports[i] == key->local_port || ports[i] == key->remote_port)
			return 1;
	return 0;
}

/*
 * Take a TCP packet's addresses, ports and flags from its headers, which start at
 * @eth. Returns 0 if there are none, or it is not wanted.
 */
static __always_inline int parse(struct sk_buff *skb, unsigned char *eth, int received,
				 struct packet *packet)
{
	unsigned char *end = skb->data + (skb->len - skb->data_len), *at = eth + ETH_HLEN;
	struct key *key = &packet->key;
	struct tcp_header tcp;
	__be16 protocol = 0;

	bpf_probe_read_kernel(&protocol, sizeof(protocol), at - 2);
	/* A tag that the device has taken off is not in the way. */
	for (int tags = 0; tags < 2; tags++) {
		if (protocol != bpf_htons(ETH_P_8021Q) && protocol != bpf_htons(ETH_P_8021AD))
			break;
		at += VLAN_HLEN;
		bpf_probe_read_kernel(&protocol, sizeof(protocol), at - 2);
	}

	if (protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4_header ip;

		if (at + sizeof(ip) > end)
			goto unparsed;
		if (bpf_probe_read_kernel(&ip, sizeof(ip), at) || ip.protocol != IPPROTO_TCP)
			return 0;
		if (ip.offset & bpf_htons(IP_OFFSET))
			goto unparsed;
		set_ipv4(key->local, received ? ip.destination : ip.source);
		set_ipv4(key->remote, received ? ip.source : ip.destination);
		at += (ip.version_ihl & 15) * 4;
	} else if (protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6_header ip;

		if (at + sizeof(ip) > end)
			goto unparsed;
		if (bpf_probe_read_kernel(&ip, sizeof(ip), at) || ip.next != IPPROTO_TCP)
			return 0;
		__builtin_memcpy(key->local, received ? ip.destination : ip.source, 16);
		__builtin_memcpy(key->remote, received ? ip.source : ip.destination, 16);
		at += sizeof(ip);
	} else {
		return 0;
	}

	if (at + sizeof(tcp) > end)
		goto unparsed;
	if (bpf_probe_read_kernel(&tcp, sizeof(tcp), at))
		goto unparsed;
	key->local_port = bpf_ntohs(received ? tcp.destination : tcp.source);
	key->remote_port = bpf_ntohs(received ? tcp.source : tcp.destination);
	packet->sequence = bpf_ntohl(tcp.sequence);
	packet->flags = tcp.flags;
	return wanted(key);

unparsed:
	count(UNPARSED);
	return 0;
}

/* The flow's entry; NULL if there is no room. A SYN that is not the flow's own makes
 * it the flow of a new connection, and what was counted up to now is handed over.
 */
static __always_inline struct flow *flow_of(const struct packet *packet, int received)
{
	int opens = (packet->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	__u32 syn = received ? SEEN_SYN_RX : SEEN_SYN_TX;
	struct flow *flow = bpf_map_lookup_elem(&flows, &packet->key);
	struct flow empty = {};

	if (flow && opens && (flow->isn != packet->sequence || !(flow->seen & syn))) {
		struct ended *event = bpf_ringbuf_reserve(&ended, sizeof(*event), 0);

		if (event) {
			event->key = packet->key;
			event->pad = 0;
			event->flow = *flow;
			bpf_ringbuf_submit(event, 0);
		} else {
			count(LOST_CONNECTIONS);
		}
		*flow = empty;
	} else if (!flow) {
		/* Another CPU may be doing the same: there is one entry, and it is looked up. */
		if (!bpf_map_update_elem(&flows, &packet->key, &empty, BPF_NOEXIST))
			count(FLOWS);
		flow = bpf_map_lookup_elem(&flows, &packet->key);
		if (!flow) {
			count(LOST_PACKETS);
			if (opens)
				count(LOST_CONNECTIONS);
			return NULL;
		}
	} else {
		opens = 0;
	}
	if (opens) {
		flow->isn = packet->sequence;
		saw(flow, syn);
	}
	return flow;
}

/* Works for what is a socket by its first part only: requests, TIME_WAIT. */
static __always_inline int socket_key(struct sock *sk, struct key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->local_port = sk->__sk_common.skc_num;
	key->remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
	switch (sk->__sk_common.skc_family) {
	case AF_INET:
		set_ipv4(key->local, sk->__sk_common.skc_rcv_saddr);
		set_ipv4(key->remote, sk->__sk_common.skc_daddr);
		return 1;
	case AF_INET6:
		for (int i = 0; i < 4; i++) {
			key->local[i] = sk->__sk_common.skc_v6_rcv_saddr.in6_u.u6_addr32[i];
			key->remote[i] = sk->__sk_common.skc_v6_daddr.in6_u.u6_addr32[i];
		}
		return 1;
	}
	return 0;
}

/* By hand: for memcmp() clang calls a function that is not there. */
static __always_inline int same(const struct key *a, const struct key *b)
{
	for (int i = 0; i < 4; i++)
		if (a->local[i] != b->local[i] || a->remote[i] != b->remote[i])
			return 0;
	return a->local_port == b->local_port && a->remote_port == b->remote_port;
}

/* Resets go out by a socket of the kernel's own, which is nobody's connection. */
static __always_inline int is_connection(struct sock *sk)
{
	unsigned char state = sk->__sk_common.skc_state;

	return state == TCP_NEW_SYN_RECV || state == TCP_TIME_WAIT || sk->sk_type == SOCK_STREAM;
}

/* --- probes -------------------------------------------------------------------- */

/* The stack takes a packet: after GRO, on the CPU that RPS chose, still the slave's. */
SEC("tp_btf/netif_receive_skb")
int BPF_PROG(audit_rx, struct sk_buff *skb)
{
	struct net_device *dev = skb->dev;
	struct packet packet = {};
	__u32 *backlog, zero = 0;
	struct flow *flow;
	__u32 seen = 0;

	if (!ours(dev) || !parse(skb, skb->head + skb->mac_header, 1, &packet))
		return 0;
	count(RX_PACKETS);
	flow = flow_of(&packet, 1);
	if (!flow)
		return 0;
	note(&flow->rx, dev->ifindex);
	backlog = bpf_map_lookup_elem(&in_backlog, &zero);
	if (backlog && *backlog)
		__sync_fetch_and_add(&flow->rps, 1);
	if (packet.flags & TCP_FIN)
		seen |= SEEN_FIN_RX;
	if (packet.flags & TCP_RST)
		seen |= SEEN_RST;
	saw(flow, seen);
	return 0;
}

SEC("fentry/process_backlog")
int BPF_PROG(audit_backlog)
{
	__u32 zero = 0, *backlog = bpf_map_lookup_elem(&in_backlog, &zero);

	if (backlog)
		*backlog = 1;
	return 0;
}

SEC("fexit/process_backlog")
int BPF_PROG(audit_backlog_done)
{
	__u32 zero = 0, *backlog = bpf_map_lookup_elem(&in_backlog, &zero);

	if (backlog)
		*backlog = 0;
	return 0;
}

/* The slave's driver takes a packet, on the CPU that gives it. */
SEC("tp_btf/net_dev_start_xmit")
int BPF_PROG(audit_tx, struct sk_buff *skb, struct net_device *dev)
{
	struct packet packet = {};
	struct flow *flow;
	struct sock *sk;
	__u32 seen = 0;

	if (!ours(dev) || !parse(skb, skb->data, 0, &packet))
		return 0;
	count(TX_PACKETS);
	flow = flow_of(&packet, 0);
	if (!flow)
		return 0;
	note(&flow->tx, dev->ifindex);
	if (packet.flags & TCP_FIN)
		seen |= SEEN_FIN_TX;
	if (packet.flags & TCP_RST)
		seen |= SEEN_RST;

	sk = skb->sk;
	if (sk && !(flow->seen & SEEN_SOCKET) && is_connection(sk)) {
		struct key socket;

		if (socket_key(sk, &socket)) {
			seen |= SEEN_SOCKET;
			flow->socket = socket;
			if (!same(&socket, &packet.key) &&
			    bpf_map_update_elem(&aliases, &socket, &packet.key, BPF_ANY))
				count(LOST_SOCKETS);
		}
	}
	saw(flow, seen);

	if (want_stacks && flow->rx.first && (__u32)flow->rx.first != bpf_get_smp_processor_id() + 1) {
		long id = bpf_get_stackid(ctx, &stacks, 0);
		__u32 stack = id;
		__u64 one = 1, *times;

		if (id < 0)
			return 0;
		times = bpf_map_lookup_elem(&stack_counts, &stack);
		if (times)
			__sync_fetch_and_add(times, 1);
		else
			bpf_map_update_elem(&stack_counts, &stack, &one, BPF_NOEXIST);
	}
	return 0;
}

/* The application uses a connection. On return: a call that slept may wake elsewhere. */
static __always_inline int used(struct sock *sk)
{
	struct key key, *wire;
	struct flow *flow;

	if (!socket_key(sk, &key))
		return 0;
	flow = bpf_map_lookup_elem(&flows, &key);
	if (!flow) {
		wire = bpf_map_lookup_elem(&aliases, &key);
		if (!wire)
			return 0;
		flow = bpf_map_lookup_elem(&flows, wire);
	}
	if (flow)
		note(&flow->app, 0);
	return 0;
}

SEC("fexit/inet_csk_accept")
int BPF_PROG(audit_accept, struct sock *listener, void *arg, struct sock *sk)
{
	return sk ? used(sk) : 0;
}

SEC("fexit/tcp_recvmsg")
int BPF_PROG(audit_receive, struct sock *sk, void *msg, unsigned long len, int flags, int done)
{
	return done < 0 ? 0 : used(sk);
}

/* Under sendmsg, sendfile and TLS alike. */
SEC("fexit/tcp_sendmsg_locked")
int BPF_PROG(audit_send, struct sock *sk, void *msg, unsigned long size, int done)
{
	return done < 0 ? 0 : used(sk);
}
