/* Namespaces that all containers of a pod enter: no process lives in them, bind mounts keep them. */
#ifndef AGENT_SHARED_H
#define AGENT_SHARED_H

#include "failure.h"

/* Make both; `hostname`, unless it is empty, is set in the new UTS namespace. What an earlier agent left is replaced. */
bool shared_make(const char *hostname, struct failure *failure);
/* Processes that are in them stay there. */
void shared_remove(void);
/* The file that keeps the "ipc" or "uts" namespace; NULL: no such kind is shared, or none is made. */
const char *shared_path(const char *kind);

#endif
