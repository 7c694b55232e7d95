/* Mapped files: huge pages, and what the page cache takes. */
#define _GNU_SOURCE
#include "probe.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <search.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    HUGE = 2 << 20,
    MOST_HUGE = 8, /* of a file */
    DEEPEST = 64,
    LARGEST = 4096, /* bytes of a path */
};

/* linux/fs.h of Linux 6.7: which pages of a range are mapped, and how. */
struct scan {
    uint64_t size, flags, start, end, walk_end, regions, regions_size, most, inverted, mask, any_mask, wanted;
};
struct region {
    uint64_t start, end, categories;
};
#define SCAN _IOWR('f', 16, struct scan)
#define IS_PRESENT (1u << 3)
#define IS_HUGE (1u << 6)

static long faults(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt + usage.ru_majflt;
}

static unsigned touch(const volatile char *at, size_t size, size_t page)
{
    unsigned sum = 0;
    for (size_t i = 0; i < size; i += page)
        sum += (unsigned char)at[i];
    return sum;
}

/* Bytes of the range that entries of 2 MiB map; -1 when the kernel cannot be asked. */
static int64_t mapped_huge(char *start, size_t size)
{
    struct region found[2 * MOST_HUGE];
    struct scan scan = {
        .size = sizeof scan,
        .start = (uintptr_t)start,
        .end = (uintptr_t)start + size,
        .regions = (uintptr_t)found,
        .regions_size = sizeof found / sizeof *found,
        .mask = IS_PRESENT | IS_HUGE,
        .wanted = IS_PRESENT | IS_HUGE,
    };
    int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    /* What libraries call the request's type differs; the kernel's is the same. */
    long count = file < 0 ? -1 : syscall(SYS_ioctl, file, SCAN, &scan);
    int64_t sum = count < 0 ? -1 : 0;
    if (file >= 0)
        close(file);
    for (long i = 0; i < count; i++)
        sum += (int64_t)(found[i].end - found[i].start);
    return sum;
}

