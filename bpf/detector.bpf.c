// SPDX-License-Identifier: GPL-2.0
/*
 * Crash signals and OOM kills, seen in the kernel.
 *
 * Everything that names a process is taken here, in the moment of the signal: a process
 * without a core dump is gone 2 ms later, before anyone could look into /proc.
 *
 * Both programs are raw tracepoints, whose arguments are kernel objects. Offsets into them
 * (AT_...) come from the running kernel's BTF, services/detector/offsets.py, so that no kernel
 * header is needed and one program fits every kernel. Limits and the signal set are given as
 * definitions too, services/detector/program.py.
 */

#define KIND_SIGNAL 1
#define KIND_OOM_KILL 2

#define SIG_DFL 0
#define SIG_IGN 1
#define SIGKILL 9
#define SI_KERNEL 0x80
#define SIGNAL_BIT(number) (1ULL << ((number) - 1))
/* Those that dump core by default, signal(7): QUIT ILL TRAP ABRT BUS FPE SEGV XCPU XFSZ SYS. */
#define CORE_SIGNALS                                                                            \
    (SIGNAL_BIT(3) | SIGNAL_BIT(4) | SIGNAL_BIT(5) | SIGNAL_BIT(6) | SIGNAL_BIT(7) |            \
     SIGNAL_BIT(8) | SIGNAL_BIT(11) | SIGNAL_BIT(24) | SIGNAL_BIT(25) | SIGNAL_BIT(31))
#define ENDING_SIGNALS (SIGNALS & ~CORE_SIGNALS) /* SIGINT and the like */
#if ENDING_SIGNALS
#define WATCHED (SIGNALS | SIGNAL_BIT(SIGKILL))
#else
#define WATCHED SIGNALS
#endif
#define DUMPABLE_BITS 3 /* MMF_DUMPABLE_MASK, the lowest of mm_struct's flags */
#define SIGNAL_UNKILLABLE 0x40 /* include/linux/sched/signal.h: an init */

#define NAME_SIZE 256 /* NAME_MAX with its NUL */
#define MAX_NAMES 32  /* of a path */
#define MAX_GROUPS 16 /* of a cgroup path */
#define TEXT_SIZE 2048 /* powers of two, see within() */
#define ARGUMENTS_SIZE 1024

#define EXECUTABLE_WHOLE 1 /* the walk reached the root */
#define CGROUP_WHOLE 2
#define CGROUP_V1_WHOLE 4

/* services/detector/record.py reads this; keep them alike. */
struct event {
    u64 monotonic_ns;
    u64 start_boottime; /* ns, of the thread group's leader */
    u64 detail;         /* siginfo's fields at 16: fault address, or sender's PID and UID */
    u64 handler;
    u64 handler_flags;
    s64 total_vm; /* pages, this and the following; -1: not known */
    s64 file_rss;
    s64 anon_rss;
    s64 shmem_rss;
    u64 core_limit; /* RLIMIT_CORE, if dumpable is known */
    u32 kind;
    u32 pid;
    u32 tid;
    u32 ns_pid;
    u32 uid;
    u32 gid;
    s32 signal;
    s32 code;
    s32 error;
    s32 oom_score_adj;
    u32 arguments_size; /* of the whole, which may be more than is in the text */
    u16 flags;
    u16 cgroup_end; /* where each part of the text ends */
    u16 cgroup_v1_end;
    u16 executable_end;
    u16 text_end;
    s16 dumpable; /* PR_GET_DUMPABLE, prctl(2); -1: not known */
    u16 spare[2];
    char comm[16];
    char text[TEXT_SIZE + ARGUMENTS_SIZE];
};

#define HEAD_SIZE __builtin_offsetof(struct event, text)

struct handled_key {
    u64 start_boottime;
    u32 pid;
    u32 signal;
};

struct handled {
    u64 count; /* since the last that was published */
    u64 last_ns;
};

#define TOTAL_LOST 0
#define TOTAL_COUNTED 1

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_TABLE("lru_hash", struct handled_key, struct handled, handled, HANDLED_MAX);
BPF_PERCPU_ARRAY(totals, u64, 2);
/* An event is larger than the stack (512 bytes). A program does not interrupt itself on a CPU
 * (bpf_prog_active in the kernel), so each program has a place of its own. */
BPF_PERCPU_ARRAY(scratch, struct event, 2);

static __always_inline u64 read_u64(u64 object, u32 offset) {
    u64 value = 0;
    bpf_probe_read_kernel(&value, sizeof(value), (void *)(object + offset));
    return value;
}

static __always_inline u32 read_u32(u64 object, u32 offset) {
    u32 value = 0;
    bpf_probe_read_kernel(&value, sizeof(value), (void *)(object + offset));
    return value;
}

