/* ttRPC, apart from where the bytes come from: frames in, calls, frames out.
 *
 *     0        4        8    9    10
 *     +--------+--------+----+----+-----------
 *     | length | stream |type|flag| payload …      numbers are big-endian
 *     +--------+--------+----+----+-----------
 */
#ifndef AGENT_TTRPC_H
#define AGENT_TTRPC_H

#include "buffer.h"

enum {
    TTRPC_LARGEST = 4 * 1024 * 1024, /* payload of a frame, either way */
    TTRPC_PIECE = 64 * 1024, /* so much may be received at a time */
};

enum ttrpc_status {
    TTRPC_OK = 0,
    TTRPC_UNKNOWN = 2,
    TTRPC_INVALID_ARGUMENT = 3,
    TTRPC_RESOURCE_EXHAUSTED = 8,
    TTRPC_UNIMPLEMENTED = 12,
    TTRPC_INTERNAL = 13,
};

/* One end of one byte stream. All zero is a fresh one. */
struct ttrpc_peer {
    struct buffer in;
    struct buffer out;
    size_t discarding; /* bytes still to come of a frame that is refused */
    uint32_t discarded_stream;
    bool discarded_request;
    enum ttrpc_status discarded_status;
    const char *discarded_reason;
    bool lost; /* where the next frame begins is not known: nothing is taken for one until ttrpc_reset */
    uint32_t frames; /* that have come to an end */
    bool ending; /* DestroySandbox was answered */
    bool opened; /* stream 1 was called, with which every client begins, and its answer is not written yet */
    size_t opening; /* where in `out` that answer begins */
};

/* A call that a method answers: a status, and with TTRPC_OK the reply, else the reason. */
struct ttrpc_call {
    struct span request;
    struct buffer reply;
    char reason[160];
    bool ending; /* nothing is left to do after this answer */
};

typedef enum ttrpc_status ttrpc_method(struct ttrpc_call *call);

/* Rows end with a NULL name. */
struct ttrpc_method_row {
    const char *name;
    ttrpc_method *function;
};

struct ttrpc_service_row {
    const char *name;
    const struct ttrpc_method_row *methods;
};

/* services.c */
extern const struct ttrpc_service_row ttrpc_services[];

/* Bytes from the host, when ttrpc_process wants more: at most TTRPC_PIECE. A frame for which there is no room left is
 * read over and answered RESOURCE_EXHAUSTED; the room is shared, but an entitled peer does without asking. */
void ttrpc_receive(struct ttrpc_peer *peer, struct span bytes, bool entitled);
/* Answer what `in` holds whole frames of. True: there is more, but first `out` must be drained. */
bool ttrpc_process(struct ttrpc_peer *peer);
/* So much is waiting to be written that nothing more should be read. */
bool ttrpc_congested(const struct ttrpc_peer *peer);
/* Memory ran out in the middle: the stream is of no use any more. */
bool ttrpc_broken(const struct ttrpc_peer *peer);
/* Nothing is half done, nothing waits. */
bool ttrpc_idle(const struct ttrpc_peer *peer);
/* A frame has begun and not ended. */
bool ttrpc_half_way(const struct ttrpc_peer *peer);
/* Give up the stream with what has come of it and what waits to be written: see `lost`. */
void ttrpc_lose(struct ttrpc_peer *peer);
/* So much of `out` has been written. */
void ttrpc_written(struct ttrpc_peer *peer, size_t size);
void ttrpc_reset(struct ttrpc_peer *peer);

#endif
