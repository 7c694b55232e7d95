/* From OCI's description to one BPF program. What it means is what libseccomp, which runc and Kata's agent use, makes
 * of it: names that an architecture has not are passed over, as are rules that say what happens anyway; a rule without
 * conditions outweighs those with conditions for the same call; who comes by an architecture that is not listed is
 * killed.
 *
 *     arch? → for each architecture: number? (a binary tree over ranges of equal answers) → conditions? → answer
 */
#define _GNU_SOURCE
#include "seccomp.h"

#include "bpf_code.h"
#include "syscalls.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the halves of an argument are taken to lie that way round");

enum {
    MOST_USES = 16 * 1024, /* of names in rules, on all architectures */
    MOST_ARGUMENTS = 6,
    LARGEST_ERRNO = 4095,
    X32_BIT = 0x40000000,
    SKIPPED = -1, /* the number of a call that a tracer took out: no x32 call, whatever its bits */
    FOREIGN = SECCOMP_RET_KILL_THREAD, /* to calls by an architecture that is not listed */
};

struct architecture {
    const char *name;
    uint32_t audit;
    uint32_t bit; /* in all its numbers */
    bool narrow; /* arguments are of 32 bits */
    const int16_t *numbers;
};

static const struct architecture architectures[] = {
#ifdef __x86_64__
    {"SCMP_ARCH_X86_64", AUDIT_ARCH_X86_64, 0, false, syscalls_native}, /* the native one is first */
    {"SCMP_ARCH_X32", AUDIT_ARCH_X86_64, X32_BIT, true, syscalls_x32},
    {"SCMP_ARCH_X86", AUDIT_ARCH_I386, 0, true, syscalls_x86},
#else
    {"SCMP_ARCH_AARCH64", AUDIT_ARCH_AARCH64, 0, false, syscalls_native},
#endif
};
enum { ARCHITECTURES = sizeof architectures / sizeof architectures[0] };

/* A name in a rule, on an architecture. */
struct use {
    uint32_t number;
    uint32_t action;
    size_t order;
    bool narrow;
    const struct oci_syscall *rule;
};

/* Calls of numbers from `first` on up to the next range get the same answer. */
struct range {
    uint32_t first;
    uint32_t action;
    const struct use *uses; /* with conditions, in their order; NULL: none, `action` is the answer */
    size_t count;
};

struct compiler {
    uint32_t otherwise; /* the default action */
    bool listed[ARCHITECTURES];
    struct use *uses;
    size_t use_count;
    struct range *ranges;
    size_t range_count;
    struct bpf_code code;
};

/* --- words --- */

static bool parse_action(const char *word, const struct optional_u32 *number, uint32_t *action)
{
    static const struct {
        const char *word;
        uint32_t action;
        uint32_t largest; /* number with it; 0: there is none */
    } actions[] = {
        {"SCMP_ACT_ALLOW", SECCOMP_RET_ALLOW, 0},
        {"SCMP_ACT_LOG", SECCOMP_RET_LOG, 0},
        {"SCMP_ACT_ERRNO", SECCOMP_RET_ERRNO, LARGEST_ERRNO},
        {"SCMP_ACT_TRACE", SECCOMP_RET_TRACE, SECCOMP_RET_DATA},
        {"SCMP_ACT_TRAP", SECCOMP_RET_TRAP, 0},
        {"SCMP_ACT_KILL", SECCOMP_RET_KILL_THREAD, 0},
        {"SCMP_ACT_KILL_THREAD", SECCOMP_RET_KILL_THREAD, 0},
        {"SCMP_ACT_KILL_PROCESS", SECCOMP_RET_KILL_PROCESS, 0},
    };
    for (size_t i = 0; i < sizeof actions / sizeof actions[0]; i++) {
        if (strcmp(word, actions[i].word) != 0)
            continue;
        uint32_t data = number != NULL && number->set ? number->value : EPERM;
        *action = actions[i].action | (actions[i].largest == 0 ? 0 : data);
        return actions[i].largest == 0 || data <= actions[i].largest;
    }
    return false; /* also SCMP_ACT_NOTIFY: nobody would answer */
}

static bool parse_flags(const struct texts *words, unsigned int *flags, struct failure *failure)
{
    static const struct {
        const char *word;
        unsigned int flag;
    } known[] = {
        {"SECCOMP_FILTER_FLAG_TSYNC", SECCOMP_FILTER_FLAG_TSYNC},
        {"SECCOMP_FILTER_FLAG_LOG", SECCOMP_FILTER_FLAG_LOG},
        {"SECCOMP_FILTER_FLAG_SPEC_ALLOW", SECCOMP_FILTER_FLAG_SPEC_ALLOW},
    };
    *flags = 0;
    for (size_t i = 0; i < words->count; i++) {
        unsigned int flag = 0;
        for (size_t k = 0; k < sizeof known / sizeof known[0]; k++)
            if (strcmp(words->items[i], known[k].word) == 0)
                flag = known[k].flag;
        if (flag == 0)
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "seccomp: the flag %.60s is not known",
                               words->items[i]);
        *flags |= flag;
    }
    return true;
}

