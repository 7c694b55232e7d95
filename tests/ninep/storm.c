/*
 * What a guest asks a shared directory for, and how fast the answers come.
 *
 *     storm path MS FILE...       lstat them in turn for so many milliseconds: how often a second
 *     storm open MS FILE          fstat one that stays open: how often a second
 *     storm sync FILE             its size, by a statx that insists on asking
 *     storm append FILE TEXT      write, then the size by fstat, by lstat, and how many names it has
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void need(int right, const char *what)
{
    if (!right) {
        perror(what);
        exit(1);
    }
}

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000L + time.tv_nsec / 1000;
}

/* The clock of an emulated guest may be as coarse as its ticks: time is what is given, and answers are counted. */
static void report(long answers, long began)
{
    printf("%ld\n", (long)(answers * 1000000.0 / (now() - began)));
}

static void storm_path(long ms, char **files)
{
    struct stat status;
    long answers = 0, began = now();
    while (now() - began < ms * 1000)
        for (char **file = files; *file != NULL; file++, answers++)
            need(lstat(*file, &status) == 0, *file);
    report(answers, began);
}

static void storm_open(long ms, const char *file)
{
    struct stat status;
    int fd = open(file, O_RDONLY);
    need(fd >= 0, file);
    long answers = 0, began = now();
    while (now() - began < ms * 1000)
        for (int i = 0; i < 20; i++, answers++)
            need(fstat(fd, &status) == 0, file);
    report(answers, began);
}

static void sync_size(const char *file)
{
    struct statx status;
    need(statx(AT_FDCWD, file, AT_STATX_FORCE_SYNC, STATX_SIZE, &status) == 0, file);
    printf("%llu\n", (unsigned long long)status.stx_size);
}

static void append(const char *file, const char *text)
{
    struct stat by_fd, by_name;
    int fd = open(file, O_WRONLY | O_APPEND);
    need(fd >= 0 && fstat(fd, &by_fd) == 0, file);
    need(write(fd, text, strlen(text)) == (ssize_t)strlen(text), file);
    need(fstat(fd, &by_fd) == 0 && lstat(file, &by_name) == 0, file);
    printf("%ld %ld %ld\n", (long)by_fd.st_size, (long)by_name.st_size, (long)by_name.st_nlink);
}

int main(int argc, char **argv)
{
    if (argc >= 4 && strcmp(argv[1], "path") == 0)
        storm_path(atol(argv[2]), argv + 3);
    else if (argc == 4 && strcmp(argv[1], "open") == 0)
        storm_open(atol(argv[2]), argv[3]);
    else if (argc == 3 && strcmp(argv[1], "sync") == 0)
        sync_size(argv[2]);
    else if (argc == 4 && strcmp(argv[1], "append") == 0)
        append(argv[2], argv[3]);
    else
        return 2;
    return 0;
}
