/* A process of a container as the agent sees it: its set-up, its streams, its end. */
#ifndef AGENT_PROCESS_H
#define AGENT_PROCESS_H

#include "child.h"
#include "loop.h"
#include "spawn.h"
#include "ttrpc.h"

enum { ID_SIZE = 256 };

enum process_state {
    PROCESS_SETTING_UP,
    PROCESS_READY, /* the first one of a container, until process_go */
    PROCESS_EXECUTING,
    PROCESS_RUNNING, /* or it has ended: see `alive` */
    PROCESS_FAILED, /* its program was never started: see `failure` */
};

/* Whoever waits for a stream waits for its address, and who wants to write first for its turn: the queue is the address
 * of `writers`. fd -1: closed. */
struct stream {
    struct watch watch;
    char writers;
};

struct process {
    struct process *next;
    uint64_t serial; /* never given twice */
    char id[ID_SIZE];
    enum process_state state;
    struct failure failure;
    struct child child;
    bool alive;
    int status; /* its exit code, or 128 and its signal */
    int64_t ended_at;
    int64_t delivered_at; /* somebody was told the status: it is over for all who did not ask before; 0: not yet */
    bool terminal;
    struct watch channel;
    struct stream in;
    struct stream out; /* with a terminal: all of it */
    struct stream err;
    void (*changed)(struct process *process); /* its state, or it has ended; whoever waits for the process is woken */
    void *owner;
};

/* NULL, and the failure. */
struct process *process_start(const char *id, const struct plan *plan, void (*changed)(struct process *process),
                              void *owner, struct failure *failure);
bool process_go(struct process *process);
bool process_signal(const struct process *process, int number);
/* The process has no handler for it. */
bool process_lacks_handler(const struct process *process, int number);
/* No call finds it any more; if it runs, it is on its own. */
void process_free(struct process *process);
/* All there are, until they are freed. */
size_t process_count(void);

/* The bodies of the calls. */
enum ttrpc_status process_read(struct process *process, struct stream *stream, size_t size, struct ttrpc_call *call);
enum ttrpc_status process_write(struct process *process, struct span data, struct ttrpc_call *call);
enum ttrpc_status process_close_input(struct process *process, struct ttrpc_call *call);

#endif
