/* A container's cgroup, version 2: limits, numbers, freezing, killing, devices, and being told of an OOM kill. */
#ifndef AGENT_CGROUP_H
#define AGENT_CGROUP_H

#include "buffer.h"
#include "failure.h"
#include "messages.h"

#include <sys/types.h>

struct cgroup {
    char path[512]; /* absolute, below /sys/fs/cgroup */
    int directory; /* open; -1: none */
    int devices; /* the program that decides on devices; -1: none */
};

/* Make the cgroup that `path` names (Linux.CgroupsPath as a runtime sends it: "/kata/ID", or systemd's
 * "slice:prefix:name", which we lay out as that slice's directory), controllers enabled on the way down. It must not
 * be in use. All of them lie below the cgroup the agent itself was started in. */
bool cgroup_create(struct cgroup *cgroup, const char *path, struct failure *failure);
/* Apply limits; what is not set is left alone. NULL: none. */
bool cgroup_limit(const struct cgroup *cgroup, const struct oci_resources *resources, struct failure *failure);
/* Let the cgroup reach only the devices of the rules, those in `devices` and the usual ones (null, zero, full, random,
 * urandom, tty, console, ptmx, pts), never one of `denied`, whatever the rules say. Again: replaces what was said
 * before. False: nothing has changed. */
bool cgroup_limit_devices(struct cgroup *cgroup, const struct oci_device *devices, size_t count,
                          const struct oci_resources *resources, const dev_t *denied, size_t denied_count,
                          struct failure *failure);
/* Deny block devices to all that is below the agent's own cgroup. What a container's cgroup says, the container can take
 * away if it has CAP_SYS_ADMIN: it mounts its cgroup, and to detach a program from a cgroup that one can open needs no
 * capability. This cgroup is above the root of every container's cgroup namespace. Again: replaces what was said
 * before, also by an agent before this one. Nothing is said in the first cgroup of a machine whose PID 1 is another. */
bool cgroup_deny_to_all(const dev_t *denied, size_t count, struct failure *failure);
/* The cgroup above all containers; -1 and errno. */
int cgroup_open_home(void);
/* Done when cgroup_is_frozen says so: the kernel waits for processes that are in the middle of something. */
bool cgroup_freeze(const struct cgroup *cgroup, bool frozen, struct failure *failure);
bool cgroup_is_frozen(const struct cgroup *cgroup);
/* SIGKILL to all that is in it, frozen or not. */
bool cgroup_kill(const struct cgroup *cgroup);
/* The signal to each process in it, but `first_number` to the process `first`. */
void cgroup_signal(const struct cgroup *cgroup, int number, pid_t first, int first_number);
/* No process is in it or below it. */
bool cgroup_is_empty(const struct cgroup *cgroup);
/* grpc.CgroupStats, appended to `out`. */
void cgroup_put_stats(const struct cgroup *cgroup, struct buffer *out);
/* How many OOM kills there have been in it; the file memory.events is `modified` (inotify) when it changes. */
unsigned long cgroup_oom_kills(const struct cgroup *cgroup);
/* Remove it and what is below it; it must be empty. Also what above it was made for it and is empty now. */
void cgroup_remove(struct cgroup *cgroup);

#endif
