/* The small text files of a cgroup. */
#ifndef AGENT_CGROUP_FILE_H
#define AGENT_CGROUP_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The text, with a NUL behind it and cut to the room there is; false, an empty text and errno when it cannot be read. */
bool cgroup_read(int directory, const char *name, char *text, size_t size);
/* False, and errno: what the kernel thinks of the value. */
bool cgroup_write(int directory, const char *name, const char *text);
/* The number behind `key` in a text whose lines are "key number"; 0: there is none. */
uint64_t cgroup_number(const char *text, const char *key);

#endif
