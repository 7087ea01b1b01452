// SPDX-License-Identifier: GPL-2.0
/*
 * Gives a new connection to the listener of the CPU that received it.
 *
 * The kernel runs this in softirq, on the CPU that handles the SYN, before it looks for a
 * listener. The connection keeps the public port, whatever port the listener is bound to.
 * Userspace: src/steer/sk_lookup.rs.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>

#define AF_INET6 10

/* CPUs whose daemons take the connections of one CPU, nearest first, then NONE. */
#define CANDIDATES 64
#define NONE 0xffff

struct row {
	__u16 cpus[CANDIDATES];
};

/* The public port. */
const volatile __u32 port = 0;

/*
 * The listeners: of CPU k for IPv4 at 2 * k, for IPv6 at 2 * k + 1. The kernel takes out one
 * that stops listening. To userspace a value of 8 bytes is a file descriptor when written and
 * the socket's cookie when read.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} listeners SEC(".maps");

/* One table of a row a CPU, replaced as a whole. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_ARRAY);
		__uint(map_flags, BPF_F_INNER_MAP);
		__uint(max_entries, 1);
		__uint(key_size, sizeof(__u32));
		__uint(value_size, sizeof(struct row));
	});
} tables SEC(".maps");

SEC("sk_lookup")
int cpubond_lookup(struct bpf_sk_lookup *ctx)
{
	__u32 first = 0, cpu = bpf_get_smp_processor_id();
	struct row *row;
	void *table;
	int i;

	if (ctx->protocol != IPPROTO_TCP || ctx->local_port != port)
		return SK_PASS;
	table = bpf_map_lookup_elem(&tables, &first);
	if (!table)
		return SK_PASS;
	row = bpf_map_lookup_elem(table, &cpu);
	if (!row)
		return SK_PASS;

	for (i = 0; i < CANDIDATES; i++) {
		__u32 slot = row->cpus[i];
		struct bpf_sock *sk;
		long refused;

		if (slot == NONE)
			break;
		slot *= 2;
		if (ctx->family == AF_INET6)
			slot++;
		/* It has just died, and userspace does not know yet: the next. */
		sk = bpf_map_lookup_elem(&listeners, &slot);
		if (!sk)
			continue;
		refused = bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
		if (!refused)
			break;
	}
	/* With none assigned the kernel goes on as if there were no program. */
	return SK_PASS;
}

char _license[] SEC("license") = "GPL";
