#include "ttrpc.h"

#include "clock.h"
#include "log.h"
#include "wire.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define SUBSYSTEM "ttrpc"

enum {
    HEADER = 10,
    TYPE_REQUEST = 1,
    TYPE_RESPONSE = 2,
    ENOUGH_WAITING = 64 * 1024,
    /* Above this a frame that is too big is not waited for: the announced 4 GiB may never come, and a length like
     * that is no length at all but something that stands where one should. Go's client does not send above 4 MiB. */
    HOPELESS = 16 * 1024 * 1024,
    /* A guest may have 256 MiB, and the kernel kills PID 1 for want of them as well. Frames beyond SMALL share this
     * budget; the port's may go beyond it, once: 16 MiB together. SMALL ones always pass, so that 32 hosts with half
     * a big frame each cannot keep the others from a health check. */
    BUDGET = 12 * 1024 * 1024,
    SMALL = TTRPC_PIECE,
    MOST_WAITING = 4096, /* calls */
    SMALL_WAITING = 1024, /* the request of one that waits without asking for room: 4 MiB are all of them together */
    LONGEST_QUOTED = 100, /* of a name that a host sent, in an answer */
};

struct frame {
    uint32_t size;
    uint32_t stream;
    uint8_t type;
    struct span payload;
};

struct request {
    struct span service;
    struct span method;
    struct span payload;
    uint64_t timeout_nano;
};

/* A call whose method said TTRPC_LATER. */
struct waiting {
    struct waiting *next;
    struct ttrpc_peer *peer;
    uint32_t stream;
    ttrpc_method *method;
    struct buffer request;
    struct ttrpc_call call;
    int64_t deadline;
    bool due;
};

static struct waiting *waiting_calls;
static size_t waiting_count;

static uint32_t get_u32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static void set_u32(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 24);
    at[1] = (uint8_t)(value >> 16);
    at[2] = (uint8_t)(value >> 8);
    at[3] = (uint8_t)value;
}

static struct buffer encode_status(enum ttrpc_status code, const char *reason)
{
    struct buffer status = {0};
    if (code != TTRPC_OK) {
        wire_put_uint(&status, 1, code);
        wire_put_text(&status, 2, reason);
    }
    return status;
}

static void answer(struct ttrpc_peer *peer, uint32_t stream, enum ttrpc_status code, const char *reason,
                   struct span reply)
{
    struct buffer status = encode_status(code, reason);
    struct buffer body = {0};
    /* The Rust agent always writes the status, also when it is empty: so do we. */
    wire_put_message(&body, 1, &status);
    wire_put_bytes(&body, 2, reply);
    if (body.size <= TTRPC_LARGEST || code != TTRPC_OK) {
        uint8_t header[HEADER] = {0};
        set_u32(header, (uint32_t)body.size);
        set_u32(header + 4, stream);
        header[8] = TYPE_RESPONSE;
        buffer_append(&peer->out, header, sizeof header);
        struct span content = buffer_content(&body);
        buffer_append(&peer->out, content.data, content.size);
        peer->out.failed |= body.failed;
    } else {
        answer(peer, stream, TTRPC_INVALID_ARGUMENT, "the answer is larger than 4 MiB", (struct span){0});
    }
    buffer_reset(&status);
    buffer_reset(&body);
}

static void refuse(struct ttrpc_peer *peer, uint32_t stream, enum ttrpc_status code, const char *reason)
{
    char number[16];
    snprintf(number, sizeof number, "%" PRIu32, stream);
    LOG(LOG_DEBUG, SUBSYSTEM, "refused", LOG_RAW("stream", number), LOG_STRING("reason", reason));
    answer(peer, stream, code, reason, (struct span){0});
}

static bool decode_metadata(struct span bytes)
{
    struct wire_reader reader = wire_read(bytes);
    struct wire_field field;
    while (wire_next(&reader, &field))
        if ((field.tag == WIRE_TAG(1, WIRE_BYTES) || field.tag == WIRE_TAG(2, WIRE_BYTES)) &&
            !wire_is_utf8(field.bytes))
            return false;
    return !reader.malformed;
}