static bool map(struct answer *answer, const char *path, int file, size_t size)
{
    /* The address has to be a multiple of 2 MiB like the offset: a mapping of a MiB more has such a one in it. */
    char *room = mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        return fail(answer, "mmap");
    char *start = (char *)(((uintptr_t)room + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    if (mmap(start, size, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) {
        fail(answer, path);
        munmap(room, size + HUGE);
        return false;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    long before = faults();
    unsigned sum = touch(start, size, page);
    long took = faults() - before;
    say(answer, "bytes %zu\nfaults %ld\nhuge_bytes %lld\nsum %u\n", size, took, (long long)mapped_huge(start, size), sum);
    munmap(room, size + HUGE);
    return true;
}

bool probe_map(struct answer *answer, char **words, int count)
{
    (void)count;
    struct stat found;
    int file = open(words[0], O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &found) != 0) {
        fail(answer, words[0]);
        if (file >= 0)
            close(file);
        return false;
    }
    size_t size = (size_t)found.st_size & ~(size_t)(HUGE - 1);
    bool done = false;
    if (size == 0) {
        errno = EFBIG;
        fail(answer, "it is shorter than 2 MiB");
    } else {
        done = map(answer, words[0], file, size < MOST_HUGE * (size_t)HUGE ? size : MOST_HUGE * (size_t)HUGE);
    }
    close(file);
    return done;
}

/* --- all files --- */

struct drain {
    dev_t device;
    unsigned long long most, longest, bytes, files, unread, over;
    char largest[LARGEST];
    off_t size; /* of the largest */
    char path[LARGEST];
    void *linked; /* inodes of several names that were read: of tsearch */
};

static int compare(const void *one, const void *other)
{
    const ino_t *a = one, *b = other;
    return (*a > *b) - (*a < *b);
}

/* Whether this is another name of a file that was read: all of them are on one device. */
static bool is_known(struct drain *drain, const struct stat *found)
{
    if (found->st_nlink < 2)
        return false;
    ino_t *inode = malloc(sizeof *inode);
    if (inode == NULL)
        return false;
    *inode = found->st_ino;
    ino_t **known = tsearch(inode, &drain->linked, compare);
    if (known != NULL && *known == inode)
        return false;
    free(inode);
    return known != NULL;
}

/* Reads what is stored, until it is MOST bytes; holes are passed over where the filesystem tells them, which erofs of
 * Linux 6.12 does not. How many bytes; -1 when it cannot. */
static long long read_stored(int file, off_t end, unsigned long long most)
{
    static char buffer[256 << 10];
    long long sum = 0;
    for (off_t at = 0, hole = 0; at < end && (unsigned long long)sum < most; at = hole) {
        if ((at = lseek(file, at, SEEK_DATA)) < 0)
            return errno == ENXIO ? sum : -1;
        hole = lseek(file, at, SEEK_HOLE);
        if (hole <= at)
            return hole < 0 ? -1 : sum;
        while (at < hole && (unsigned long long)sum < most) {
            size_t piece = hole - at < (off_t)sizeof buffer ? (size_t)(hole - at) : sizeof buffer;
            ssize_t size = pread(file, buffer, piece, at);
            if (size <= 0)
                return size < 0 ? -1 : sum;
            at += size;
            sum += size;
        }
    }
    return sum;
}

static void drain_file(struct drain *drain, int directory, const char *name)
{
    struct stat found;
    int file = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    bool there = file >= 0 && fstat(file, &found) == 0;
    if (there && is_known(drain, &found)) {
        close(file);
        return;
    }
    long long size = there ? read_stored(file, found.st_size, drain->most - drain->bytes) : -1;
    /* What a filesystem that tells no holes has read of them took no memory. */
    if (there && size > found.st_blocks * 512LL)
        size = found.st_blocks * 512LL;
    drain->files += size >= 0;
    drain->unread += size < 0;
    drain->bytes += size < 0 ? 0 : (unsigned long long)size;
    if (file >= 0)
        close(file);
}

/* The largest without holes; of its answer a newline would make two lines. */
static void remember(struct drain *drain, size_t length, const char *name, const struct stat *found)
{
    if (found->st_size <= drain->size || found->st_blocks * 512LL < found->st_size ||
        length + strlen(name) + 2 > sizeof drain->largest || strchr(name, '\n') || memchr(drain->path, '\n', length))
        return;
    drain->size = found->st_size;
    snprintf(drain->largest, sizeof drain->largest, "%.*s/%s", (int)length, drain->path, name);
}

static void drain_directory(struct drain *drain, int file, size_t length, int depth)
{
    DIR *stream = depth < DEEPEST ? fdopendir(file) : NULL;
    if (stream == NULL) {
        close(file);
        return;
    }
    for (struct dirent *entry; drain->bytes < drain->most && (entry = readdir(stream)) != NULL;) {
        const char *name = entry->d_name;
        struct stat found;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || entry->d_type == DT_LNK ||
            fstatat(file, name, &found, AT_SYMLINK_NOFOLLOW) != 0 || found.st_dev != drain->device)
            continue;
        if (S_ISREG(found.st_mode) && (unsigned long long)found.st_size > drain->longest) {
            drain->over++;
        } else if (S_ISREG(found.st_mode) && found.st_size > 0) {
            drain_file(drain, file, name);
            remember(drain, length, name, &found);
        } else if (S_ISDIR(found.st_mode) && length + strlen(name) + 2 < sizeof drain->path) {
            int inner = openat(file, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
            size_t more = (size_t)snprintf(drain->path + length, sizeof drain->path - length, "/%s", name);
            if (inner >= 0)
                drain_directory(drain, inner, length + more, depth + 1);
            drain->path[length] = '\0';
        }
    }
    closedir(stream);
}

static long number_of(const char *text, const char *line)
{
    const char *found = strstr(text, line);
    return found == NULL ? 0 : strtol(found + strlen(line), NULL, 10);
}

/* KiB of files in the page cache. Linux counts what lies in a tmpfs with them, and others write there meanwhile. */
static long cached(void)
{
    char text[4096];
    int file = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
    ssize_t size = file < 0 ? -1 : read(file, text, sizeof text - 1);
    if (file >= 0)
        close(file);
    text[size > 0 ? size : 0] = '\0';
    return number_of(text, "\nCached:") - number_of(text, "\nShmem:");
}

bool probe_drain(struct answer *answer, char **words, int count)
{
    static struct drain drain;
    struct stat found;
    size_t length = strlen(words[0]);
    drain = (struct drain){.most = strtoull(words[1], NULL, 10), .longest = UINT64_MAX};
    if (count > 2)
        drain.longest = strtoull(words[2], NULL, 10);
    int file = open(words[0], O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &found) != 0 || length >= sizeof drain.path) {
        fail(answer, words[0]);
        if (file >= 0)
            close(file);
        return false;
    }
    drain.device = found.st_dev;
    memcpy(drain.path, words[0], length + 1);
    long before = cached();
    if (S_ISDIR(found.st_mode)) {
        drain_directory(&drain, file, length == 1 ? 0 : length, 0);
    } else {
        close(file);
        drain_file(&drain, AT_FDCWD, words[0]);
    }
    long after = cached();
    tdestroy(drain.linked, free);
    say(answer, "bytes %llu\nfiles %llu\nunread %llu\nover %llu\ncached_before_kib %ld\ncached_after_kib %ld\n",
        drain.bytes, drain.files, drain.unread, drain.over, before, after);
    if (drain.size > 0)
        say(answer, "largest_bytes %lld\nlargest %s\n", (long long)drain.size, drain.largest);
    return true;
}
