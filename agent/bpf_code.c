#include "bpf_code.h"

enum {
    FARTHEST = 255, /* what the distance of a branch can say */
    NEAR = 128, /* so far a return is shared; one more costs no more than the jump to it */
};

static bpf_label emit(struct bpf_code *code, uint16_t operation, uint8_t yes, uint8_t no, uint32_t value)
{
    if (code->count == BPF_MAXINSNS) {
        code->full = true;
        return 0;
    }
    code->rows[code->count] = (struct sock_filter){operation, yes, no, value};
    return code->count++;
}

/* From the instruction that is written after `between` more. */
static size_t distance(const struct bpf_code *code, bpf_label to, size_t between)
{
    return code->count + between - to - 1;
}

bpf_label bpf_return(struct bpf_code *code, uint32_t value)
{
    size_t oldest = code->count > NEAR ? code->count - NEAR : 0;
    for (size_t at = code->count; at > oldest; at--)
        if (code->rows[at - 1].code == (BPF_RET | BPF_K) && code->rows[at - 1].k == value)
            return at - 1;
    return emit(code, BPF_RET | BPF_K, 0, 0, value);
}

bpf_label bpf_load(struct bpf_code *code, uint32_t offset)
{
    return emit(code, BPF_LD | BPF_W | BPF_ABS, 0, 0, offset);
}

bpf_label bpf_and(struct bpf_code *code, uint32_t mask)
{
    return emit(code, BPF_ALU | BPF_AND | BPF_K, 0, 0, mask);
}

/* `label`, or a jump to it if it is too far away for a branch; one more jump may be written in between. */
static bpf_label within_reach(struct bpf_code *code, bpf_label label)
{
    if (distance(code, label, 1) <= FARTHEST)
        return label;
    return emit(code, BPF_JMP | BPF_JA, 0, 0, (uint32_t)distance(code, label, 0));
}

bpf_label bpf_branch(struct bpf_code *code, uint16_t test, uint32_t value, bpf_label yes, bpf_label no)
{
    yes = within_reach(code, yes);
    no = within_reach(code, no);
    if (code->full)
        return 0;
    return emit(code, (uint16_t)(BPF_JMP | BPF_K | test), (uint8_t)distance(code, yes, 0),
                (uint8_t)distance(code, no, 0), value);
}

void bpf_finish(const struct bpf_code *code, struct sock_filter *rows)
{
    for (size_t i = 0; i < code->count; i++)
        rows[i] = code->rows[code->count - 1 - i];
}
