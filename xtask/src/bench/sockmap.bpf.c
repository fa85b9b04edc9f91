/* What libsmc is compared with: sockmap. Connections of the loopback device within a cgroup are put into a map, and what is sent
 * on one goes straight to the receive queue of the other (Linux, Documentation/bpf/map_sockmap.rst).
 *
 * `cargo xtask bpf` makes sockmap.bpf.o of this.
 */
#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name) __attribute__((section(name), used))
#define NUMBER(name, value) int (*name)[value]

static long (*const sockets_update)(struct bpf_sock_ops *ops, void *map, void *key, __u64 flags) =
	(void *)BPF_FUNC_sock_hash_update;
static long (*const redirect)(struct sk_msg_md *msg, void *map, void *key, __u64 flags) =
	(void *)BPF_FUNC_msg_redirect_hash;

enum { AF_INET = 2, LOOPBACK = 0x0100007f /* 127.0.0.1, as it is on the wire */ };

struct ends {
	__u32 local;
	__u32 remote;
};

struct {
	NUMBER(type, BPF_MAP_TYPE_SOCKHASH);
	NUMBER(max_entries, 65536);
	struct ends *key;
	__u32 *value;
} sockets SEC(".maps");

SEC("sockops") int sockmap_ops(struct bpf_sock_ops *ops)
{
	/* Ports, in host order: of remote_port the upper half has it, as the kernel keeps it in network order. */
	struct ends key = { .local = ops->local_port, .remote = __builtin_bswap32(ops->remote_port) };

	if (ops->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && ops->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 0;
	if (ops->family == AF_INET && ops->local_ip4 == LOOPBACK && ops->remote_ip4 == LOOPBACK)
		sockets_update(ops, &sockets, &key, BPF_ANY);
	return 0;
}

SEC("sk_msg") int sockmap_msg(struct sk_msg_md *msg)
{
	/* Of the other end. */
	struct ends key = { .local = __builtin_bswap32(msg->remote_port), .remote = msg->local_port };

	redirect(msg, &sockets, &key, BPF_F_INGRESS);
	return 1; /* SK_PASS: where it is not known, by TCP. */
}

SEC("license") char sockmap_license[] = "MIT";
