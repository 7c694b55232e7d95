#include "ttrpc.h"

#include "log.h"
#include "wire.h"

#include <inttypes.h>
#include <stdio.h>

#define SUBSYSTEM "ttrpc"

enum {
    HEADER = 10,
    TYPE_REQUEST = 1,
    TYPE_RESPONSE = 2,
    ENOUGH_WAITING = 256 * 1024,
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
};

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

/* timeout_nano is not kept: no method of ours waits for anything yet. */
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
    for (const struct ttrpc_method_row *row = service->methods; row->name != NULL; row++)
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

static void call_method(struct ttrpc_peer *peer, uint32_t stream, const struct request *request)
{
    struct ttrpc_call call = {.request = request->payload};
    const struct ttrpc_service_row *service = find_service(request->service);
    if (service == NULL) {
        snprintf(call.reason, sizeof call.reason, "the service %.*s does not exist", quoted(request->service),
                 text(request->service));
        refuse(peer, stream, TTRPC_INVALID_ARGUMENT, call.reason);
        return;
    }
    ttrpc_method *method = find_method(service, request->method);
    if (method == NULL) {
        snprintf(call.reason, sizeof call.reason, "%s/%.*s is not implemented", service->name,
                 quoted(request->method), text(request->method));
        refuse(peer, stream, TTRPC_UNIMPLEMENTED, call.reason);
        return;
    }
    LOG(LOG_DEBUG, SUBSYSTEM, "call", LOG_SPAN("service", request->service), LOG_SPAN("method", request->method));
    enum ttrpc_status status = method(&call);
    if (status == TTRPC_OK && call.reply.failed)
        refuse(peer, stream, TTRPC_RESOURCE_EXHAUSTED, "no memory for the answer");
    else if (status == TTRPC_OK)
        answer(peer, stream, TTRPC_OK, "", buffer_content(&call.reply));
    else
        refuse(peer, stream, status, call.reason);
    peer->ending |= call.ending;
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

static void begin_discarding(struct ttrpc_peer *peer, const struct frame *frame)
{
    buffer_consume(&peer->in, HEADER);
    peer->discarding = frame->size;
    peer->discarded_stream = frame->stream;
    peer->discarded_request = frame->type == TYPE_REQUEST;
    if (!peer->discarded_request)
        ignore(frame->stream, frame->type);
}

/* False: the frame goes on in bytes that have not come yet. */
static bool discard(struct ttrpc_peer *peer)
{
    size_t size = peer->in.size < peer->discarding ? peer->in.size : peer->discarding;
    buffer_consume(&peer->in, size);
    peer->discarding -= size;
    if (peer->discarding > 0)
        return false;
    if (peer->discarded_request)
        refuse(peer, peer->discarded_stream, TTRPC_INVALID_ARGUMENT, "the frame is larger than 4 MiB");
    return true;
}

bool ttrpc_process(struct ttrpc_peer *peer)
{
    while (!ttrpc_congested(peer) && !ttrpc_broken(peer)) {
        if (peer->discarding > 0) {
            if (!discard(peer))
                return false;
            continue;
        }
        struct span in = buffer_content(&peer->in);
        if (in.size < HEADER)
            return false;
        struct frame frame = {.size = get_u32(in.data), .stream = get_u32(in.data + 4), .type = in.data[8]};
        if (frame.size > TTRPC_LARGEST) {
            begin_discarding(peer, &frame);
            continue;
        }
        if (in.size - HEADER < frame.size)
            return false;
        frame.payload = (struct span){in.data + HEADER, frame.size};
        handle(peer, &frame);
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
    return peer->in.failed || peer->out.failed;
}

bool ttrpc_idle(const struct ttrpc_peer *peer)
{
    return !ttrpc_half_way(peer) && peer->out.size == 0;
}

bool ttrpc_half_way(const struct ttrpc_peer *peer)
{
    return peer->in.size > 0 || peer->discarding > 0;
}

void ttrpc_forget(struct ttrpc_peer *peer)
{
    buffer_reset(&peer->in);
    peer->discarding = 0;
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
    buffer_reset(&peer->in);
    buffer_reset(&peer->out);
    *peer = (struct ttrpc_peer){0};
}
