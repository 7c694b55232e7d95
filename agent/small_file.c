#define _GNU_SOURCE
#include "small_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

static void close_quietly(int file)
{
    int number = errno;
    close(file);
    errno = number;
}

bool small_file_take(int file, char *text, size_t size)
{
    text[0] = '\0';
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
    close_quietly(file);
    text[got < 0 ? 0 : have] = '\0';
    return got >= 0;
}

bool small_file_put(int file, const char *text)
{
    if (file < 0)
        return false;
    size_t size = strlen(text);
    ssize_t wrote;
    do
        wrote = write(file, text, size);
    while (wrote < 0 && errno == EINTR);
    close_quietly(file);
    return wrote == (ssize_t)size;
}

bool small_file_read(const char *path, char *text, size_t size)
{
    if (!small_file_take(open(path, O_RDONLY | O_CLOEXEC), text, size))
        return false;
    size_t length = strlen(text);
    if (length > 0 && text[length - 1] == '\n')
        text[length - 1] = '\0';
    return true;
}

bool small_file_write(const char *path, const char *text)
{
    return small_file_put(open(path, O_WRONLY | O_CLOEXEC), text);
}
