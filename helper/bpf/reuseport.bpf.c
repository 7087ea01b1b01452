// SPDX-License-Identifier: GPL-2.0
/*
 * Reads SO_REUSEPORT groups from the kernel: which socket has which index, and the classic
 * program that picks one. Nothing else tells: the index is the order of listen() (TCP) or bind()
 * (UDP) until a member closes, whose place the last one then takes.
 * Userspace: src/steer/reuseport.rs.
 *
 * Only the members that are used are declared; the loader finds where the running kernel has
 * them.
 */
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct inode {
	unsigned long i_ino;
};

struct file {
	struct inode *f_inode;
};

struct socket {
	struct file *file;
};

struct sock_common {
	unsigned char skc_state;
	__u16 skc_num;
};

struct sock_fprog_kern {
	__u16 len;
	struct sock_filter *filter;
};

struct bpf_prog {
	struct sock_fprog_kern *orig_prog;
};

struct sock_reuseport {
	__u16 num_socks;
	unsigned int reuseport_id;
	struct bpf_prog *prog;
	struct sock *socks[];
};

struct sock {
	struct sock_common __sk_common;
	struct socket *sk_socket;
	struct sock_reuseport *sk_reuseport_cb;
};

/* A udp_sock begins with an inet_sock, which begins with a sock. */
struct udp_sock;

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
};
#pragma clang attribute pop

#define TCP_LISTEN 10

/* The port asked about. */
const volatile __u32 port = 0;

/*
 * One socket: its inode number, its group and its index there, and how many instructions of the
 * group's classic program follow.
 */
struct record {
	__u64 inode;
	__u32 group;
	__u16 index;
	__u16 filter;
};

/* In place of a group: the socket is in none; no more listeners follow. */
#define NO_GROUP 0xffffffff
#define END 0xfffffffe
#define NO_INDEX 0xffff

struct search {
	struct sock_reuseport *reuse;
	struct sock *sk;
	__u16 index;
};

static long is_member(__u32 index, struct search *search)
{
	struct sock *member = NULL;

	bpf_probe_read_kernel(&member, sizeof(member), &search->reuse->socks[index]);
	if (member != search->sk)
		return 0;
	search->index = index;
	return 1;
}

struct copy {
	struct seq_file *seq;
	struct sock_filter *filter;
};

static long copy_instruction(__u32 index, struct copy *copy)
{
	struct sock_filter instruction = {};

	bpf_probe_read_kernel(&instruction, sizeof(instruction), copy->filter + index);
	bpf_seq_write(copy->seq, &instruction, sizeof(instruction));
	return 0;
}

static void show(struct seq_file *seq, struct sock *sk)
{
	struct search search = { .sk = sk };
	struct record record = {};
	struct sock_fprog_kern *filter;
	struct sock_reuseport *reuse;

	/* None if the process has just closed it. */
	record.inode = BPF_CORE_READ(sk, sk_socket, file, f_inode, i_ino);
	record.group = NO_GROUP;
	reuse = BPF_CORE_READ(sk, sk_reuseport_cb);
	if (!reuse) {
		bpf_seq_write(seq, &record, sizeof(record));
		return;
	}
	search.reuse = reuse;
	search.index = NO_INDEX;
	bpf_loop(BPF_CORE_READ(reuse, num_socks), is_member, &search, 0);
	/* It is being opened or closed. */
	if (search.index == NO_INDEX)
		return;
	record.index = search.index;
	record.group = BPF_CORE_READ(reuse, reuseport_id);
	filter = BPF_CORE_READ(reuse, prog, orig_prog);
	if (filter)
		record.filter = BPF_CORE_READ(filter, len);
	bpf_seq_write(seq, &record, sizeof(record));
	if (record.filter) {
		struct copy copy = {
			.seq = seq,
			.filter = BPF_CORE_READ(filter, filter),
		};

		bpf_loop(record.filter, copy_instruction, &copy, 0);
	}
}

SEC("iter/tcp")
int cpubond_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct record end = { .group = END };

	if (!sk)
		return 0;
	/* Connections come after all listeners, and there may be very many. */
	if (BPF_CORE_READ(sk, skc_state) != TCP_LISTEN)
		bpf_seq_write(ctx->meta->seq, &end, sizeof(end));
	else if (BPF_CORE_READ(sk, skc_num) == port)
		show(ctx->meta->seq, (struct sock *)sk);
	return 0;
}

SEC("iter/udp")
int cpubond_udp(struct bpf_iter__udp *ctx)
{
	struct sock *sk = (struct sock *)ctx->udp_sk;

	if (sk && BPF_CORE_READ(sk, __sk_common.skc_num) == port)
		show(ctx->meta->seq, sk);
	return 0;
}

char _license[] SEC("license") = "GPL";
