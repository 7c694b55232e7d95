#define _GNU_SOURCE
#include "sandbox.h"

#include "container.h"

#include <stddef.h>

static enum ttrpc_status destroy_sandbox(struct ttrpc_call *call)
{
    struct empty request;
    if (!ttrpc_decode(call, &message_empty, &request))
        return call->failure.status;
    container_destroy_all();
    call->ending = true;
    return TTRPC_OK;
}

const struct ttrpc_method_row sandbox_calls[] = {
    {"DestroySandbox", destroy_sandbox},
    {NULL, NULL},
};
