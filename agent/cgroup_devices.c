/* Which devices a container reaches. Version 2 has no file for that: the kernel asks a program of ours on every open
 * and mknod, with the kind, the numbers and what is wanted.
 *
 *     r2 kind   r3 wanted   r4 major   r5 minor   r6 granted so far
 *
 * It refuses what is denied for good, then goes through all rules, each of which grants or takes back, and at the end
 * says yes if all that is wanted is granted. */
#define _GNU_SOURCE
#include "cgroup.h"
#include "log.h"

#include <errno.h>
#include <inttypes.h>
#include <linux/bpf.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define SUBSYSTEM "cgroup"

#define GUARD "osbuilder_guard" /* the kernel keeps 15 characters */

enum {
    MOST_ROWS = 512, /* rules, devices and denials of one container */
    ROW_SIZE = 5, /* instructions, at most */
    FRAME_SIZE = 16, /* before and behind them, at most */
    MOST_ATTACHED = 64, /* programs of one kind on one cgroup, says the kernel */
    MOST_GUARDED = 64, /* devices denied to all */
    ALL = BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE | BPF_DEVCG_ACC_MKNOD,
    ANY = -1,
};

struct rule {
    bool allow;
    int kind; /* BPF_DEVCG_DEV_…, or ANY */
    int32_t major;
    int32_t minor;
    int access;
};

struct program {
    struct bpf_insn *rows;
    size_t count;
};

static const struct {
    int32_t major;
    int32_t minor;
} usual[] = {
    {1, 3}, /* null */
    {1, 5}, /* zero */
    {1, 7}, /* full */
    {1, 8}, /* random */
    {1, 9}, /* urandom */
    {5, 0}, /* tty */
    {5, 1}, /* console */
    {5, 2}, /* ptmx */
    {136, ANY}, /* pts */
};

static void emit(struct program *program, uint8_t code, unsigned to, unsigned from, int16_t offset, int32_t value)
{
    program->rows[program->count++] =
        (struct bpf_insn){.code = code, .dst_reg = to & 0xf, .src_reg = from & 0xf, .off = offset, .imm = value};
}

