/* Programs of the guest that run to their end while the agent waits: modprobe, hooks. Short ones: the loop stands still. */
#ifndef AGENT_PROGRAM_H
#define AGENT_PROGRAM_H

#include "failure.h"

#include <stddef.h>

enum { PROGRAM_LONGEST = 60 }; /* seconds */

struct program {
    const char *path;
    const char *const *argv; /* NULL ends them, as in execve */
    const char *const *env; /* NULL: the agent's */
    const char *input; /* on its standard input; NULL: nothing */
    int seconds; /* after which it is killed, with all that it started; 0, and more: PROGRAM_LONGEST */
};

/* True: it ended with 0. Else the failure says how it ended and what its last words on standard error were. What it left
 * running when it ended by itself is left alone. */
bool program_run(const struct program *program, struct failure *failure);

#endif
