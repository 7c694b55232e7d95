#include "loop.h"

#include <stddef.h>

enum { EVENTS = 32 };

static int epoll = -1;
static struct epoll_event batch[EVENTS];
static int ready;

bool loop_begin(void)
{
    epoll = epoll_create1(EPOLL_CLOEXEC);
    return epoll >= 0;
}

bool loop_watch(struct watch *watch, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = watch};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, watch->fd, &event) == 0;
}

void loop_forget(struct watch *watch)
{
    struct epoll_event unused = {0};
    epoll_ctl(epoll, EPOLL_CTL_DEL, watch->fd, &unused);
    for (int i = 0; i < ready; i++)
        if (batch[i].data.ptr == watch)
            batch[i].data.ptr = NULL;
}

void loop_turn(int timeout_ms)
{
    ready = epoll_wait(epoll, batch, EVENTS, timeout_ms);
    for (int i = 0; i < ready; i++) {
        struct watch *watch = batch[i].data.ptr;
        if (watch != NULL)
            watch->ready(watch, batch[i].events);
    }
    ready = 0;
}