static bool decode_request(struct span bytes, struct request *request)
{
    struct wire_reader reader = wire_read(bytes);
    struct wire_field field;
    *request = (struct request){0};
    while (wire_next(&reader, &field)) {
        switch (field.tag) {
        case WIRE_TAG(1, WIRE_BYTES):
            request->service = field.bytes;
            break;
        case WIRE_TAG(2, WIRE_BYTES):
            request->method = field.bytes;
            break;
        case WIRE_TAG(3, WIRE_BYTES):
            request->payload = field.bytes;
            break;
        case WIRE_TAG(4, WIRE_VARINT):
            request->timeout_nano = field.value;
            break;
        case WIRE_TAG(5, WIRE_BYTES):
            if (!decode_metadata(field.bytes))
                return false;
            break;
        default:
            break;
        }
    }
    return !reader.malformed && wire_is_utf8(request->service) && wire_is_utf8(request->method);
}

static const struct ttrpc_service_row *find_service(struct span name)
{
    for (const struct ttrpc_service_row *row = ttrpc_services; row->name != NULL; row++)
        if (wire_equals(name, row->name))
            return row;
    return NULL;
}

static ttrpc_method *find_method(const struct ttrpc_service_row *service, struct span name)
{
    for (const struct ttrpc_method_row *const *group = service->groups; *group != NULL; group++)
        for (const struct ttrpc_method_row *row = *group; row->name != NULL; row++)
            if (wire_equals(name, row->name))
                return row->function;
    return NULL;
}

/* A name from outside as an argument of %.*s: cut where a character ends. */
static int quoted(struct span name)
{
    size_t size = name.size;
    if (size > LONGEST_QUOTED)
        for (size = LONGEST_QUOTED; size > 0 && (name.data[size] & 0xc0) == 0x80;)
            size--;
    return (int)size;
}

static const char *text(struct span name)
{
    return name.data == NULL ? "" : (const char *)name.data;
}

bool ttrpc_decode(struct ttrpc_call *call, const struct message_type *type, void *message)
{
    if (message_decode(type, call->request, &call->arena, message))
        return true;
    if (call->arena.failed)
        return failure_set(&call->failure, TTRPC_RESOURCE_EXHAUSTED, "no memory for this %s", message_name(type));
    return failure_set(&call->failure, TTRPC_UNKNOWN, "the payload is no %s", message_name(type));
}

/* --- calls that wait --- */

enum ttrpc_status ttrpc_later(struct ttrpc_call *call, const void *subject, int64_t again_at)
{
    call->subject = subject;
    call->again_at = again_at;
    return TTRPC_LATER;
}

void ttrpc_wake(const void *subject)
{
    for (struct waiting *waiting = waiting_calls; waiting != NULL; waiting = waiting->next)
        waiting->due |= waiting->call.subject == subject;
}

bool ttrpc_has_turn(struct ttrpc_call *call, const void *queue)
{
    call->queue = queue;
    for (const struct waiting *at = waiting_calls; at != NULL && &at->call != call; at = at->next)
        if (at->call.queue == queue)
            return false;
    return true;
}

static int64_t try_at(const struct waiting *waiting)
{
    if (waiting->due)
        return 0;
    return waiting->call.again_at < waiting->deadline ? waiting->call.again_at : waiting->deadline;
}

int64_t ttrpc_next_try(void)
{
    int64_t next = CLOCK_NEVER;
    for (const struct waiting *waiting = waiting_calls; waiting != NULL; waiting = waiting->next)
        if (!ttrpc_congested(waiting->peer) && try_at(waiting) < next)
            next = try_at(waiting);
    return next;
}

