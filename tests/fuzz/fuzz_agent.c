/* A libFuzzer target over the agent's frames and messages (see README.md): bytes as a host would send them, to the real
 * tables of services, until a sandbox with containers comes of them or an answer that says why not.
 *
 * It is to run in the jail of agent_jail.py only. What it does there is real: mounts, links, processes, signals.
 */
#define _GNU_SOURCE
#include "child.h"
#include "clock.h"
#include "log.h"
#include "loop.h"
#include "server.h"
#include "services.h"
#include "ttrpc.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#define MARK "/jail" /* what the jail has, and no other place */

enum {
    HEADER = 10,
    PAUSE = 0x10,
    TURNS = 80, /* of the loop, for calls that wait */
    TURN_MS = 2,
    DEEPEST = 12, /* messages within messages */
    PIECES = 700, /* bytes that come at a time: frames arrive in parts */
};

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

/* --- the target --- */

/* Who is root in a user namespace only may neither load BPF programs nor make devices; containers are to begin all the
 * same. */
bool __wrap_cgroup_limit_devices(void);
bool __wrap_cgroup_limit_devices(void)
{
    return true;
}

int __wrap_mknodat(int directory, const char *path, mode_t mode, dev_t device);
int __wrap_mknodat(int directory, const char *path, mode_t mode, dev_t device)
{
    (void)device;
    int file = openat(directory, path, O_CREAT | O_EXCL | O_NOFOLLOW | O_RDWR | O_CLOEXEC, mode & 0777);
    if (file >= 0)
        close(file);
    return file >= 0 ? 0 : -1;
}

/* With AGENT_ALONE set no process can be started: ten times as many inputs, and not all of what they could do. */
static bool alone;

bool __real_shared_make(const char *hostname, struct failure *failure);
/* The debug console's only question to the server, which is left out: whoever connects is the host. */
bool server_is_host(const struct sockaddr_storage *peer)
{
    (void)peer;
    return true;
}

bool __wrap_shared_make(const char *hostname, struct failure *failure);
bool __wrap_shared_make(const char *hostname, struct failure *failure)
{
    return alone || __real_shared_make(hostname, failure);
}

static void stay_alone(void)
{
    const struct rlimit one = {1, 1};
    alone = true;
    setrlimit(RLIMIT_NPROC, &one);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    if (access(MARK, F_OK) != 0) {
        fputs("this acts on the machine it runs on: start it by agent_jail.py\n", stderr);
        exit(2);
    }
    if (getenv("AGENT_ALONE") != NULL)
        stay_alone();
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    const char *log = getenv("AGENT_LOG"); /* /dev/stderr tells what becomes of an input */
    log_to(open(log != NULL ? log : "/dev/null", O_WRONLY | O_CLOEXEC), false);
    log_set_level("trace");
    return loop_begin() ? 0 : 1;
}

static uint32_t get_u32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static size_t find_frames(const uint8_t *data, size_t size, size_t *begins, size_t room)
{
    size_t count = 0;
    for (size_t at = 0; size - at >= HEADER && count < room; count++) {
        uint32_t length = get_u32(data + at);
        if (length > size - at - HEADER)
            break;
        begins[count] = at;
        at += HEADER + length;
    }
    return count;
}

/* True: there was an answer. */
static bool process(struct ttrpc_peer *peer)
{
    bool answered = false;
    bool more;
    do {
        more = ttrpc_process(peer);
        answered |= peer->out.size > 0;
        ttrpc_written(peer, peer->out.size);
    } while (more);
    return answered;
}

static bool turn(struct ttrpc_peer *peer, int wait_ms)
{
    loop_turn(wait_ms);
    child_reap();
    return ttrpc_has_tries(peer) && process(peer);
}

/* Until one of the calls that wait is answered, or so many turns. */
static void wait_for_an_answer(struct ttrpc_peer *peer, int *turns)
{
    while (ttrpc_next_try() != CLOCK_NEVER && *turns > 0 && !turn(peer, TURN_MS))
        --*turns;
}

static void receive_part(struct ttrpc_peer *peer, const uint8_t *data, size_t size)
{
    /* In memory of its own, of which not one byte too many may be read. */
    uint8_t *copy = malloc(size);
    memcpy(copy, data, size);
    ttrpc_receive(peer, (struct span){copy, size}, false);
    free(copy);
    process(peer);
}

