/* The debug console (agent.debug_console, agent.debug_console_vport=) and the log on vsock (agent.log_vport=). */
#ifndef AGENT_DEBUG_H
#define AGENT_DEBUG_H

#include "loop.h"

/* Unix sockets that stand in for the ports, in tests; NULL: as the kernel's words say. */
struct debug_options {
    const char *console;
    const char *log;
};

/* Before the first line of the log: what is logged from now on is kept for the host. */
void debug_begin(const struct debug_options *options);
/* With the loop there: listen, and give the console of the guest a shell if the words say so. */
void debug_listen(void);

/* --- between debug*.c --- */

struct listener {
    struct watch watch;
    void (*accepted)(int stream); /* non-blocking; owned from then on */
    const char *what;
};

/* Keep lines for whoever comes. */
void debug_log_begin(void);
void debug_log_accepted(int stream);
/* A shell on a terminal of its own, carried by the stream. */
void debug_console_accepted(int stream);
/* A shell on /dev/console, and another one when it ends. */
void debug_console_local(void);

#endif