bool ttrpc_has_tries(const struct ttrpc_peer *peer)
{
    int64_t now = clock_ms();
    for (const struct waiting *waiting = waiting_calls; waiting != NULL; waiting = waiting->next)
        if (waiting->peer == peer && try_at(waiting) <= now)
            return true;
    return false;
}

/* Of those that wait; whose turn it was has left them. */
static void wake_next(const void *queue)
{
    struct waiting *waiting = waiting_calls;
    while (waiting != NULL && waiting->call.queue != queue)
        waiting = waiting->next;
    if (waiting != NULL)
        waiting->due = true;
}

static void free_waiting(struct waiting *waiting)
{
    if (waiting->call.queue != NULL)
        wake_next(waiting->call.queue);
    buffer_reset(&waiting->request);
    free(waiting);
    waiting_count--;
}

/* The host that asked has gone. */
static void forget_waiting(const struct ttrpc_peer *peer)
{
    for (struct waiting **at = &waiting_calls; *at != NULL;) {
        struct waiting *waiting = *at;
        if (waiting->peer == peer) {
            *at = waiting->next;
            free_waiting(waiting);
        } else {
            at = &waiting->next;
        }
    }
}

static void conclude(struct ttrpc_peer *peer, uint32_t stream, enum ttrpc_status status, struct ttrpc_call *call)
{
    if (status == TTRPC_OK && call->reply.failed)
        refuse(peer, stream, TTRPC_RESOURCE_EXHAUSTED, "no memory for the answer");
    else if (status == TTRPC_OK)
        answer(peer, stream, TTRPC_OK, "", buffer_content(&call->reply));
    else
        refuse(peer, stream, status, call->failure.reason);
    peer->ending |= call->ending;
}

static enum ttrpc_status try_method(ttrpc_method *method, struct ttrpc_call *call)
{
    call->failure = (struct failure){0};
    call->again_at = CLOCK_NEVER;
    enum ttrpc_status status = method(call);
    arena_reset(&call->arena);
    if (status == TTRPC_LATER)
        buffer_reset(&call->reply);
    call->tries++;
    return status;
}

static int64_t deadline_of(const struct ttrpc_call *call, uint64_t timeout_nano)
{
    if (timeout_nano == 0 || timeout_nano > INT64_MAX) /* none, or a negative one */
        return CLOCK_NEVER;
    int64_t limit = (int64_t)(timeout_nano / 1000000) + 1;
    return limit > CLOCK_NEVER - call->since ? CLOCK_NEVER : call->since + limit;
}

static bool keep_waiting(struct ttrpc_peer *peer, uint32_t stream, ttrpc_method *method, int64_t deadline,
                         const struct ttrpc_call *call)
{
    if (waiting_count == MOST_WAITING ||
        (call->request.size > SMALL_WAITING && buffer_held() + call->request.size > BUDGET))
        return false;
    struct waiting *waiting = malloc(sizeof *waiting);
    if (waiting == NULL)
        return false;
    *waiting = (struct waiting){
        .next = NULL, .peer = peer, .stream = stream, .method = method, .call = *call, .deadline = deadline};
    buffer_append(&waiting->request, call->request.data, call->request.size);
    waiting_count++;
    if (waiting->request.failed) {
        free_waiting(waiting);
        return false;
    }
    waiting->call.request = buffer_content(&waiting->request);
    struct waiting **last = &waiting_calls; /* in the order in which they came */
    while (*last != NULL)
        last = &(*last)->next;
    *last = waiting;
    return true;
}

static void try_again(struct waiting **at)
{
    struct waiting *waiting = *at;
    struct ttrpc_call *call = &waiting->call;
    waiting->due = false;
    enum ttrpc_status status = try_method(waiting->method, call);
    if (status == TTRPC_LATER && waiting->deadline <= clock_ms()) {
        status = TTRPC_DEADLINE_EXCEEDED;
        failure_set(&call->failure, status, "the deadline of the call has passed");
    }
    if (status == TTRPC_LATER)
        return;
    conclude(waiting->peer, waiting->stream, status, call);
    buffer_reset(&call->reply);
    /* A method may have woken others, but adds and removes none. */
    *at = waiting->next;
    free_waiting(waiting);
}

