/* The services: grpc.Health whole, and of Kata's grpc.AgentService what needs no container. */
#include "services.h"

#include "guest.h"
#include "ttrpc.h"
#include "version.h"
#include "wire.h"

#include <stdio.h>
#include <unistd.h>

#define API_VERSION "0.0.1" /* Kata's, unchanged since 2.0 */

enum { SERVING = 1 };

static bool is_init;

void services_set_init(bool init)
{
    is_init = init;
}

/* The generated code of the Rust agent answers so before its method is reached. */
static enum ttrpc_status undecodable(struct ttrpc_call *call, const char *message)
{
    snprintf(call->reason, sizeof call->reason, "the payload is no %s", message);
    return TTRPC_UNKNOWN;
}

static bool decode_check(struct span bytes)
{
    struct wire_reader reader = wire_read(bytes);
    struct wire_field field;
    while (wire_next(&reader, &field))
        if (field.tag == WIRE_TAG(1, WIRE_BYTES) && !wire_is_utf8(field.bytes))
            return false;
    return !reader.malformed;
}

static enum ttrpc_status health_check(struct ttrpc_call *call)
{
    if (!decode_check(call->request))
        return undecodable(call, "grpc.CheckRequest");
    wire_put_uint(&call->reply, 1, SERVING);
    return TTRPC_OK;
}

static enum ttrpc_status health_version(struct ttrpc_call *call)
{
    if (!decode_check(call->request))
        return undecodable(call, "grpc.CheckRequest");
    wire_put_text(&call->reply, 1, API_VERSION);
    wire_put_text(&call->reply, 2, AGENT_VERSION);
    return TTRPC_OK;
}

/* Handlers, seccomp and extra features stay out of it until there are any. */
static struct buffer agent_details(void)
{
    struct buffer details = {0};
    wire_put_text(&details, 1, AGENT_VERSION);
    wire_put_uint(&details, 2, is_init);
    return details;
}

static enum ttrpc_status get_guest_details(struct ttrpc_call *call)
{
    struct wire_reader reader = wire_read(call->request);
    struct wire_field field;
    bool block_size = false;
    bool probe = false;
    while (wire_next(&reader, &field)) {
        if (field.tag == WIRE_TAG(1, WIRE_VARINT))
            block_size = field.value != 0;
        else if (field.tag == WIRE_TAG(2, WIRE_VARINT))
            probe = field.value != 0;
    }
    if (reader.malformed)
        return undecodable(call, "grpc.GuestDetailsRequest");
    struct buffer details = agent_details();
    wire_put_uint(&call->reply, 1, block_size ? guest_memory_block_size() : 0);
    wire_put_message(&call->reply, 2, &details);
    wire_put_uint(&call->reply, 3, probe && guest_has_memory_probe());
    buffer_reset(&details);
    return TTRPC_OK;
}

static enum ttrpc_status destroy_sandbox(struct ttrpc_call *call)
{
    struct wire_reader reader = wire_read(call->request);
    struct wire_field field;
    while (wire_next(&reader, &field))
        ;
    if (reader.malformed)
        return undecodable(call, "grpc.DestroySandboxRequest");
    call->ending = true;
    return TTRPC_OK;
}

static const struct ttrpc_method_row health[] = {
    {"Check", health_check},
    {"Version", health_version},
    {NULL, NULL},
};

/* Methods of Kata's that are not here answer UNIMPLEMENTED, as names that nobody has do. */
static const struct ttrpc_method_row agent_service[] = {
    {"GetGuestDetails", get_guest_details},
    {"DestroySandbox", destroy_sandbox},
    {NULL, NULL},
};

const struct ttrpc_service_row ttrpc_services[] = {
    {"grpc.Health", health},
    {"grpc.AgentService", agent_service},
    {NULL, NULL},
};