/* Those we do not know stay unlisted, which kills who comes by them. */
static void list_architectures(struct compiler *compiler, const struct texts *words)
{
    compiler->listed[0] = true;
    for (size_t i = 0; i < words->count; i++)
        for (size_t k = 0; k < ARCHITECTURES; k++)
            compiler->listed[k] |= strcmp(words->items[i], architectures[k].name) == 0;
}

/* In the order of the tables of numbers; -1: nobody has such a call. */
static int find_name(const char *name)
{
#define NAME(call) #call,
#define NAME_OF_ALL(call, number) #call,
    static const char *const names[] = {SYSCALLS(NAME) SYSCALLS_OF_ALL(NAME_OF_ALL)};
    _Static_assert(sizeof names / sizeof names[0] == SYSCALLS_COUNT, "a name for each number");
    for (int i = 0; i < SYSCALLS_COUNT; i++)
        if (strcmp(names[i], name) == 0)
            return i;
    return -1;
}

/* --- rules --- */

static bool check_arguments(const struct oci_syscall *rule, struct failure *failure)
{
    static const char *const known[] = {"SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE",       "SCMP_CMP_EQ",
                                        "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"};
    for (size_t i = 0; i < rule->args.count; i++) {
        const struct oci_syscall_argument *argument = &rule->args.items[i];
        bool found = false;
        for (size_t k = 0; k < sizeof known / sizeof known[0]; k++)
            found |= strcmp(argument->op, known[k]) == 0;
        if (!found)
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "seccomp: the comparison %.60s is not known",
                               argument->op);
        if (argument->index >= MOST_ARGUMENTS)
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "seccomp: a system call has %d arguments, none has"
                               " index %llu", MOST_ARGUMENTS, (unsigned long long)argument->index);
    }
    return true;
}

static void add_use(struct compiler *compiler, const struct architecture *architecture, const struct use *use, int name)
{
    int16_t number = architecture->numbers[name];
    if (number < 0)
        return;
    struct use *added = &compiler->uses[compiler->use_count];
    *added = *use;
    added->number = (uint32_t)number | architecture->bit;
    added->narrow = architecture->narrow;
    added->order = compiler->use_count++;
}

static bool add_rule(struct compiler *compiler, uint32_t audit, const struct oci_syscall *rule,
                     struct failure *failure)
{
    struct use use = {.rule = rule};
    if (!parse_action(rule->action, &rule->errno_ret, &use.action))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "seccomp: the action %.60s (%lu) is not possible",
                           rule->action, (unsigned long)rule->errno_ret.value);
    if (!check_arguments(rule, failure))
        return false;
    if (use.action == compiler->otherwise)
        return true;
    for (size_t i = 0; i < rule->names.count; i++) {
        int name = find_name(rule->names.items[i]);
        if (compiler->use_count + ARCHITECTURES > MOST_USES)
            return failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "seccomp: more names than a filter can have");
        for (size_t k = 0; name >= 0 && k < ARCHITECTURES; k++)
            if (compiler->listed[k] && architectures[k].audit == audit)
                add_use(compiler, &architectures[k], &use, name);
    }
    return true;
}

static int compare_uses(const void *left, const void *right)
{
    const struct use *a = left;
    const struct use *b = right;
    if (a->number != b->number)
        return a->number < b->number ? -1 : 1;
    return a->order < b->order ? -1 : a->order > b->order;
}

static void add_range(struct compiler *compiler, const struct range *range)
{
    struct range *last = compiler->range_count > 0 ? &compiler->ranges[compiler->range_count - 1] : NULL;
    if (last != NULL && last->first == range->first) {
        compiler->range_count--; /* it was empty */
        add_range(compiler, range);
    } else if (last == NULL || last->uses != NULL || range->uses != NULL || last->action != range->action) {
        compiler->ranges[compiler->range_count++] = *range;
    }
}

/* What one number gets: the first rule without conditions, else all that have some. */
static struct range judge(const struct use *uses, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (uses[i].rule->args.count == 0)
            return (struct range){.first = uses[0].number, .action = uses[i].action};
    return (struct range){.first = uses[0].number, .uses = uses, .count = count};
}