static void try_waiting(struct ttrpc_peer *peer)
{
    for (struct waiting **at = &waiting_calls; *at != NULL && !ttrpc_congested(peer) && !ttrpc_broken(peer);) {
        struct waiting *waiting = *at;
        if (waiting->peer == peer && try_at(waiting) <= clock_ms())
            try_again(at);
        if (*at == waiting)
            at = &waiting->next;
    }
}

static void call_method(struct ttrpc_peer *peer, uint32_t stream, const struct request *request)
{
    struct ttrpc_call call = {.request = request->payload, .since = clock_ms()};
    const struct ttrpc_service_row *service = find_service(request->service);
    if (service == NULL) {
        failure_set(&call.failure, TTRPC_INVALID_ARGUMENT, "the service %.*s does not exist", quoted(request->service),
                    text(request->service));
        conclude(peer, stream, call.failure.status, &call);
        return;
    }
    ttrpc_method *method = find_method(service, request->method);
    if (method == NULL) {
        failure_set(&call.failure, TTRPC_UNIMPLEMENTED, "%s/%.*s is not implemented", service->name,
                    quoted(request->method), text(request->method));
        conclude(peer, stream, call.failure.status, &call);
        return;
    }
    LOG(LOG_DEBUG, SUBSYSTEM, "call", LOG_SPAN("service", request->service), LOG_SPAN("method", request->method));
    enum ttrpc_status status = try_method(method, &call);
    if (status == TTRPC_LATER) {
        if (keep_waiting(peer, stream, method, deadline_of(&call, request->timeout_nano), &call))
            return;
        status = TTRPC_RESOURCE_EXHAUSTED;
        failure_set(&call.failure, status, "too many calls are waiting");
    }
    conclude(peer, stream, status, &call);
    buffer_reset(&call.reply);
}

static void ignore(uint32_t stream, uint8_t type)
{
    char numbers[2][16];
    snprintf(numbers[0], sizeof numbers[0], "%" PRIu32, stream);
    snprintf(numbers[1], sizeof numbers[1], "%u", type);
    LOG(LOG_WARN, SUBSYSTEM, "ignored a frame that is no request", LOG_RAW("stream", numbers[0]),
        LOG_RAW("type", numbers[1]));
}

static void handle(struct ttrpc_peer *peer, const struct frame *frame)
{
    struct request request;
    if (frame->type == TYPE_REQUEST && frame->stream == 1) {
        peer->opened = true;
        peer->opening = peer->out.size;
        forget_waiting(peer); /* a client begins: whatever waits was asked by another one before it */
    }
    if (frame->type != TYPE_REQUEST)
        ignore(frame->stream, frame->type);
    else if (frame->stream % 2 == 0)
        refuse(peer, frame->stream, TTRPC_INVALID_ARGUMENT, "the stream id of a request must be odd");
    else if (!decode_request(frame->payload, &request))
        refuse(peer, frame->stream, TTRPC_INVALID_ARGUMENT, "the frame holds no request");
    else
        call_method(peer, frame->stream, &request);
}

static struct frame read_header(const struct ttrpc_peer *peer)
{
    const uint8_t *at = buffer_content(&peer->in).data;
    return (struct frame){.size = get_u32(at), .stream = get_u32(at + 4), .type = at[8]};
}

static void end_discarding(struct ttrpc_peer *peer)
{
    peer->frames++;
    if (peer->discarded_request)
        refuse(peer, peer->discarded_stream, peer->discarded_status, peer->discarded_reason);
}

