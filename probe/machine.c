/* The machine as a program sees it: processors, memory, clocks, random numbers, devices. */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

enum { SECTOR = 4096 };

bool probe_host(struct answer *answer, char **words, int count)
{
    (void)words;
    (void)count;
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return fail(answer, "sched_getaffinity");
    return say(answer, "affinity %d\nonline %ld\nconfigured %ld\npage %ld\npages %ld\n", CPU_COUNT(&set),
               sysconf(_SC_NPROCESSORS_ONLN), sysconf(_SC_NPROCESSORS_CONF), sysconf(_SC_PAGESIZE),
               sysconf(_SC_PHYS_PAGES));
}

bool probe_random(struct answer *answer, char **words, int count)
{
    (void)count;
    size_t size = strtoul(words[0], NULL, 10);
    if (size > sizeof answer->text)
        size = sizeof answer->text;
    while (answer->size < size) {
        ssize_t got = getrandom(answer->text + answer->size, size - answer->size, GRND_NONBLOCK);
        if (got < 0)
            return fail(answer, "getrandom");
        answer->size += (size_t)got;
    }
    return true;
}

static bool say_clock(struct answer *answer, const char *name, clockid_t clock)
{
    struct timespec now;
    return clock_gettime(clock, &now) == 0 &&
           say(answer, "%s %lld.%09ld\n", name, (long long)now.tv_sec, (long)now.tv_nsec);
}

bool probe_clock(struct answer *answer, char **words, int count)
{
    (void)words;
    (void)count;
    return (say_clock(answer, "realtime", CLOCK_REALTIME) && say_clock(answer, "boottime", CLOCK_BOOTTIME)) ||
           fail(answer, "clock_gettime");
}

static bool write_back(struct answer *answer, int file)
{
    static char sector[SECTOR];
    if (pread(file, sector, sizeof sector, 0) != (ssize_t)sizeof sector)
        return fail(answer, "read");
    if (pwrite(file, sector, sizeof sector, 0) != (ssize_t)sizeof sector || fsync(file) != 0)
        return fail(answer, "write");
    return say(answer, "written %d\n", SECTOR);
}

bool probe_node(struct answer *answer, char **words, int count)
{
    (void)count;
    dev_t number = makedev((unsigned)strtoul(words[1], NULL, 10), (unsigned)strtoul(words[2], NULL, 10));
    if (mknod(words[0], S_IFBLK | 0600, number) != 0)
        return fail(answer, "mknod");
    int file = open(words[0], O_RDWR | O_CLOEXEC);
    bool done = file >= 0 ? write_back(answer, file) : fail(answer, "open");
    if (file >= 0)
        close(file);
    unlink(words[0]);
    return done;
}