/* Show the verifier a bound that the compiler would find needless; `size` is a power of two. */
#define within(number, size) asm volatile("%0 &= %1" : "+r"(number) : "i"((size) - 1))

static __always_inline void add_to_total(int index) {
    u64 *total = totals.lookup(&index);
    if (total) *total += 1;
}

/* Append a name with its NUL; a path's names come leaf first. */
static __always_inline u64 append_name(struct event *event, u64 at, u64 name) {
    if (at >= TEXT_SIZE) return at;
    within(at, TEXT_SIZE);
    long size = bpf_probe_read_kernel_str(event->text + at, NAME_SIZE, (void *)name);
    return size > 0 ? at + size : at;
}

/* As d_path() in the kernel: up to the mount's root, on from where it is mounted. */
static __always_inline u64 append_executable(struct event *event, u64 at, u64 mm) {
#ifdef AT_MM_EXE_FILE
    u64 file = read_u64(mm, AT_MM_EXE_FILE);
    u64 entry = read_u64(file, AT_FILE_DENTRY);
    u64 mount = read_u64(file, AT_FILE_MNT) - AT_MOUNT_MNT;
    for (int i = 0; i < MAX_NAMES; i++) {
        if (at >= TEXT_SIZE) break;
        if (entry == read_u64(mount, AT_MOUNT_MNT + AT_VFSMOUNT_ROOT)) {
            u64 parent = read_u64(mount, AT_MOUNT_PARENT);
            if (parent == mount) {
                event->flags |= EXECUTABLE_WHOLE;
                break;
            }
            entry = read_u64(mount, AT_MOUNT_MOUNTPOINT);
            mount = parent;
        } else {
            at = append_name(event, at, read_u64(entry, AT_DENTRY_NAME));
            entry = read_u64(entry, AT_DENTRY_PARENT);
        }
    }
#endif
    return at;
}

static __always_inline u64 append_cgroup(struct event *event, u64 at, u64 cgroup, u16 whole) {
#ifdef AT_TASK_CGROUPS
    u64 node = read_u64(cgroup, AT_CGROUP_KN);
    for (int i = 0; i < MAX_GROUPS; i++) {
        if (at >= TEXT_SIZE) break;
        u64 parent = read_u64(node, AT_KN_PARENT);
        if (parent == 0) { /* the root's own name is empty */
            event->flags |= whole;
            break;
        }
        at = append_name(event, at, read_u64(node, AT_KN_NAME));
        node = parent;
    }
#endif
    return at;
}

/* The arguments as the process has them now; only its own can be read. */
static __always_inline u64 append_arguments(struct event *event, u64 at, u64 mm) {
#ifdef AT_MM_ARG_START
    if (at >= TEXT_SIZE || mm != read_u64(bpf_get_current_task(), AT_TASK_MM)) return at;
    u64 start = read_u64(mm, AT_MM_ARG_START);
    u64 size = read_u64(mm, AT_MM_ARG_END) - start;
    event->arguments_size = size > 0xffffffff ? 0xffffffff : size;
    if (size >= ARGUMENTS_SIZE) size = ARGUMENTS_SIZE - 1;
    within(size, ARGUMENTS_SIZE);
    within(at, TEXT_SIZE);
    if (bpf_probe_read_user(event->text + at, size, (void *)start) == 0) at += size;
#endif
    return at;
}

static __always_inline void describe(struct event *event, u64 task) {
    u64 leader = read_u64(task, AT_TASK_LEADER);
    u64 credentials = read_u64(task, AT_TASK_REAL_CRED);
    u64 own_pid = read_u64(leader, AT_TASK_THREAD_PID);
    u64 depth = read_u32(own_pid, AT_PID_LEVEL);
    u64 mm = read_u64(task, AT_TASK_MM);
    u64 at = 0;

    event->monotonic_ns = bpf_ktime_get_ns();
    event->start_boottime = read_u64(leader, AT_TASK_START);
    event->pid = read_u32(task, AT_TASK_TGID);
    event->tid = read_u32(task, AT_TASK_PID);
    event->ns_pid = read_u32(own_pid + depth * SIZE_UPID, AT_PID_NUMBERS);
    event->uid = read_u32(credentials, AT_CRED_UID);
    event->gid = read_u32(credentials, AT_CRED_GID);
    event->flags = 0;
    event->arguments_size = 0;
    __builtin_memset(event->spare, 0, sizeof(event->spare));
    bpf_probe_read_kernel(event->comm, sizeof(event->comm), (void *)(leader + AT_TASK_COMM));

#ifdef AT_TASK_CGROUPS
    u64 groups = read_u64(task, AT_TASK_CGROUPS);
    at = append_cgroup(event, at, read_u64(groups, AT_CSS_SET_DFL), CGROUP_WHOLE);
#endif
    event->cgroup_end = at;
#ifdef AT_CSS_SET_MEMORY
    u64 memory = read_u64(groups, AT_CSS_SET_MEMORY);
    at = append_cgroup(event, at, read_u64(memory, AT_CSS_CGROUP), CGROUP_V1_WHOLE);
#endif
    event->cgroup_v1_end = at;
    at = append_executable(event, at, mm);
    event->executable_end = at;
    at = append_arguments(event, at, mm);
    event->text_end = at;
}

