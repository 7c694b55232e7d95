/* Processes that the agent started, by number, until they have ended. */
#ifndef AGENT_CHILD_H
#define AGENT_CHILD_H

#include <stdbool.h>
#include <sys/types.h>

struct child {
    pid_t pid;
    void (*ended)(struct child *child, int status); /* status as waitpid gives it; the child is no longer listed */
    struct child *next;
};

/* At once after the fork, before the loop can turn. */
void child_add(struct child *child);
/* Nobody wants to hear of it any more; it is reaped all the same. */
void child_remove(struct child *child);
/* Collect every process that has ended, ours and the orphans that PID 1 inherits. */
void child_reap(void);
/* In a new process: signals as a program expects them. */
void child_reset_signals(void);

#endif
