/* The TCP option that says "SMC" (RFC 7609 section 3.1), for sockets whose program asks for it.
 *
 * Two programs on a cgroup, and what they know of a socket between them:
 *
 *   setsockopt(SOL_SMC, OFFER)      by libsmc.so, before connect and listen         -> OFFERS
 *   connect                         OFFERS -> ASKED, the SYN has the option
 *   SYN-ACK with the option         ASKED -> HEARD; without it: NOTHING
 *   listen                          OFFERS -> LISTENS, and so are the sockets that it accepts
 *   SYN with the option             answered with it, if the listener's port is awake; the new socket is HEARD
 *   setsockopt(SOL_SMC, ASK)        by libsmc.so, before the first byte: succeeds once, if HEARD -> NOTHING
 *   setsockopt(SOL_SMC, TAKE)       as ASK, by who will not speak SMC but has to decline it
 *
 * A listener's port is awake once ASK was heard for a connection that came from it: a program that hands its
 * connections to another, which knows nothing of SMC, never does. So whoever is promised SMC finds somebody who takes
 * the promise.
 *
 * What was promised can't be taken back. So a SYN-ACK has the option only where the SYN is kept, by which the new socket
 * finds out (no SYN cookies); a port that falls asleep counts as awake for connections that were begun before.
 *
 * Neither program changes anything for another socket or another option: the option's length is set to 0, by which the
 * kernel takes the caller's own bytes.
 *
 * `cargo xtask bpf` makes option.bpf.o of this.
 */
#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define NUMBER(name, value) int (*name)[value]

static void *(*const map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const map_update)(void *map, const void *key, const void *value, __u64 flags) =
	(void *)BPF_FUNC_map_update_elem;
static __u64 (*const now)(void) = (void *)BPF_FUNC_ktime_get_ns;
static long (*const set_option)(void *ctx, int level, int name, void *value, int len) = (void *)BPF_FUNC_setsockopt;
static long (*const get_option)(void *ctx, int level, int name, void *value, int len) = (void *)BPF_FUNC_getsockopt;
static long (*const set_flags)(struct bpf_sock_ops *ctx, int flags) = (void *)BPF_FUNC_sock_ops_cb_flags_set;
static __u32 *(*const storage)(void *map, struct bpf_sock *sk, void *value, __u64 flags) =
	(void *)BPF_FUNC_sk_storage_get;
static __u64 (*const net_of)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
static long (*const load_option)(struct bpf_sock_ops *ctx, void *found, __u32 len, __u64 flags) =
	(void *)BPF_FUNC_load_hdr_opt;
static long (*const store_option)(struct bpf_sock_ops *ctx, const void *from, __u32 len, __u64 flags) =
	(void *)BPF_FUNC_store_hdr_opt;
static long (*const reserve)(struct bpf_sock_ops *ctx, __u32 len, __u64 flags) = (void *)BPF_FUNC_reserve_hdr_opt;

enum { SOL_TCP = 6, SOL_SMC = 286, TCP_SAVE_SYN = 27, IPPROTO_TCP = 6, AF_INET = 2, SYN = 0x02, ACK = 0x10 };

/* Names of options at level SOL_SMC, which the kernel does not know: smc/src/option.rs has the same. */
enum { OFFER = 0x6c736d01, ASK, TAKE, WITHDRAW, PRESENT };

/* What is known of a socket. */
enum { NOTHING, OFFERS, ASKED, LISTENS, HEARD };