static void emit_answer(struct program *program, bool yes)
{
    emit(program, BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, yes);
    emit(program, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
}

static void emit_begin(struct program *program)
{
    emit(program, BPF_LDX | BPF_MEM | BPF_W, 2, 1, offsetof(struct bpf_cgroup_dev_ctx, access_type), 0);
    emit(program, BPF_ALU64 | BPF_MOV | BPF_X, 3, 2, 0, 0);
    emit(program, BPF_ALU64 | BPF_AND | BPF_K, 2, 0, 0, 0xffff);
    emit(program, BPF_ALU64 | BPF_RSH | BPF_K, 3, 0, 0, 16);
    emit(program, BPF_LDX | BPF_MEM | BPF_W, 4, 1, offsetof(struct bpf_cgroup_dev_ctx, major), 0);
    emit(program, BPF_LDX | BPF_MEM | BPF_W, 5, 1, offsetof(struct bpf_cgroup_dev_ctx, minor), 0);
    emit(program, BPF_ALU64 | BPF_MOV | BPF_K, 6, 0, 0, 0);
}

/* Jump over `body` instructions unless the device is one of the rule's. */
static void emit_match(struct program *program, const struct rule *rule, int body)
{
    const int32_t wanted[] = {rule->kind, rule->major, rule->minor};
    int left = body;
    for (size_t i = 0; i < 3; i++)
        left += wanted[i] != ANY;
    for (size_t i = 0; i < 3; i++)
        if (wanted[i] != ANY)
            emit(program, BPF_JMP | BPF_JNE | BPF_K, 2 + (unsigned)(i == 0 ? 0 : i + 1), 0, (int16_t)--left, wanted[i]);
}

static void emit_rule(struct program *program, const struct rule *rule)
{
    emit_match(program, rule, 1);
    if (rule->allow)
        emit(program, BPF_ALU64 | BPF_OR | BPF_K, 6, 0, 0, rule->access);
    else
        emit(program, BPF_ALU64 | BPF_AND | BPF_K, 6, 0, 0, ~rule->access);
}

static void emit_end(struct program *program)
{
    emit(program, BPF_ALU64 | BPF_XOR | BPF_K, 6, 0, 0, ALL);
    emit(program, BPF_ALU64 | BPF_AND | BPF_X, 3, 6, 0, 0);
    emit(program, BPF_JMP | BPF_JNE | BPF_K, 3, 0, 2, 0);
    emit_answer(program, true);
    emit_answer(program, false);
}

/* --- from OCI's words --- */

static bool parse_kind(const char *text, int *kind)
{
    switch (text[0]) {
    case '\0':
    case 'a':
        *kind = ANY;
        return true;
    case 'b':
        *kind = BPF_DEVCG_DEV_BLOCK;
        return true;
    case 'c':
    case 'u':
        *kind = BPF_DEVCG_DEV_CHAR;
        return true;
    default:
        return false;
    }
}

static bool parse_access(const char *text, int *access)
{
    *access = 0;
    for (; *text != '\0'; text++)
        switch (*text) {
        case 'r':
            *access |= BPF_DEVCG_ACC_READ;
            break;
        case 'w':
            *access |= BPF_DEVCG_ACC_WRITE;
            break;
        case 'm':
            *access |= BPF_DEVCG_ACC_MKNOD;
            break;
        default:
            return false;
        }
    return true;
}

/* A runtime sends a number that it has not got as -1 or, proto3 knowing no other way, as 0. No device has the major
 * number 0; the minor number 0 is taken for one where there is a major. */
static bool parse_numbers(int64_t major, int64_t minor, struct rule *rule)
{
    if (major > INT32_MAX || minor > INT32_MAX)
        return false;
    rule->major = major <= 0 ? ANY : (int32_t)major;
    rule->minor = minor < 0 || rule->major == ANY ? ANY : (int32_t)minor;
    return true;
}

static bool parse_rule(const struct oci_device_rule *oci, struct rule *rule, struct failure *failure)
{
    rule->allow = oci->allow;
    if (!parse_kind(oci->type, &rule->kind) || !parse_access(oci->access, &rule->access) ||
        !parse_numbers(oci->major, oci->minor, rule))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT,
                           "a rule of devices says type \"%.20s\", access \"%.20s\", %" PRId64 ":%" PRId64, oci->type,
                           oci->access, oci->major, oci->minor);
    if (rule->kind == ANY) /* as the version 1 that invented it: "a" has no numbers */
        rule->major = rule->minor = ANY;
    if (!oci->allow && rule->access == 0) /* in doubt, the narrower reading */
        rule->access = ALL;
    return true;
}

static bool emit_rules(struct program *program, const struct oci_resources *resources, struct failure *failure)
{
    struct rule rule;
    for (size_t i = 0; resources != NULL && i < resources->devices.count; i++) {
        if (!parse_rule(&resources->devices.items[i], &rule, failure))
            return false;
        emit_rule(program, &rule);
    }
    return true;
}

static bool emit_devices(struct program *program, const struct oci_device *devices, size_t count,
                         struct failure *failure)
{
    for (size_t i = 0; i < count; i++) {
        struct rule rule = {.allow = true, .access = ALL};
        if (devices[i].type[0] == 'p')
            continue; /* a fifo is not asked about */
        if (!parse_kind(devices[i].type, &rule.kind) || rule.kind == ANY || devices[i].major <= 0 ||
            devices[i].minor < 0 || !parse_numbers(devices[i].major, devices[i].minor, &rule))
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the device %.100s has type \"%.20s\", %" PRId64 ":%" PRId64,
                               devices[i].path, devices[i].type, devices[i].major, devices[i].minor);
        emit_rule(program, &rule);
    }
    return true;
}

