/* Settings that processes have in procfs, written through a procfs of our own: whatever a container mounted on its
 * /proc, a setting goes where it belongs. */
#ifndef AGENT_KERNEL_SETTINGS_H
#define AGENT_KERNEL_SETTINGS_H

#include "failure.h"
#include "messages.h"

struct settings_scope {
    bool ipc; /* namespaces that are the container's own */
    bool uts;
    bool net;
};

/* Those that belong to a namespace of the container, no others. */
bool settings_check(const struct pairs *sysctl, const struct settings_scope *scope, struct failure *failure);
/* For the calling process. */
bool settings_apply(const struct pairs *sysctl, int64_t oom_score_adj, struct failure *failure);

#endif