static void begin_discarding(struct ttrpc_peer *peer, enum ttrpc_status status, const char *reason)
{
    struct frame frame = read_header(peer);
    buffer_consume(&peer->in, HEADER);
    peer->discarding = frame.size;
    peer->discarded_stream = frame.stream;
    peer->discarded_request = frame.type == TYPE_REQUEST;
    peer->discarded_status = status;
    peer->discarded_reason = reason;
    if (!peer->discarded_request)
        ignore(frame.stream, frame.type);
    if (frame.size > HOPELESS) {
        end_discarding(peer);
        buffer_reset(&peer->in);
        peer->discarding = 0;
        peer->lost = true;
    }
}

/* How many of these bytes belong to the frame that is read over; its end is answered. */
static size_t discard(struct ttrpc_peer *peer, size_t have)
{
    size_t size = have < peer->discarding ? have : peer->discarding;
    peer->discarding -= size;
    if (peer->discarding == 0)
        end_discarding(peer);
    return size;
}

static bool has_room(const struct ttrpc_peer *peer, size_t size, bool entitled)
{
    return entitled || peer->in.size + size <= SMALL || buffer_held() + size <= BUDGET;
}

void ttrpc_receive(struct ttrpc_peer *peer, struct span bytes, bool entitled)
{
    if (peer->lost)
        return;
    if (peer->discarding == 0 && peer->in.size >= HEADER) {
        if (has_room(peer, bytes.size, entitled))
            buffer_append(&peer->in, bytes.data, bytes.size);
        else
            peer->in.failed = true;
        if (!peer->in.failed)
            return;
        peer->in.failed = false;
        begin_discarding(peer, TTRPC_RESOURCE_EXHAUSTED, "no memory for so large a frame now");
        buffer_consume(&peer->in, discard(peer, peer->in.size));
    }
    size_t over = peer->discarding > 0 ? discard(peer, bytes.size) : 0;
    buffer_append(&peer->in, bytes.data + over, bytes.size - over);
    if (peer->in.failed)
        ttrpc_lose(peer);
}

bool ttrpc_process(struct ttrpc_peer *peer)
{
    try_waiting(peer);
    while (!ttrpc_congested(peer) && !ttrpc_broken(peer)) {
        if (peer->discarding > 0)
            buffer_consume(&peer->in, discard(peer, peer->in.size));
        struct span in = buffer_content(&peer->in);
        if (in.size < HEADER || peer->discarding > 0)
            return false;
        struct frame frame = read_header(peer);
        if (frame.size > TTRPC_LARGEST) {
            begin_discarding(peer, TTRPC_INVALID_ARGUMENT, "the frame is larger than 4 MiB");
            continue;
        }
        if (in.size - HEADER < frame.size)
            return false;
        frame.payload = (struct span){in.data + HEADER, frame.size};
        handle(peer, &frame);
        peer->frames++;
        buffer_consume(&peer->in, HEADER + (size_t)frame.size);
    }
    return true;
}

bool ttrpc_congested(const struct ttrpc_peer *peer)
{
    return peer->out.size >= ENOUGH_WAITING;
}

bool ttrpc_broken(const struct ttrpc_peer *peer)
{
    return peer->out.failed;
}

bool ttrpc_idle(const struct ttrpc_peer *peer)
{
    return !ttrpc_half_way(peer) && !peer->lost && peer->out.size == 0;
}

bool ttrpc_half_way(const struct ttrpc_peer *peer)
{
    return peer->in.size > 0 || peer->discarding > 0;
}

void ttrpc_lose(struct ttrpc_peer *peer)
{
    bool ending = peer->ending;
    ttrpc_reset(peer);
    peer->ending = ending;
    peer->lost = true;
}

void ttrpc_written(struct ttrpc_peer *peer, size_t size)
{
    buffer_consume(&peer->out, size);
    if (size > peer->opening)
        peer->opened = false;
    peer->opening -= size < peer->opening ? size : peer->opening;
}

void ttrpc_reset(struct ttrpc_peer *peer)
{
    forget_waiting(peer);
    buffer_reset(&peer->in);
    buffer_reset(&peer->out);
    *peer = (struct ttrpc_peer){0};
}