static void make_ranges(struct compiler *compiler, uint32_t audit)
{
    bool has_x32 = false;
    bool beside_x32 = false;
    for (size_t k = 0; k < ARCHITECTURES; k++) {
        has_x32 |= compiler->listed[k] && architectures[k].bit != 0;
        beside_x32 |= architectures[k].bit != 0 && architectures[k].audit == audit;
    }
    const struct range beyond = {.first = X32_BIT, .action = FOREIGN};
    struct range gap = {.first = 0, .action = compiler->otherwise};
    compiler->range_count = 0;
    add_range(compiler, &gap);
    for (size_t at = 0, count; at < compiler->use_count; at += count) {
        const struct use *first = &compiler->uses[at];
        for (count = 1; at + count < compiler->use_count && first[count].number == first->number;)
            count++;
        const struct range range = judge(first, count);
        add_range(compiler, &range);
        gap.first = first->number + 1;
        add_range(compiler, &gap);
    }
    if (beside_x32 && !has_x32) {
        add_range(compiler, &beyond);
        gap.first = (uint32_t)SKIPPED;
        add_range(compiler, &gap);
    }
}

/* --- code --- */

static bpf_label load_half(struct compiler *compiler, uint64_t index, bool upper)
{
    return bpf_load(&compiler->code, (uint32_t)(offsetof(struct seccomp_data, args) + index * 8 + (upper ? 4 : 0)));
}

/* `yes` if the argument is at least (test BPF_JGE), or above (BPF_JGT), the value. */
static bpf_label code_order(struct compiler *compiler, const struct oci_syscall_argument *argument, uint16_t test,
                            bool narrow, bpf_label yes, bpf_label no)
{
    struct bpf_code *code = &compiler->code;
    const uint32_t upper = (uint32_t)(argument->value >> 32);
    bpf_branch(code, test, (uint32_t)argument->value, yes, no);
    bpf_label lower = load_half(compiler, argument->index, false);
    if (narrow)
        return lower;
    bpf_label same = bpf_branch(code, BPF_JEQ, upper, lower, no);
    bpf_branch(code, BPF_JGT, upper, yes, same);
    return load_half(compiler, argument->index, true);
}

static bpf_label code_half(struct compiler *compiler, uint64_t index, bool upper, uint32_t mask, uint32_t value,
                           bpf_label yes, bpf_label no)
{
    bpf_branch(&compiler->code, BPF_JEQ, value, yes, no);
    if (mask != UINT32_MAX)
        bpf_and(&compiler->code, mask);
    return load_half(compiler, index, upper);
}

static bpf_label code_equal(struct compiler *compiler, uint64_t index, uint64_t mask, uint64_t value, bool narrow,
                            bpf_label yes, bpf_label no)
{
    bpf_label lower = code_half(compiler, index, false, (uint32_t)mask, (uint32_t)value, yes, no);
    if (narrow)
        return lower;
    return code_half(compiler, index, true, (uint32_t)(mask >> 32), (uint32_t)(value >> 32), lower, no);
}

static bpf_label code_condition(struct compiler *compiler, const struct oci_syscall_argument *argument, bool narrow,
                                bpf_label yes, bpf_label no)
{
    const char *op = argument->op + strlen("SCMP_CMP_");
    if (strcmp(op, "MASKED_EQ") == 0) /* OCI has the mask first */
        return code_equal(compiler, argument->index, argument->value, argument->value_two & argument->value, narrow,
                          yes, no);
    if (strcmp(op, "EQ") == 0)
        return code_equal(compiler, argument->index, UINT64_MAX, argument->value, narrow, yes, no);
    if (strcmp(op, "NE") == 0)
        return code_equal(compiler, argument->index, UINT64_MAX, argument->value, narrow, no, yes);
    if (strcmp(op, "GE") == 0)
        return code_order(compiler, argument, BPF_JGE, narrow, yes, no);
    if (strcmp(op, "LT") == 0)
        return code_order(compiler, argument, BPF_JGE, narrow, no, yes);
    if (strcmp(op, "GT") == 0)
        return code_order(compiler, argument, BPF_JGT, narrow, yes, no);
    return code_order(compiler, argument, BPF_JGT, narrow, no, yes);
}

/* libseccomp takes one condition an argument; runc makes a rule of each where there are two, and so do we. */
static bool is_choice(const struct oci_syscall *rule)
{
    unsigned seen = 0;
    for (size_t i = 0; i < rule->args.count; i++) {
        unsigned bit = 1u << rule->args.items[i].index;
        if ((seen & bit) != 0)
            return true;
        seen |= bit;
    }
    return false;
}

static bpf_label code_use(struct compiler *compiler, const struct use *use, bpf_label next)
{
    bool choice = is_choice(use->rule);
    bpf_label label = choice ? next : bpf_return(&compiler->code, use->action);
    for (size_t i = use->rule->args.count; i-- > 0;) {
        const struct oci_syscall_argument *argument = &use->rule->args.items[i];
        bpf_label yes = choice ? bpf_return(&compiler->code, use->action) : label;
        label = code_condition(compiler, argument, use->narrow, yes, choice ? label : next);
    }
    return label;
}