/* A frame of type PAUSE, which the agent ignores, stands for a host that waits for an answer. */
static void receive(struct ttrpc_peer *peer, const uint8_t *data, size_t size)
{
    int turns = alone ? 1 : TURNS;
    while (size > 0 && !peer->lost && !ttrpc_broken(peer)) {
        size_t begins[1];
        size_t whole = find_frames(data, size, begins, 1) == 0 ? size : HEADER + (size_t)get_u32(data);
        bool pause = whole >= HEADER && data[8] == PAUSE;
        for (size_t left = whole; left > 0;) {
            size_t part = left < PIECES ? left : PIECES;
            receive_part(peer, data + (whole - left), part);
            left -= part;
        }
        turn(peer, 0);
        if (pause)
            wait_for_an_answer(peer, &turns);
        data += whole;
        size -= whole;
    }
}

/* Everything is taken down, as at a sandbox's end. */
static void destroy(void)
{
    static const char call[] = "\0\0\0\x25\0\0\0\3\1\0\x0a\x11grpc.AgentService\x12\x0e" "DestroySandbox\x1a";
    struct ttrpc_peer peer = {0};
    uint8_t frame[sizeof call]; /* its NUL is the length of an empty payload */
    memcpy(frame, call, sizeof call);
    ttrpc_receive(&peer, (struct span){frame, sizeof frame}, true);
    process(&peer);
    if (!peer.ending)
        abort();
    ttrpc_reset(&peer);
    for (int i = 0; i < 3; i++) {
        loop_turn(0);
        child_reap();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct ttrpc_peer peer = {0};
    receive(&peer, data, size);
    ttrpc_reset(&peer);
    if (ttrpc_next_try() != CLOCK_NEVER || buffer_held() != 0)
        abort(); /* a connection that is gone leaves nothing */
    destroy();
    return 0;
}

/* --- the mutator: frames stay frames, messages stay messages, and what is in them changes --- */

static unsigned below(unsigned limit)
{
    return (unsigned)rand() % limit; /* NOLINT: libFuzzer seeds it */
}

struct field {
    size_t begin;
    size_t content; /* behind tag and length */
    size_t end;
    bool delimited;
};

static bool take_varint(const uint8_t *data, size_t size, size_t *at, uint64_t *value)
{
    *value = 0;
    for (unsigned shift = 0; shift < 64 && *at < size; shift += 7) {
        uint8_t byte = data[(*at)++];
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return true;
    }
    return false;
}

/* How many fields; 0: this is no message. */
static size_t parse(const uint8_t *data, size_t size, struct field *fields, size_t room)
{
    size_t count = 0;
    for (size_t at = 0; at < size && count < room; count++) {
        uint64_t tag;
        uint64_t value;
        fields[count] = (struct field){.begin = at};
        if (!take_varint(data, size, &at, &tag) || tag >> 3 == 0 || tag >> 3 > 200)
            return 0;
        fields[count].delimited = (tag & 7) == 2;
        if ((tag & 7) == 2) {
            if (!take_varint(data, size, &at, &value) || value > size - at)
                return 0;
            fields[count].content = at;
            at += (size_t)value;
        } else if ((tag & 7) == 0) {
            fields[count].content = at;
            if (!take_varint(data, size, &at, &value))
                return 0;
        } else {
            return 0;
        }
        fields[count].end = at;
    }
    return count;
}

static size_t put_varint(uint8_t *out, uint64_t value)
{
    size_t size = 0;
    for (; value > 0x7f; value >>= 7)
        out[size++] = (uint8_t)(value | 0x80);
    out[size++] = (uint8_t)value;
    return size;
}

/* Replace [from, to) by other bytes; the new size, the old one when there is no room. */
static size_t replace(uint8_t *data, size_t size, size_t most, size_t from, size_t to, const uint8_t *bytes,
                     size_t count)
{
    if (size - (to - from) + count > most)
        return size;
    memmove(data + from + count, data + to, size - to);
    if (count > 0)
        memcpy(data + from, bytes, count);
    return size - (to - from) + count;
}

static size_t mutate_message(uint8_t *data, size_t size, size_t most, int depth);

static size_t mutate_content(uint8_t *data, size_t size, size_t most, const struct field *field, int depth)
{
    size_t length = field->end - field->content;
    size_t room = length + 256 + length / 2;
    uint8_t *changed = malloc(room + 10);
    uint8_t *content = changed + 10;
    memcpy(content, data + field->content, length);
    size_t header = field->content;
    if (field->delimited) {
        length = mutate_message(content, length, room, depth + 1);
        uint8_t prefix[10];
        size_t prefix_size = put_varint(prefix, length);
        content -= prefix_size;
        memcpy(content, prefix, prefix_size);
        length += prefix_size;
        size_t at = field->begin;
        uint64_t tag;
        take_varint(data, size, &at, &tag);
        header = at;
    } else {
        static const uint64_t telling[] = {0, 1, 2, 7, 9, 15, 63, 64, 127, 128, 255, 256, 4095, 65535, 65536,
                                           INT32_MAX, UINT32_MAX, INT64_MAX, UINT64_MAX};
        uint64_t value = below(2) ? telling[below(sizeof telling / sizeof telling[0])]
                                  : (uint64_t)rand() >> below(31); /* NOLINT */
        length = put_varint(content, value);
    }
    size = replace(data, size, most, header, field->end, content, length);
    free(changed);
    return size;
}

static size_t mutate_message(uint8_t *data, size_t size, size_t most, int depth)
{
    enum { MOST = 64 };
    struct field fields[MOST];
    size_t count = depth < DEEPEST && below(30) != 0 ? parse(data, size, fields, MOST) : 0;
    if (count == 0)
        return size == 0 && below(2) ? 0 : LLVMFuzzerMutate(data, size, most);
    const struct field *field = &fields[below((unsigned)count)];
    uint8_t *copy;
    switch (below(12)) {
    case 0:
        return replace(data, size, most, field->begin, field->end, NULL, 0);
    case 1: /* once more, elsewhere */
        copy = malloc(field->end - field->begin + 1);
        memcpy(copy, data + field->begin, field->end - field->begin);
        size_t where = fields[below((unsigned)count)].begin;
        size = replace(data, size, most, where, where, copy, field->end - field->begin);
        free(copy);
        return size;
    default:
        return mutate_content(data, size, most, field, depth);
    }
}

static size_t mutate_frame(uint8_t *data, size_t size, size_t most, size_t begin)
{
    size_t length = get_u32(data + begin);
    size_t room = 2 * length + 512;
    uint8_t *payload = malloc(room);
    memcpy(payload, data + begin + HEADER, length);
    size_t changed = mutate_message(payload, length, room, 0);
    size_t after = replace(data, size, most, begin + HEADER, begin + HEADER + length, payload, changed);
    free(payload);
    if (after == size && changed != length)
        return size; /* no room */
    for (int i = 0; i < 4; i++)
        data[begin + (size_t)i] = (uint8_t)(changed >> (24 - 8 * i));
    return after;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed)
{
    enum { MOST = 64 };
    size_t begins[MOST];
    srand(seed); /* NOLINT */
    size_t count = find_frames(data, size, begins, MOST);
    if (count == 0 || below(20) == 0)
        return LLVMFuzzerMutate(data, size, most);
    size_t begin = begins[below((unsigned)count)];
    size_t end = begin + HEADER + get_u32(data + begin);
    if (below(25) == 0)
        return replace(data, size, most, begin, end, NULL, 0);
    if (below(25) == 0) {
        uint8_t *copy = malloc(end - begin);
        memcpy(copy, data + begin, end - begin);
        size_t where = begins[below((unsigned)count)];
        size = replace(data, size, most, where, where, copy, end - begin);
        free(copy);
        return size;
    }
    return mutate_frame(data, size, most, begin);
}

/* Two inputs become one: some frames of each. */
size_t LLVMFuzzerCustomCrossOver(const uint8_t *left, size_t left_size, const uint8_t *right, size_t right_size,
                                 uint8_t *out, size_t most, unsigned int seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *left, size_t left_size, const uint8_t *right, size_t right_size,
                                 uint8_t *out, size_t most, unsigned int seed)
{
    enum { MOST = 64 };
    size_t begins[MOST];
    size_t size = 0;
    srand(seed); /* NOLINT */
    const uint8_t *both[] = {left, right};
    const size_t sizes[] = {left_size, right_size};
    for (int i = 0; i < 2; i++) {
        size_t count = find_frames(both[i], sizes[i], begins, MOST);
        for (size_t j = 0; j < count; j++) {
            size_t whole = HEADER + (size_t)get_u32(both[i] + begins[j]);
            if (below(4) == 0 || size + whole > most)
                continue;
            memcpy(out + size, both[i] + begins[j], whole);
            size += whole;
        }
    }
    return size;
}
