/* The one epoll: whoever has a descriptor to wait for embeds a watch and says what is done when it is ready. */
#ifndef AGENT_LOOP_H
#define AGENT_LOOP_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>

struct watch {
    int fd;
    void (*ready)(struct watch *watch, uint32_t events);
};

/* What embeds a watch, from the watch. */
#define LOOP_OWNER(watch, type, member) ((type *)(void *)((char *)(watch) - offsetof(type, member)))

bool loop_begin(void);
/* False, and errno, when the kernel will not. The descriptor stays the caller's. */
bool loop_watch(struct watch *watch, uint32_t events);
/* Before the descriptor is closed. Events that have come and not been seen to are forgotten as well. */
void loop_forget(struct watch *watch);
/* Wait for at most so many milliseconds (-1: no limit) and see to what is ready. */
void loop_turn(int timeout_ms);

#endif