static bpf_label code_range(struct compiler *compiler, const struct range *range)
{
    if (range->uses == NULL)
        return bpf_return(&compiler->code, range->action);
    bpf_label label = bpf_return(&compiler->code, compiler->otherwise);
    for (size_t i = range->count; i-- > 0;)
        label = code_use(compiler, &range->uses[i], label);
    return label;
}

static bpf_label code_tree(struct compiler *compiler, size_t first, size_t count)
{
    if (count == 1)
        return code_range(compiler, &compiler->ranges[first]);
    size_t half = count / 2;
    bpf_label upper = code_tree(compiler, first + half, count - half);
    bpf_label lower = code_tree(compiler, first, half);
    return bpf_branch(&compiler->code, BPF_JGE, compiler->ranges[first + half].first, upper, lower);
}

static bool code_architecture(struct compiler *compiler, const struct oci_seccomp *seccomp, uint32_t audit,
                              bpf_label *label, struct failure *failure)
{
    compiler->use_count = 0;
    for (size_t i = 0; i < seccomp->syscalls.count; i++)
        if (!add_rule(compiler, audit, &seccomp->syscalls.items[i], failure))
            return false;
    qsort(compiler->uses, compiler->use_count, sizeof *compiler->uses, compare_uses);
    make_ranges(compiler, audit);
    *label = code_tree(compiler, 0, compiler->range_count);
    if (compiler->range_count > 1) /* else it is an answer, and perhaps one that lies elsewhere */
        *label = bpf_load(&compiler->code, offsetof(struct seccomp_data, nr));
    return true;
}

/* One section a kernel's architecture: x32 is a part of x86_64. */
static bool code_all(struct compiler *compiler, const struct oci_seccomp *seccomp, struct failure *failure)
{
    bpf_label next = bpf_return(&compiler->code, FOREIGN);
    for (size_t k = ARCHITECTURES; k-- > 0;) {
        bpf_label section;
        if (!compiler->listed[k] || architectures[k].bit != 0)
            continue;
        if (!code_architecture(compiler, seccomp, architectures[k].audit, &section, failure))
            return false;
        next = bpf_branch(&compiler->code, BPF_JEQ, architectures[k].audit, section, next);
    }
    bpf_load(&compiler->code, offsetof(struct seccomp_data, arch));
    return true;
}

static bool finish(const struct compiler *compiler, struct seccomp_filter *filter, struct failure *failure)
{
    if (compiler->code.full)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "seccomp: the filter needs more than the %d instructions"
                           " that the kernel takes", BPF_MAXINSNS);
    filter->rows = calloc(compiler->code.count, sizeof *filter->rows);
    if (filter->rows == NULL)
        return failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "seccomp: no memory");
    bpf_finish(&compiler->code, filter->rows);
    filter->count = (unsigned short)compiler->code.count;
    return true;
}

static bool compile(struct compiler *compiler, const struct oci_seccomp *seccomp, struct seccomp_filter *filter,
                    struct failure *failure)
{
    if (!parse_action(seccomp->default_action, NULL, &compiler->otherwise))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "seccomp: the default action \"%.60s\" is not possible",
                           seccomp->default_action);
    list_architectures(compiler, &seccomp->architectures);
    return code_all(compiler, seccomp, failure) && finish(compiler, filter, failure);
}

bool seccomp_compile(const struct oci_seccomp *seccomp, struct seccomp_filter *filter, struct failure *failure)
{
    *filter = (struct seccomp_filter){0};
    if (seccomp == NULL || (seccomp->default_action[0] == '\0' && seccomp->syscalls.count == 0))
        return true;
    if (!parse_flags(&seccomp->flags, &filter->flags, failure))
        return false;
    struct compiler *compiler = calloc(1, sizeof *compiler);
    bool able = compiler != NULL;
    if (able) {
        compiler->uses = calloc(MOST_USES, sizeof *compiler->uses);
        compiler->ranges = calloc(2 * MOST_USES + 3, sizeof *compiler->ranges);
        able = compiler->uses != NULL && compiler->ranges != NULL;
    }
    if (!able)
        failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "seccomp: no memory");
    able = able && compile(compiler, seccomp, filter, failure);
    if (compiler != NULL) {
        free(compiler->uses);
        free(compiler->ranges);
    }
    free(compiler);
    return able;
}

bool seccomp_install(const struct seccomp_filter *filter)
{
    struct sock_fprog program = {filter->count, filter->rows};
    if (filter->count == 0)
        return true;
    long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, filter->flags, &program);
    if (result > 0) /* the thread that could not follow */
        errno = ESRCH;
    return result == 0;
}

void seccomp_reset(struct seccomp_filter *filter)
{
    free(filter->rows);
    *filter = (struct seccomp_filter){0};
}
