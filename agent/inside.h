/* Files below a root that somebody else filled: whatever links and ".." are in there, nothing outside is reached.
 *
 * `root` is a descriptor of a directory, paths are taken as seen from it, with or without a slash in front. The links
 * of procfs (/proc/self/fd/3, /proc/self/exe), which lead anywhere, are never followed. */
#ifndef AGENT_INSIDE_H
#define AGENT_INSIDE_H

#include "buffer.h"

#include <sys/types.h>

/* As open(2) with O_CLOEXEC; -1 and errno. */
int inside_open(int root, const char *path, int flags);
/* The same, but ELOOP where any part of the path is a symbolic link. */
int inside_open_straight(int root, const char *path, int flags);
/* Seen from where this process is: the path leads through one of procfs's links. */
bool inside_is_magic(const char *path);
/* An O_PATH descriptor of it, made with what is missing above it. */
int inside_make_directory(int root, const char *path);
int inside_make_file(int root, const char *path);
/* The directory that the last name of `path` is in, made where it is missing, and that name; EINVAL for "." or "..". */
int inside_make_parent(int root, const char *path, char *name, size_t size);
/* The content of a regular file of at most a MiB, ended by a NUL; it is the caller's to reset. */
bool inside_read(int root, const char *path, struct buffer *text);

#endif
