/* Paths that a request names, walked without ever following a symbolic link: what a container has planted leads
 * nowhere. The one link that images have and runtimes use, /var/run, is spelled out. */
#ifndef AGENT_PLACE_H
#define AGENT_PLACE_H

#include "failure.h"

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

enum { PLACE_SIZE = 4096 }; /* PATH_MAX, with the NUL */

/* "/a//b/./c/" becomes "/a/b/c". False: relative, with "..", or too long; the failure calls it `what`. */
bool place_normalize(const char *path, const char *what, char normal[PLACE_SIZE], struct failure *failure);
/* `path` is `parent` or lies below it. Both are normal. */
bool place_is_below(const char *path, const char *parent);
/* openat2(2) beneath `directory` (AT_FDCWD: an absolute path). -1 and errno; ELOOP: a symbolic link is in the way. */
int place_open(int directory, const char *path, int flags);
/* The directory, made with its parents as far as it is not there, as an O_PATH descriptor. `made`: the last part
 * is new. */
int place_make(const char *normal, mode_t mode, bool *made);
/* The parent of a normal path, as an O_PATH descriptor, and the last part. */
int place_open_parent(const char *normal, const char **name);

/* How a path is spelled that is open as a descriptor: mount(2) and others take no descriptors. */
struct place_name {
    char text[64];
};
struct place_name place_name(int descriptor);

#endif
