/* Capabilities by their names, and how a process comes to have only those. */
#ifndef AGENT_CAPABILITIES_H
#define AGENT_CAPABILITIES_H

#include "failure.h"
#include "messages.h"

struct capabilities {
    uint64_t bounding;
    uint64_t effective;
    uint64_t inheritable;
    uint64_t permitted;
    uint64_t ambient;
};

/* INVALID_ARGUMENT for a name that is none. NULL lists nothing. CAP_MKNOD is left out unless allowed: who can make a
 * node for the disk that the guest's root is on owns the guest (CVE-2026-24834). The cgroup's
 * rule on devices denies that disk all the same. */
bool capabilities_read(const struct oci_capabilities *names, bool allow_mknod, struct capabilities *capabilities,
                       struct failure *failure);
/* Before the user changes: what is not in the bounding set goes for good, and the others outlast the change. */
bool capabilities_limit(const struct capabilities *capabilities);
/* After it: what root may is allowed once more. */
bool capabilities_raise(void);
/* At last. */
bool capabilities_apply(const struct capabilities *capabilities);

#endif
