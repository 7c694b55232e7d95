/* Classic BPF, written from its end to its beginning: what is jumped to is always there already, so every distance is
 * known, and jumps only go forward, as the kernel demands. */
#ifndef AGENT_BPF_CODE_H
#define AGENT_BPF_CODE_H

#include <linux/filter.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bpf_code {
    struct sock_filter rows[BPF_MAXINSNS]; /* the last one first */
    size_t count;
    bool full; /* something did not fit */
};

/* An instruction that has been written. */
typedef size_t bpf_label;

bpf_label bpf_return(struct bpf_code *code, uint32_t value);
/* The accumulator becomes the word at `offset`, and what was written last comes next. */
bpf_label bpf_load(struct bpf_code *code, uint32_t offset);
bpf_label bpf_and(struct bpf_code *code, uint32_t mask);
/* BPF_JEQ, BPF_JGT, BPF_JGE: the accumulator and `value`. */
bpf_label bpf_branch(struct bpf_code *code, uint16_t test, uint32_t value, bpf_label yes, bpf_label no);
/* The program in the order of the kernel; `rows` has room for `count`. */
void bpf_finish(const struct bpf_code *code, struct sock_filter *rows);

#endif
