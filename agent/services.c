/* The services: grpc.Health whole, and Kata's grpc.AgentService as far as modules have rows of it. */
#include "services.h"

#include "container.h"
#include "copyfile.h"
#include "guest.h"
#include "hotplug.h"
#include "metrics.h"
#include "network.h"
#include "sandbox.h"
#include "storage.h"
#include "ttrpc.h"
#include "version.h"
#include "wire.h"

#include <stddef.h>

#define API_VERSION "0.0.1" /* Kata's, unchanged since 2.0 */

enum { SERVING = 1 };

static bool is_init;

void services_set_init(bool init)
{
    is_init = init;
}

static enum ttrpc_status health_check(struct ttrpc_call *call)
{
    struct check_request request;
    if (!ttrpc_decode(call, &message_check_request, &request))
        return call->failure.status;
    wire_put_uint(&call->reply, 1, SERVING);
    return TTRPC_OK;
}

static enum ttrpc_status health_version(struct ttrpc_call *call)
{
    struct check_request request;
    if (!ttrpc_decode(call, &message_check_request, &request))
        return call->failure.status;
    wire_put_text(&call->reply, 1, API_VERSION);
    wire_put_text(&call->reply, 2, AGENT_VERSION);
    return TTRPC_OK;
}

static struct buffer agent_details(void)
{
    struct buffer details = {0};
    wire_put_text(&details, 1, AGENT_VERSION);
    wire_put_uint(&details, 2, is_init);
    for (const char *const *name = storage_device_handlers; *name != NULL; name++)
        wire_put_text(&details, 3, *name);
    for (const char *const *name = storage_handlers; *name != NULL; name++)
        wire_put_text(&details, 4, *name);
    wire_put_uint(&details, 5, container_supports_seccomp());
    return details;
}

static enum ttrpc_status get_guest_details(struct ttrpc_call *call)
{
    struct guest_details_request request;
    if (!ttrpc_decode(call, &message_guest_details_request, &request))
        return call->failure.status;
    struct buffer details = agent_details();
    wire_put_uint(&call->reply, 1, request.mem_block_size ? guest_memory_block_size() : 0);
    wire_put_message(&call->reply, 2, &details);
    wire_put_uint(&call->reply, 3, request.mem_hotplug_probe && guest_has_memory_probe());
    buffer_reset(&details);
    return TTRPC_OK;
}

static const struct ttrpc_method_row health[] = {
    {"Check", health_check},
    {"Version", health_version},
    {NULL, NULL},
};

static const struct ttrpc_method_row details[] = {
    {"GetGuestDetails", get_guest_details},
    {NULL, NULL},
};

static const struct ttrpc_method_row *const health_groups[] = {health, NULL};

/* Methods of Kata's that are not here answer UNIMPLEMENTED, as names that nobody has do. */
static const struct ttrpc_method_row *const agent_groups[] = {
    details,       sandbox_calls, network_calls, hotplug_calls, container_calls,
    storage_calls, copyfile_calls, metrics_calls, NULL,
};

const struct ttrpc_service_row ttrpc_services[] = {
    {"grpc.Health", health_groups},
    {"grpc.AgentService", agent_groups},
    {NULL, NULL},
};
