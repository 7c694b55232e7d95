/* The table of containers, for the modules that container.h is made of. */
#ifndef AGENT_CONTAINERS_H
#define AGENT_CONTAINERS_H

#include "arena.h"
#include "cgroup.h"
#include "process.h"
#include "seccomp.h"
#include "ttrpc.h"

enum {
    CONTAINERS = 1000, /* at most; and as many processes */
    PROCESSES = 1000,
};

enum container_state {
    CONTAINER_CREATING, /* its first process sets itself up */
    CONTAINER_CREATED,
    CONTAINER_STARTING, /* that one executes its program */
    CONTAINER_RUNNING,
    CONTAINER_STOPPED,
    CONTAINER_FAILING, /* it could not be made, and what was made goes */
    CONTAINER_FAILED, /* only the reason is left, for whoever wanted it */
};

struct container {
    struct container *next;
    uint64_t serial; /* never given twice */
    char id[ID_SIZE];
    enum container_state state;
    struct failure failure; /* of CreateContainer or StartContainer */
    bool paused;
    bool allow_mknod;
    bool shares_pids;
    struct cgroup cgroup;
    struct seccomp_filter filter;
    struct process *first; /* its id is "" here */
    struct process *processes; /* the others */
    int64_t changed_at; /* a process ended last */
    int oom_watch; /* of oom.c; -1: none */
    unsigned long oom_kills;
    struct arena arena; /* what it was asked for */
    struct create_container_request request;
    struct oci_device *devices;
    size_t device_count;
};

/* --- container.c --- */

/* By its id; never one that has failed. */
struct container *container_find(const char *id);
struct container *container_with(uint64_t serial);
/* INVALID_ARGUMENT for an id that nobody has. */
struct container *container_look_up(struct ttrpc_call *call, const char *id);
/* A process by a call's words, and by call->memo once that is set: a call that waits for a process gets that one. */
struct process *container_process(struct ttrpc_call *call, struct container *container, const char *exec_id);
bool container_valid_id(const char *id);
/* The one whose PID namespace others share, the oldest that lives: a runtime makes a pod's pause container first, and
 * only of those that come after it says that they share. NULL: nobody is there. */
struct container *container_with_pids(void);
/* A new row, all zero but for its id and what is never zero; the failure is told when the table is full. */
struct container *container_add(const char *id, struct failure *failure);
/* Nothing of it runs any more: what it holds is given back, the row stays. */
void container_release(struct container *container);
void container_free(struct container *container);
/* All that is left of its processes is killed. */
void container_kill(struct container *container);
/* None is left. */
bool container_is_dead(const struct container *container);
void container_hooks(const struct container *container, struct container_hooks_state *state, const char *status);
/* What is over goes: processes that nobody asks for any more, and what there was of containers that failed. */
void container_tidy(void);

/* --- container_create.c --- */

enum ttrpc_status container_create(struct ttrpc_call *call);
enum ttrpc_status container_start(struct ttrpc_call *call);
enum ttrpc_status container_exec(struct ttrpc_call *call);

/* --- oom.c --- */

void oom_watch(struct container *container);
void oom_forget(struct container *container);
enum ttrpc_status oom_next(struct ttrpc_call *call);

#endif