static void emit_denied(struct program *program, const dev_t *denied, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const struct rule rule = {.kind = BPF_DEVCG_DEV_BLOCK,
                                  .major = (int32_t)major(denied[i]),
                                  .minor = (int32_t)minor(denied[i])};
        emit_match(program, &rule, 2);
        emit_answer(program, false);
    }
}

static void emit_usual(struct program *program)
{
    for (size_t i = 0; i < sizeof usual / sizeof usual[0]; i++) {
        const struct rule rule = {true, BPF_DEVCG_DEV_CHAR, usual[i].major, usual[i].minor, ALL};
        emit_rule(program, &rule);
    }
}

/* --- the kernel --- */

static int call_bpf(int command, union bpf_attr *attributes)
{
    return (int)syscall(SYS_bpf, command, attributes, sizeof *attributes);
}

static int load(const struct program *program, const char *name)
{
    union bpf_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    attributes.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE;
    attributes.insns = (uintptr_t)program->rows;
    attributes.insn_cnt = (uint32_t)program->count;
    attributes.license = (uintptr_t) "Apache-2.0";
    strcpy(attributes.prog_name, name);
    return call_bpf(BPF_PROG_LOAD, &attributes); /* the descriptor is close-on-exec */
}

/* Multi: a container that has cgroups of its own below may narrow further, as its systemd does, and never widen: the
 * kernel asks all programs on the way up. */
static bool attach(int command, int cgroup, int program)
{
    union bpf_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    attributes.target_fd = (uint32_t)cgroup;
    attributes.attach_bpf_fd = (uint32_t)program;
    attributes.attach_type = BPF_CGROUP_DEVICE;
    attributes.attach_flags = command == BPF_PROG_ATTACH ? BPF_F_ALLOW_MULTI : 0;
    return call_bpf(command, &attributes) == 0;
}

static bool refuse(struct failure *failure)
{
    if (errno == ENOSYS || errno == EINVAL)
        return failure_set(failure, TTRPC_FAILED_PRECONDITION,
                           "the guest's kernel cannot limit a container's devices (CONFIG_CGROUP_BPF): %s",
                           strerror(errno));
    return failure_errno(failure, "cannot limit the container's devices");
}

/* The new one first: for a moment both are asked, never none. */
static bool replace(struct cgroup *cgroup, int program, struct failure *failure)
{
    if (program < 0)
        return refuse(failure);
    if (!attach(BPF_PROG_ATTACH, cgroup->directory, program)) {
        refuse(failure);
        close(program);
        return false;
    }
    if (cgroup->devices >= 0) {
        attach(BPF_PROG_DETACH, cgroup->directory, cgroup->devices);
        close(cgroup->devices);
    }
    cgroup->devices = program;
    return true;
}

bool cgroup_limit_devices(struct cgroup *cgroup, const struct oci_device *devices, size_t count,
                          const struct oci_resources *resources, const dev_t *denied, size_t denied_count,
                          struct failure *failure)
{
    size_t rules = resources == NULL ? 0 : resources->devices.count;
    if (count > MOST_ROWS || rules > MOST_ROWS || denied_count > MOST_ROWS || count + rules + denied_count > MOST_ROWS)
        return failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "more than %d devices and rules of devices", MOST_ROWS);
    size_t most = (count + rules + denied_count + sizeof usual / sizeof usual[0]) * ROW_SIZE + FRAME_SIZE;
    struct program program = {calloc(most, sizeof *program.rows), 0};
    if (program.rows == NULL)
        return failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "no memory for the rules of devices");
    emit_begin(&program);
    emit_denied(&program, denied, denied_count);
    bool able = emit_rules(&program, resources, failure) && emit_devices(&program, devices, count, failure);
    if (able) {
        emit_usual(&program);
        emit_end(&program);
        able = replace(cgroup, load(&program, "container"), failure);
    }
    free(program.rows);
    return able;
}

