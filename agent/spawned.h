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
    int numbers; /* a helper tells here whom it made; -1: there is no helper */
    struct rlimit limit; /* of open files, as it was before the agent needed more */
};

struct spawned_report {
    bool ready;
    struct failure failure;
};

/* What errno is when the first process of the namespace has ended. */
#define SPAWN_NO_SPLIT(number) \
    ((number) == ENOMEM ? "cannot start a process: its PID namespace may have ended" : "cannot start a process")

/* The first process of a container. */
_Noreturn void spawned_main(const struct plan *plan, const struct spawned_files *files);
/* The helper that makes all others, and these. */
_Noreturn void spawned_join(const struct plan *plan, const struct spawned_files *files);

#endif
