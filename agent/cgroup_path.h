/* From Linux.CgroupsPath to a path below the agent's own cgroup. */
#ifndef AGENT_CGROUP_PATH_H
#define AGENT_CGROUP_PATH_H

#include "failure.h"

#include <stddef.h>

/* "a/b/c", never empty, no component of it odd. */
bool cgroup_path(const char *asked, char *path, size_t size, struct failure *failure);

#endif
