#define _GNU_SOURCE
#include "cgroup_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool cgroup_read(int directory, const char *name, char *text, size_t size)
{
    text[0] = '\0';
    int file = openat(directory, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (file < 0)
        return false;
    size_t have = 0;
    ssize_t got = 0;
    while (have < size - 1) {
        got = read(file, text + have, size - 1 - have);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        have += (size_t)got;
    }
    int number = errno;
    close(file);
    text[got < 0 ? 0 : have] = '\0';
    errno = number;
    return got >= 0;
}

bool cgroup_write(int directory, const char *name, const char *text)
{
    /* O_NONBLOCK: newer kernels (6.16) then take a memory.max at once and reclaim when memory is next asked for. */
    int file = openat(directory, name, O_WRONLY | O_TRUNC | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (file < 0)
        return false;
    ssize_t wrote;
    do
        wrote = write(file, text, strlen(text));
    while (wrote < 0 && errno == EINTR);
    int number = errno;
    close(file);
    errno = number;
    return wrote >= 0;
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