/* What decides whether the kernel dumps a core at all: do_coredump(), fs/coredump.c. */
static __always_inline void read_core_limits(struct event *event, u64 task) {
    event->dumpable = -1;
    event->core_limit = 0;
#ifdef AT_MM_FLAGS
    u64 mm = read_u64(task, AT_TASK_MM);
    if (!mm) return; /* of it nothing can be read, and 0 would say that it forbids a core */
    event->dumpable = read_u64(mm, AT_MM_FLAGS) & DUMPABLE_BITS;
    event->core_limit = read_u64(read_u64(task, AT_TASK_SIGNAL), AT_SIGNAL_CORE_LIMIT);
#endif
}

/* Return 0 when there was room. */
static __always_inline int send(struct event *event) {
    u64 size = event->text_end;
    within(size, 2 * TEXT_SIZE);
    size += HEAD_SIZE;
    if (size > sizeof(*event)) size = sizeof(*event);
    if (events.ringbuf_output(event, size, 0) == 0) return 0;
    add_to_total(TOTAL_LOST);
    return -1;
}

/* Tell whether a handled signal is one of many, and count it then. */
static __always_inline int is_counted(struct handled_key *key, u64 now) {
    struct handled *state = handled.lookup(key);
    if (!state) return 0;
    u64 quiet = now - state->last_ns;
    state->last_ns = now;
    if (quiet > QUIET_NS) return 0;
    __sync_fetch_and_add(&state->count, 1);
    add_to_total(TOTAL_COUNTED);
    return 1;
}

static __always_inline int send_handled(struct event *event, struct handled_key *key) {
    struct handled first = {.last_ns = event->monotonic_ns};
    handled.insert(key, &first); /* one that is there keeps its count */
    /* No one heard of the first: let the next be it. */
    if (send(event)) handled.delete(key);
    return 0;
}

/* siginfo, as far as it is told: sigaction(2). */
struct origin {
    s32 error;
    s32 code;
    u64 detail;
};

static __always_inline void read_origin(struct origin *origin, u64 info) {
    /* 0 and 1 stand for "no siginfo" and "from the kernel" (include/linux/sched/signal.h). */
    origin->error = info > 1 ? read_u32(info, 4) : 0;
    origin->code = info > 1 ? read_u32(info, 8) : info == 1 ? SI_KERNEL : 0;
    origin->detail = info > 1 ? read_u64(info, 16) : 0;
}

static __always_inline int report(struct handled_key *key, struct origin *origin, u64 handler,
                                  u64 handler_flags) {
    int place = 0;
    struct event *event = scratch.lookup(&place);
    if (!event) return 0;
    u64 task = bpf_get_current_task();
    describe(event, task);
    read_core_limits(event, task);
    event->kind = KIND_SIGNAL;
    event->signal = key->signal;
    event->handler = handler;
    event->handler_flags = handler_flags;
    event->error = origin->error;
    event->code = origin->code;
    event->detail = origin->detail;
    event->total_vm = event->file_rss = event->anon_rss = event->shmem_rss = -1;
    event->oom_score_adj = 0;
    return handler == SIG_DFL ? send(event) : send_handled(event, key);
}

#if ENDING_SIGNALS
/* A signal that ends a process without a core dump is not delivered: the sender ends the
 * process at once, and every thread takes a SIGKILL without siginfo instead (complete_signal()
 * and get_signal() in kernel/signal.c). So its origin is kept from when it was sent. */
BPF_TABLE("lru_hash", struct handled_key, struct origin, origins, 1024);

/* TP_PROTO(int sig, struct kernel_siginfo *info, struct task_struct *task, int group, int result) */
int on_generate(struct bpf_raw_tracepoint_args *ctx) {
    u32 signal = ctx->args[0];
    if (signal < 1 || signal > 64 || !(ENDING_SIGNALS & SIGNAL_BIT(signal))) return 0;
    u64 task = ctx->args[2];
    struct handled_key key = {.signal = signal, .pid = read_u32(task, AT_TASK_TGID)};
    key.start_boottime = read_u64(read_u64(task, AT_TASK_LEADER), AT_TASK_START);
    struct origin origin = {};
    read_origin(&origin, ctx->args[1]);
    origins.update(&key, &origin);
    return 0;
}

