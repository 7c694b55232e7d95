/* A directory that somebody else has, too: what is written, named and taken away there. */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool done(struct answer *answer, int result, const char *what)
{
    return result == 0 || fail(answer, what);
}

bool probe_put(struct answer *answer, char **words, int count)
{
    (void)count;
    int file = open(words[0], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file < 0)
        return fail(answer, words[0]);
    size_t size = strlen(words[1]);
    ssize_t written = write(file, words[1], size);
    int number = written < 0 ? errno : ENOSPC;
    /* Closing may be when it is sent, and refused. */
    if (close(file) != 0 && written == (ssize_t)size)
        return fail(answer, words[0]);
    errno = number;
    return written == (ssize_t)size || fail(answer, words[0]);
}

bool probe_at(struct answer *answer, char **words, int count)
{
    (void)count;
    struct stat found;
    size_t most = strtoul(words[2], NULL, 10);
    int file = open(words[0], O_RDONLY | O_CLOEXEC);
    if (most > sizeof answer->text / 2)
        most = sizeof answer->text / 2;
    if (file < 0 || fstat(file, &found) != 0) {
        fail(answer, words[0]);
        if (file >= 0)
            close(file);
        return false;
    }
    say(answer, "%lld\n", (long long)found.st_size);
    ssize_t size = pread(file, answer->text + answer->size, most, strtoll(words[1], NULL, 10));
    if (size < 0)
        fail(answer, words[0]);
    else
        answer->size += (size_t)size;
    close(file);
    return size >= 0;
}

bool probe_symlink(struct answer *answer, char **words, int count)
{
    (void)count;
    return done(answer, symlink(words[0], words[1]), words[1]);
}

bool probe_rename(struct answer *answer, char **words, int count)
{
    (void)count;
    return done(answer, rename(words[0], words[1]), words[0]);
}

bool probe_remove(struct answer *answer, char **words, int count)
{
    (void)count;
    return done(answer, remove(words[0]), words[0]);
}
