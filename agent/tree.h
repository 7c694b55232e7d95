/* Directories of the agent's own that are taken down: what is mounted below them, then what is in them. */
#ifndef AGENT_TREE_H
#define AGENT_TREE_H

#include <stdbool.h>
#include <sys/types.h>

/* As mkdir -p; false and errno. */
bool tree_make(const char *path, mode_t mode);
/* Whatever is mounted on `path` or below it is unmounted, last first. */
void tree_unmount(const char *path);
/* Delete the directory `path` and all that is in it, but never what is mounted in it. A tree of any depth takes three
 * descriptors, no recursion. What cannot be deleted stays: false and errno. */
bool tree_remove(const char *path);

#endif