struct {
	NUMBER(type, BPF_MAP_TYPE_SK_STORAGE);
	NUMBER(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	int *key;
	__u32 *value;
} smc_sockets SEC(".maps");

struct place {
	__u64 net;
	__u64 port;
};

/* Ports of listeners that offer: AWAKE, ASLEEP ever since they listen, or when they were put to sleep (nanoseconds). */
enum { AWAKE = 0, ASLEEP = 1 };

struct {
	NUMBER(type, BPF_MAP_TYPE_LRU_HASH);
	NUMBER(max_entries, 16384);
	struct place *key;
	__u64 *value;
} smc_listeners SEC(".maps");

/* What `smc bpf status` shows: cli/src/bpf/mod.rs has their names. */
enum { ASKS, ANSWERS, CONNECTED, ACCEPTED, TAKEN, COUNTS };

struct {
	NUMBER(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	NUMBER(max_entries, COUNTS);
	__u32 *key;
	__u64 *value;
} smc_counts SEC(".maps");

INLINE void count(__u32 what)
{
	__u64 *n = map_lookup(&smc_counts, &what);
	if (n)
		++*n;
}

INLINE __u32 *known(struct bpf_sock *sk)
{
	return sk ? storage(&smc_sockets, sk, 0, 0) : 0;
}

/* The option: its kind, its length, "SMCR" in EBCDIC. */
struct option {
	__u8 bytes[6];
};

INLINE struct option smc_option(void)
{
	return (struct option){ { 254, 6, 0xe2, 0xd4, 0xc3, 0xd9 } };
}

/* Whether the packet that is looked at has it; with BPF_LOAD_HDR_OPT_TCP_SYN, the SYN that was kept. */
INLINE int has_option(struct bpf_sock_ops *ctx, __u64 flags)
{
	struct option o = smc_option();
	return load_option(ctx, &o, sizeof(o), flags) > 0;
}

/* Whether both ends have one address, or a loopback one: there is memory for that. */
INLINE int is_near(struct bpf_sock_ops *ctx)
{
	if (ctx->family == AF_INET) {
		__u32 local = ctx->local_ip4, remote = ctx->remote_ip4;
		return local == remote || (local & 0xff) == 127;
	}
	__u32 a = ctx->local_ip6[0], b = ctx->local_ip6[1], c = ctx->local_ip6[2], d = ctx->local_ip6[3];
	if (!a && !b && c == 0xffff0000 && (d & 0xff) == 127)
		return 1;
	return a == ctx->remote_ip6[0] && b == ctx->remote_ip6[1] && c == ctx->remote_ip6[2] &&
	       d == ctx->remote_ip6[3];
}

INLINE struct place place_of(struct bpf_sock_ops *ctx)
{
	return (struct place){ net_of(ctx), ctx->local_port };
}

/* From now on we are called for the header, or no more. */
INLINE void call_for_header(struct bpf_sock_ops *ctx, int on)
{
	__u32 flags = ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
	set_flags(ctx, on ? flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG : flags);
}

INLINE void on_connect(struct bpf_sock_ops *ctx)
{
	__u32 *s = known(ctx->sk);
	if (!s || *s == NOTHING)
		return;
	int asks = *s == OFFERS && !is_near(ctx);
	*s = asks ? ASKED : NOTHING;
	call_for_header(ctx, asks);
	if (asks)
		count(ASKS);
}

/* SYNs are kept from now on. Who has asked for more of them gets that. */
INLINE int keeps_syns(struct bpf_sock_ops *ctx)
{
	int on = 0;
	if (!get_option(ctx, SOL_TCP, TCP_SAVE_SYN, &on, sizeof(on)) && on)
		return 1;
	on = 1;
	return !set_option(ctx, SOL_TCP, TCP_SAVE_SYN, &on, sizeof(on));
}

INLINE void sleep_at(const struct place *at)
{
	__u64 *since = map_lookup(&smc_listeners, at);
	if (since && *since == AWAKE)
		*since = now();
}

INLINE void on_listen(struct bpf_sock_ops *ctx)
{
	struct place at = place_of(ctx);
	__u64 since = ASLEEP;
	/* Whoever listened here before may have been of another kind. */
	sleep_at(&at);
	__u32 *s = known(ctx->sk);
	if (!s || *s != OFFERS || !keeps_syns(ctx))
		return;
	*s = LISTENS;
	map_update(&smc_listeners, &at, &since, BPF_NOEXIST);
	call_for_header(ctx, 1);
}

/* A SYN of ours, or our SYN-ACK to one with the option. */
INLINE int speaks(struct bpf_sock_ops *ctx)
{
	if (!(ctx->skb_tcp_flags & SYN))
		return 0;
	if (!(ctx->skb_tcp_flags & ACK)) {
		__u32 *s = known(ctx->sk);
		return s && *s == ASKED;
	}
	if (ctx->args[0] == BPF_WRITE_HDR_TCP_SYNACK_COOKIE || is_near(ctx))
		return 0;
	struct place at = place_of(ctx);
	__u64 *since = map_lookup(&smc_listeners, &at);
	return since && *since == AWAKE && has_option(ctx, BPF_LOAD_HDR_OPT_TCP_SYN);
}

INLINE void on_connected(struct bpf_sock_ops *ctx)
{
	__u32 *s = known(ctx->sk);
	if (!s || *s != ASKED)
		return;
	call_for_header(ctx, 0);
	*s = has_option(ctx, 0) ? HEARD : NOTHING;
	if (*s == HEARD)
		count(CONNECTED);
}

/* A SYN-ACK is sent again for some two minutes, in nanoseconds. */
#define AFTERWARDS (180ull * 1000 * 1000 * 1000)

INLINE void on_accepted(struct bpf_sock_ops *ctx)
{
	__u32 *s = known(ctx->sk);
	if (!s || *s != LISTENS)
		return;
	call_for_header(ctx, 0);
	if (is_near(ctx) || !has_option(ctx, BPF_LOAD_HDR_OPT_TCP_SYN))
		return;
	struct place at = place_of(ctx);
	__u64 *since = map_lookup(&smc_listeners, &at), asleep = ASLEEP;
	if (since && *since != AWAKE && (*since == ASLEEP || now() - *since > AFTERWARDS))
		return;
	/* A port that was forgotten, since there are so many: it may have been awake when this began. */
	if (!since)
		map_update(&smc_listeners, &at, &asleep, BPF_NOEXIST);
	*s = HEARD;
	count(ACCEPTED);
}

SEC("sockops") int smc_option_ops(struct bpf_sock_ops *ctx)
{
	struct option o = smc_option();
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_connect(ctx);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		on_listen(ctx);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		if (speaks(ctx))
			reserve(ctx, sizeof(o), 0);
		break;
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
		if (speaks(ctx) && !store_option(ctx, &o, sizeof(o), 0) && ctx->skb_tcp_flags & ACK)
			count(ANSWERS);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		on_connected(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_accepted(ctx);
		break;
	}
	return 1;
}

/* Nothing of this call is ours: the kernel does with it what it would. */
INLINE int pass(struct bpf_sockopt *ctx)
{
	ctx->optlen = 0;
	return 1;
}

/* The call is done, and has succeeded. */
INLINE int done(struct bpf_sockopt *ctx)
{
	ctx->optlen = -1;
	return 1;
}

INLINE struct place port_of(struct bpf_sockopt *ctx)
{
	return (struct place){ net_of(ctx), ctx->sk->src_port };
}

INLINE int on_offer(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__u32 nothing = NOTHING;
	if (sk->protocol != IPPROTO_TCP || sk->state != BPF_TCP_CLOSE)
		return pass(ctx);
	__u32 *s = storage(&smc_sockets, sk, &nothing, BPF_SK_STORAGE_GET_F_CREATE);
	if (!s)
		return pass(ctx);
	*s = OFFERS;
	return done(ctx);
}

INLINE int on_take(struct bpf_sockopt *ctx, int speaks)
{
	__u32 *s = known(ctx->sk);
	if (speaks && s && *s == LISTENS && ctx->sk->state != BPF_TCP_LISTEN) {
		struct place at = port_of(ctx);
		__u64 awake = AWAKE;
		map_update(&smc_listeners, &at, &awake, BPF_ANY);
		*s = NOTHING;
	}
	if (!s || *s != HEARD)
		return pass(ctx);
	*s = NOTHING;
	count(TAKEN);
	return done(ctx);
}

INLINE void withdraw(struct bpf_sockopt *ctx)
{
	__u32 *s = known(ctx->sk);
	if (!s)
		return;
	if (*s == LISTENS && ctx->sk->state == BPF_TCP_LISTEN) {
		struct place at = port_of(ctx);
		sleep_at(&at);
	} else if (*s == OFFERS) {
		*s = NOTHING;
	}
}

SEC("cgroup/setsockopt") int smc_option_set(struct bpf_sockopt *ctx)
{
	if (ctx->level == SOL_TCP && ctx->optname == TCP_SAVE_SYN)
		/* SYNs may not be kept any more. */
		withdraw(ctx);
	if (ctx->level != SOL_SMC)
		return pass(ctx);
	switch (ctx->optname) {
	case OFFER:
		return on_offer(ctx);
	case ASK:
		return on_take(ctx, 1);
	case TAKE:
		return on_take(ctx, 0);
	case WITHDRAW:
		withdraw(ctx);
		return done(ctx);
	case PRESENT:
		return done(ctx);
	}
	return pass(ctx);
}

SEC("license") char smc_license[] = "MIT";
