/* Containers in which the kernel killed something for want of memory, in the order in which it was seen. */
#define _GNU_SOURCE
#include "containers.h"

#include "clock.h"
#include "log.h"
#include "wire.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

#define SUBSYSTEM "oom"

enum { QUEUE = 64 }; /* when nobody asks, the oldest are forgotten */

static char queue[QUEUE][ID_SIZE];
static size_t queue_start;
static size_t queue_size;
static struct watch inotify = {.fd = -1};
static struct container *watched[CONTAINERS];

static void enqueue(const char *id)
{
    if (queue_size == QUEUE) {
        queue_start = (queue_start + 1) % QUEUE;
        queue_size--;
    }
    snprintf(queue[(queue_start + queue_size) % QUEUE], ID_SIZE, "%s", id);
    queue_size++;
    ttrpc_wake(&queue);
}

static void look(struct container *container)
{
    unsigned long kills = cgroup_oom_kills(&container->cgroup);
    if (kills <= container->oom_kills)
        return;
    container->oom_kills = kills;
    LOG(LOG_WARN, SUBSYSTEM, "a container ran out of memory", LOG_STRING("container-id", container->id));
    enqueue(container->id);
}

static void look_at_all(void)
{
    for (size_t i = 0; i < CONTAINERS; i++)
        if (watched[i] != NULL)
            look(watched[i]);
}

static void inotify_ready(struct watch *watch, uint32_t events)
{
    char changes[4096];
    (void)events;
    while (read(watch->fd, changes, sizeof changes) > 0)
        ;
    look_at_all();
}

static bool begin(void)
{
    if (inotify.fd >= 0)
        return true;
    inotify = (struct watch){.fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC), .ready = inotify_ready};
    if (inotify.fd < 0)
        return false;
    if (loop_watch(&inotify, EPOLLIN))
        return true;
    close(inotify.fd);
    inotify.fd = -1;
    return false;
}

static struct container **find(const struct container *container)
{
    for (size_t i = 0; i < CONTAINERS; i++)
        if (watched[i] == container)
            return &watched[i];
    return NULL;
}

void oom_watch(struct container *container)
{
    char path[PATH_MAX];
    struct container **place = find(NULL);
    snprintf(path, sizeof path, "%s/memory.events", container->cgroup.path);
    if (place == NULL || !begin())
        return;
    container->oom_watch = inotify_add_watch(inotify.fd, path, IN_MODIFY);
    if (container->oom_watch < 0) {
        int number = errno;
        LOG(LOG_DEBUG, SUBSYSTEM, "no news of a container's memory", LOG_STRING("container-id", container->id),
            LOG_ERRNO(number));
        return;
    }
    container->oom_kills = cgroup_oom_kills(&container->cgroup);
    *place = container;
}

void oom_forget(struct container *container)
{
    struct container **place = find(container);
    if (place == NULL)
        return;
    look(container); /* the news of its last moments may not have been read yet */
    inotify_rm_watch(inotify.fd, container->oom_watch);
    container->oom_watch = -1;
    *place = NULL;
}

enum ttrpc_status oom_next(struct ttrpc_call *call)
{
    if (queue_size == 0)
        return ttrpc_later(call, &queue, CLOCK_NEVER);
    wire_put_text(&call->reply, 1, queue[queue_start]);
    queue_start = (queue_start + 1) % QUEUE;
    queue_size--;
    return TTRPC_OK;
}
