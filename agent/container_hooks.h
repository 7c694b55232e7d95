/* The hooks of an OCI description, each told the container's state. */
#ifndef AGENT_CONTAINER_HOOKS_H
#define AGENT_CONTAINER_HOOKS_H

#include "failure.h"
#include "messages.h"

#include <sys/types.h>

struct container_hooks_state {
    const char *id;
    const char *status; /* "creating", "created", "running", "stopped" */
    pid_t pid;
    const struct pairs *annotations;
};

/* The state as the OCI specification spells it in JSON, ended by a NUL. */
void container_hooks_put_state(struct buffer *out, const struct container_hooks_state *state);
/* One after the other, until one fails. */
bool container_hooks_run(const struct oci_hook *hooks, size_t count, const struct container_hooks_state *state,
                         struct failure *failure);

#endif