/* Tell whether this thread is the first of its process to say so. */
static __always_inline int is_first_to_end(struct handled_key *key) {
    struct handled_key end = *key;
    struct handled nothing = {};
    end.signal += 64; /* beside what is handled */
    return handled.insert(&end, &nothing) == 0;
}

static __always_inline int on_group_exit(struct handled_key *key, u64 task) {
    u32 status = read_u32(read_u64(task, AT_TASK_SIGNAL), AT_SIGNAL_EXIT_CODE);
    if (status < 1 || status > 64 || !(ENDING_SIGNALS & SIGNAL_BIT(status))) return 0;
    key->signal = status;
    if (!is_first_to_end(key)) return 0;
    struct origin origin = {.code = SI_KERNEL};
    struct origin *known = origins.lookup(key);
    if (known) origin = *known;
    return report(key, &origin, SIG_DFL, 0);
}
#endif

/* TP_PROTO(int sig, struct kernel_siginfo *info, struct k_sigaction *ka) */
int on_signal(struct bpf_raw_tracepoint_args *ctx) {
    u32 signal = ctx->args[0];
    if (signal < 1 || signal > 64 || !(WATCHED & SIGNAL_BIT(signal))) return 0;

    u64 task = bpf_get_current_task();
    struct handled_key key = {.signal = signal, .pid = bpf_get_current_pid_tgid() >> 32};
    key.start_boottime = read_u64(read_u64(task, AT_TASK_LEADER), AT_TASK_START);
#if ENDING_SIGNALS
    if (signal == SIGKILL) {
        on_group_exit(&key, task);
        return 0;
    }
#endif
    u64 action = ctx->args[2]; /* sa_handler, then sa_flags: sigaction(2) */
    u64 handler = read_u64(action, 0);
    if (handler == SIG_IGN) return 0;
    if (handler == SIG_DFL) {
        /* An init takes no signal it did not ask for; its own faults have cleared the flag. */
        if (read_u32(read_u64(task, AT_TASK_SIGNAL), AT_SIGNAL_FLAGS) & SIGNAL_UNKILLABLE)
            return 0;
#if ENDING_SIGNALS
        /* It was blocked or traced before; the other threads will take their SIGKILL. */
        if ((ENDING_SIGNALS & SIGNAL_BIT(signal)) && !is_first_to_end(&key)) return 0;
#endif
    } else if (is_counted(&key, bpf_ktime_get_ns())) {
        return 0;
    }
    struct origin origin = {};
    read_origin(&origin, ctx->args[1]);
    report(&key, &origin, handler, read_u64(action, 8));
    return 0;
}

/* TP_PROTO(struct task_struct *task, uid_t uid) since 6.9, and in some older stable kernels;
 * TP_PROTO(int pid) before. */
int on_oom_victim(struct bpf_raw_tracepoint_args *ctx) {
    int place = 1;
    struct event *event = scratch.lookup(&place);
    if (!event) return 0;
    event->total_vm = event->file_rss = event->anon_rss = event->shmem_rss = -1;
    event->oom_score_adj = 0;
#ifdef MARK_VICTIM_GIVES_TASK
    u64 task = ctx->args[0];
#else
    /* Often the victim itself asked for the memory; if not, start_boottime 0 says to look. */
    u32 victim = ctx->args[0];
    u64 task = (u32)bpf_get_current_pid_tgid() == victim ? bpf_get_current_task() : 0;
#endif
    describe(event, task);
    event->dumpable = -1;
    event->core_limit = 0;
#ifndef MARK_VICTIM_GIVES_TASK
    if (!task) event->pid = event->tid = event->ns_pid = victim;
#endif
#ifdef AT_MM_TOTAL_VM
    if (task) {
        u64 mm = read_u64(task, AT_TASK_MM);
        event->total_vm = read_u64(mm, AT_MM_TOTAL_VM);
        event->file_rss = read_u64(mm, AT_MM_FILE_RSS);
        event->anon_rss = read_u64(mm, AT_MM_ANON_RSS);
        event->shmem_rss = read_u64(mm, AT_MM_SHMEM_RSS);
        event->oom_score_adj =
            (s16)read_u32(read_u64(task, AT_TASK_SIGNAL), AT_SIGNAL_OOM_SCORE_ADJ);
    }
#endif
    event->kind = KIND_OOM_KILL;
    event->signal = SIGKILL;
    event->code = SI_KERNEL;
    event->error = 0;
    event->detail = event->handler = event->handler_flags = 0;
    send(event);
    return 0;
}
