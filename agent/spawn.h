/* A process of a container: from the fork to the exec of its program. Parent and child talk by a socket; its end,
 * which the exec closes, says that the program runs. */
#ifndef AGENT_SPAWN_H
#define AGENT_SPAWN_H

#include "capabilities.h"
#include "cgroup.h"
#include "failure.h"
#include "container_hooks.h"
#include "messages.h"
#include "seccomp.h"

#include <sys/types.h>

enum { SPAWN_JOINS = 4 };

struct plan {
    const struct oci_process *process;
    const struct string_user *user; /* NULL: as the process says */
    struct capabilities capabilities;
    const struct seccomp_filter *filter;
    const struct cgroup *cgroup;
    int pids; /* a PID namespace to be born into; -1: a new one */
    /* The first process of a container: */
    const struct oci_spec *spec; /* NULL for all others */
    const struct oci_device *devices;
    size_t device_count;
    int joins[SPAWN_JOINS]; /* namespaces of others that it enters */
    size_t join_count;
    int fresh; /* CLONE_NEW… of its own */
    struct container_hooks_state state;
    /* All others: */
    int leader; /* a pidfd of the first one */
};

struct spawned {
    pid_t pid;
    int channel;
    int in; /* -1 with a terminal, which comes with SPAWN_READY */
    int out;
    int err;
};

enum spawn_event {
    SPAWN_NOTHING, /* yet */
    SPAWN_READY, /* the first process waits for spawn_go, others go on by themselves */
    SPAWN_FAILED,
    SPAWN_CLOSED, /* its program runs, or it is gone */
};

bool spawn(const struct plan *plan, struct spawned *spawned, struct failure *failure);
/* `terminal` is set with SPAWN_READY when there is one, else -1. */
enum spawn_event spawn_hear(int channel, int *terminal, struct failure *failure);
bool spawn_go(int channel);

#endif
