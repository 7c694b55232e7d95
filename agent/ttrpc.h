/* ttRPC, apart from where the bytes come from: frames in, calls, frames out.
 *
 *     0        4        8    9    10
 *     +--------+--------+----+----+-----------
 *     | length | stream |type|flag| payload …      numbers are big-endian
 *     +--------+--------+----+----+-----------
 */
#ifndef AGENT_TTRPC_H
#define AGENT_TTRPC_H

#include "arena.h"
#include "buffer.h"
#include "failure.h"
#include "messages.h"

enum {
    TTRPC_LARGEST = 4 * 1024 * 1024, /* payload of a frame, either way */
    TTRPC_PIECE = 64 * 1024, /* so much may be received at a time */
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

/* A call that a method answers: with TTRPC_OK and a reply, with a failure, or TTRPC_LATER.
 *
 * Later is for what has to be waited for: the loop has one thread, so no method may block. The method is called again
 * from its beginning when something has happened to `subject` (ttrpc_wake), or at `again_at`, with the same request; a
 * caller's deadline is seen to. Between two tries anything may have gone: look it up again by its id. */
struct ttrpc_call {
    struct span request;
    struct buffer reply;
    struct failure failure;
    struct arena arena; /* what is decoded lies here; given back after each try */
    bool ending; /* nothing is left to do after this answer */
    unsigned tries; /* there were before this one */
    int64_t since; /* clock_ms when it came */
    uint64_t memo; /* the method's own, kept between tries; nothing is done with it when the caller goes away */
    size_t done; /* as `memo`: how far it got */
    const void *subject; /* an address, never looked into */
    const void *queue; /* the same */
    int64_t again_at; /* CLOCK_NEVER unless the method says so */
};

typedef enum ttrpc_status ttrpc_method(struct ttrpc_call *call);

/* Rows end with a NULL name. */
struct ttrpc_method_row {
    const char *name;
    ttrpc_method *function;
};

/* A service's methods, in groups: each module has the rows of its own. The groups end with NULL. */
struct ttrpc_service_row {
    const char *name;
    const struct ttrpc_method_row *const *groups;
};

/* services.c */
extern const struct ttrpc_service_row ttrpc_services[];

/* Decode a call's request into `message`; false, and the failure that the Rust agent's generated code gives. */
bool ttrpc_decode(struct ttrpc_call *call, const struct message_type *type, void *message);
/* `return ttrpc_later(call, subject, CLOCK_NEVER);` */
enum ttrpc_status ttrpc_later(struct ttrpc_call *call, const void *subject, int64_t again_at);
/* Something happened to `subject`: the calls that wait for it are tried again. */
void ttrpc_wake(const void *subject);
/* Calls that stand in one queue (an address, as a subject's) have their turn one after the other, in the order in which
 * they came, until they are answered or forgotten. False: it is another one's, `return ttrpc_later(call, NULL,
 * CLOCK_NEVER)`, and the call is tried again when its turn has come. */
bool ttrpc_has_turn(struct ttrpc_call *call, const void *queue);
/* When the next waiting call is to be tried, or its deadline passes; CLOCK_NEVER: none is. */
int64_t ttrpc_next_try(void);
/* A waiting call of this peer is to be tried now: ttrpc_process does. */
bool ttrpc_has_tries(const struct ttrpc_peer *peer);

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
