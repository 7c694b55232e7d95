/* The table of containers and the end of each. */
#define _GNU_SOURCE
#include "container.h"

#include "bundle.h"
#include "clock.h"
#include "containers.h"
#include "log.h"
#include "sandbox.h"
#include "storage.h"

#include <ctype.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SUBSYSTEM "container"

enum {
    KEPT_MS = 1000, /* after a status was told: for the calls that asked before, all of which are tried at once */
    LAST_MS = 100, /* for killed processes to be gone when the sandbox is destroyed */
};

static struct container *containers;
static uint64_t last_serial;

/* --- looking up --- */

bool container_valid_id(const char *id)
{
    size_t size = strlen(id);
    if (size < 2 || size >= ID_SIZE || !isalnum((unsigned char)id[0]))
        return false;
    for (size_t i = 1; i < size; i++)
        if (!isalnum((unsigned char)id[i]) && strchr("._-", id[i]) == NULL)
            return false;
    return true;
}

struct container *container_find(const char *id)
{
    for (struct container *container = containers; container != NULL; container = container->next)
        if (container->state != CONTAINER_FAILED && strcmp(container->id, id) == 0)
            return container;
    return NULL;
}

struct container *container_with(uint64_t serial)
{
    for (struct container *container = containers; container != NULL; container = container->next)
        if (container->serial == serial)
            return container;
    return NULL;
}

struct container *container_look_up(struct ttrpc_call *call, const char *id)
{
    container_tidy();
    struct container *container = container_find(id);
    if (container == NULL)
        failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "there is no container %.100s", id);
    return container;
}

struct container *container_with_pids(void)
{
    struct container *found = NULL;
    for (struct container *container = containers; container != NULL; container = container->next)
        if (container->first != NULL && container->first->alive)
            found = container; /* the oldest: new ones are put in front */
    return found;
}

static struct process *find_process(const struct container *container, const char *exec_id)
{
    if (exec_id[0] == '\0' || strcmp(exec_id, container->id) == 0)
        return container->first;
    for (struct process *process = container->processes; process != NULL; process = process->next)
        if (process->delivered_at == 0 && strcmp(process->id, exec_id) == 0)
            return process;
    return NULL;
}

static struct process *process_with(const struct container *container, uint64_t serial)
{
    if (container->first != NULL && container->first->serial == serial)
        return container->first;
    struct process *process = container->processes;
    while (process != NULL && process->serial != serial)
        process = process->next;
    return process;
}

struct process *container_process(struct ttrpc_call *call, struct container *container, const char *exec_id)
{
    struct process *process =
        call->memo != 0 ? process_with(container, call->memo) : find_process(container, exec_id);
    if (process != NULL && (call->memo != 0 || process->delivered_at == 0)) {
        call->memo = process->serial;
        return process;
    }
    failure_set(&call->failure, TTRPC_NOT_FOUND, "the container %.100s has no process %.100s", container->id,
                exec_id);
    return NULL;
}

/* --- rows --- */

static struct container *find_failed(void)
{
    struct container *found = NULL;
    for (struct container *container = containers; container != NULL; container = container->next)
        if (container->state == CONTAINER_FAILED)
            found = container; /* the oldest: new ones are put in front */
    return found;
}

static size_t count_containers(void)
{
    size_t count = 0;
    for (const struct container *container = containers; container != NULL; container = container->next)
        count++;
    return count;
}

struct container *container_add(const char *id, struct failure *failure)
{
    struct container *failed = find_failed();
    if (count_containers() >= CONTAINERS && failed != NULL)
        container_free(failed);
    struct container *container = count_containers() < CONTAINERS ? calloc(1, sizeof *container) : NULL;
    if (container == NULL) {
        failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "there are too many containers");
        return NULL;
    }
    snprintf(container->id, sizeof container->id, "%s", id);
    container->serial = ++last_serial;
    container->cgroup.directory = container->cgroup.devices = -1;
    container->oom_watch = -1;
    container->next = containers;
    containers = container;
    return container;
}

static void free_processes(struct container *container)
{
    while (container->processes != NULL) {
        struct process *next = container->processes->next;
        process_free(container->processes);
        container->processes = next;
    }
    if (container->first != NULL)
        process_free(container->first);
    container->first = NULL;
}

void container_release(struct container *container)
{
    oom_forget(container);
    free_processes(container);
    if (container->cgroup.directory >= 0)
        cgroup_remove(&container->cgroup);
    seccomp_reset(&container->filter);
    storage_release(container->id);
    bundle_remove(container->id);
    arena_reset(&container->arena);
    container->request = (struct create_container_request){0};
}

void container_free(struct container *container)
{
    for (struct container **at = &containers; *at != NULL; at = &(*at)->next)
        if (*at == container) {
            *at = container->next;
            break;
        }
    ttrpc_wake(container);
    free(container);
}

/* --- processes --- */

void container_kill(struct container *container)
{
    if (container->cgroup.directory >= 0)
        cgroup_kill(&container->cgroup);
    if (container->first != NULL)
        process_signal(container->first, SIGKILL);
    for (const struct process *process = container->processes; process != NULL; process = process->next)
        process_signal(process, SIGKILL);
}

bool container_is_dead(const struct container *container)
{
    if (container->first != NULL && container->first->alive)
        return false;
    for (const struct process *process = container->processes; process != NULL; process = process->next)
        if (process->alive)
            return false;
    return container->cgroup.directory < 0 || cgroup_is_empty(&container->cgroup);
}

static bool is_over(const struct process *process)
{
    int64_t then = process->state == PROCESS_FAILED ? process->ended_at : process->delivered_at;
    return !process->alive && then != 0 && clock_ms() - then >= KEPT_MS;
}

static void tidy(struct container *container)
{
    if (container->state == CONTAINER_FAILING && container_is_dead(container)) {
        container_release(container);
        container->state = CONTAINER_FAILED;
    }
    for (struct process **at = &container->processes; *at != NULL;) {
        struct process *process = *at;
        if (is_over(process)) {
            *at = process->next;
            process_free(process);
        } else {
            at = &process->next;
        }
    }
}

void container_tidy(void)
{
    for (struct container *container = containers; container != NULL; container = container->next)
        tidy(container);
}

void container_hooks(const struct container *container, struct container_hooks_state *state, const char *status)
{
    const struct oci_spec *spec = container->request.oci;
    *state = (struct container_hooks_state){
        .id = container->id,
        .status = status,
        .pid = container->first == NULL ? 0 : container->first->child.pid,
        .annotations = spec == NULL ? NULL : &spec->annotations,
    };
}

/* --- for the sandbox --- */

bool container_any(void)
{
    for (const struct container *container = containers; container != NULL; container = container->next)
        if (container->state != CONTAINER_FAILED)
            return true;
    return false;
}

static bool all_dead(void)
{
    for (const struct container *container = containers; container != NULL; container = container->next)
        if (!container_is_dead(container))
            return false;
    return true;
}

/* What was killed ends within a moment, and only then its cgroup and its mounts can go. */
void container_destroy_all(void)
{
    for (struct container *container = containers; container != NULL; container = container->next)
        container_kill(container);
    for (int i = 0; i < LAST_MS && !all_dead(); i++) {
        usleep(1000);
        child_reap();
    }
    if (!all_dead())
        LOG(LOG_WARN, SUBSYSTEM, "processes of containers would not end");
    while (containers != NULL) {
        struct container *container = containers;
        container_release(container);
        container_free(container);
    }
}
