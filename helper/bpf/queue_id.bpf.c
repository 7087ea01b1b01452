// SPDX-License-Identifier: GPL-2.0
/*
 * Has a bond send by the slave whose queue_id is that of the CPU: CPU k, shifted right, takes
 * queue_id k + 1. The nearest that a stock bond comes to cpu_bound.
 *
 * Userspace: src/bench/queue_id.rs.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

/* CPUs to a slave, as a power of two. */
const volatile __u32 shift = 0;

SEC("classifier")
int cpubond_queue_id(struct __sk_buff *skb)
{
	/* 0 is "none"; bond_select_queue() takes one off, and queue_ids start at 1. */
	skb->queue_mapping = (bpf_get_smp_processor_id() >> (shift & 31)) + 2;
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "GPL";
