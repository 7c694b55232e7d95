/* The child's side of spawn.h. */
#ifndef AGENT_SPAWNED_H
#define AGENT_SPAWNED_H

#include "spawn.h"

#include <sys/resource.h>

struct spawned_files { /* the child's ends; -1 where there is none */
    int in;
    int out;
    int err;
    int channel;
    struct rlimit limit; /* of open files, as it was before the agent needed more */
};

struct spawned_report {
    bool ready;
    struct failure failure;
};

_Noreturn void spawned_main(const struct plan *plan, const struct spawned_files *files);

#endif