/* --- above all containers --- */

static bool get_info(int program, struct bpf_prog_info *info)
{
    union bpf_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    memset(info, 0, sizeof *info);
    attributes.info.bpf_fd = (uint32_t)program;
    attributes.info.info_len = sizeof *info;
    attributes.info.info = (uintptr_t)info;
    return call_bpf(BPF_OBJ_GET_INFO_BY_FD, &attributes) == 0;
}

static size_t list_attached(int cgroup, uint32_t ids[MOST_ATTACHED])
{
    union bpf_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    attributes.query.target_fd = (uint32_t)cgroup;
    attributes.query.attach_type = BPF_CGROUP_DEVICE;
    attributes.query.prog_ids = (uintptr_t)ids;
    attributes.query.prog_cnt = MOST_ATTACHED;
    return call_bpf(BPF_PROG_QUERY, &attributes) == 0 ? attributes.query.prog_cnt : 0;
}

/* The guard with this number, open; -1: it is none. */
static int open_guard(uint32_t id, struct bpf_prog_info *info)
{
    union bpf_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    attributes.prog_id = id;
    int program = call_bpf(BPF_PROG_GET_FD_BY_ID, &attributes);
    if (program < 0 || (get_info(program, info) && strcmp(info->name, GUARD) == 0))
        return program;
    close(program);
    return -1;
}

/* One guard and no more, however often this is done and by however many agents after each other: the one that says
 * the same (the tag is a hash of what it says) stays, any other goes. */
static bool post_guard(int cgroup, int guard)
{
    struct bpf_prog_info wanted;
    struct bpf_prog_info found;
    uint32_t ids[MOST_ATTACHED];
    size_t count = list_attached(cgroup, ids);
    int old[MOST_ATTACHED];
    size_t old_count = 0;
    bool posted = false;
    if (!get_info(guard, &wanted))
        return false;
    for (size_t i = 0; i < count; i++) {
        int program = open_guard(ids[i], &found);
        if (program >= 0 && !posted && memcmp(found.tag, wanted.tag, sizeof found.tag) == 0) {
            posted = true;
            close(program);
        } else if (program >= 0) {
            old[old_count++] = program;
        }
    }
    posted = posted || attach(BPF_PROG_ATTACH, cgroup, guard);
    int number = errno;
    for (size_t i = 0; i < old_count; i++) {
        if (posted)
            attach(BPF_PROG_DETACH, cgroup, old[i]);
        close(old[i]);
    }
    errno = number;
    return posted;
}

/* Somebody's machine, on which the agent was started by hand, and not from PID 1: the guard would stay when the agent
 * has gone, and keep that machine from its own disk. The first of all cgroups is the one without a type. */
static bool is_a_hosts(int home)
{
    return getpid() != 1 && faccessat(home, "cgroup.type", F_OK, 0) != 0;
}

bool cgroup_deny_to_all(const dev_t *denied, size_t count, struct failure *failure)
{
    struct bpf_insn rows[MOST_GUARDED * ROW_SIZE + FRAME_SIZE];
    struct program program = {rows, 0};
    if (count == 0)
        return true;
    if (count > MOST_GUARDED)
        return failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "more than %d devices to deny", MOST_GUARDED);
    emit_begin(&program);
    emit_denied(&program, denied, count);
    emit_answer(&program, true);
    int guard = load(&program, GUARD);
    if (guard < 0)
        return refuse(failure);
    int home = cgroup_open_home();
    bool spared = home >= 0 && is_a_hosts(home);
    if (spared)
        LOG(LOG_WARN, SUBSYSTEM, "not PID 1, in a host's first cgroup: the root disk is guarded in each container only");
    bool posted = spared || (home >= 0 && post_guard(home, guard)) ||
                  failure_errno(failure, "cannot deny a device to all containers");
    if (home >= 0)
        close(home);
    close(guard);
    return posted;
}
