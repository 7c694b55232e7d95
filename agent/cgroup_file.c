#define _GNU_SOURCE
#include "cgroup_file.h"

#include "small_file.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

bool cgroup_read(int directory, const char *name, char *text, size_t size)
{
    return small_file_take(openat(directory, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW), text, size);
}

bool cgroup_write(int directory, const char *name, const char *text)
{
    /* O_NONBLOCK: newer kernels (6.16) then take a memory.max at once and reclaim when memory is next asked for. */
    return small_file_put(openat(directory, name, O_WRONLY | O_TRUNC | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK), text);
}

uint64_t cgroup_number(const char *text, const char *key)
{
    size_t length = strlen(key);
    for (const char *line = text; line != NULL; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, length) == 0 && line[length] == ' ')
            return strtoull(line + length + 1, NULL, 10);
    }
    return 0;
}
