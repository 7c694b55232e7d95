/* What a cgroup has used, as Kata's agent tells it where cgroups are version 2: times in nanoseconds, all of
 * memory.stat under its own names, io.stat's six numbers of a disk with their names for an operation, UINT64_MAX where
 * memory has no limit, 0 where the number of processes has none. A file that is not there counts as zeros. */
#define _GNU_SOURCE
#include "cgroup.h"

#include "cgroup_file.h"
#include "wire.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    LARGEST_FILE = 16 * 1024, /* memory.stat has some 1.5 KiB, io.stat 100 bytes a disk */
    NANOSECONDS = 1000, /* of a microsecond */
};

static char text[LARGEST_FILE];

static void put_nested(struct buffer *out, uint32_t number, struct buffer *message)
{
    wire_put_message(out, number, message);
    buffer_reset(message);
}

static const char *read_file(const struct cgroup *cgroup, const char *name)
{
    cgroup_read(cgroup->directory, name, text, sizeof text);
    return text;
}

static uint64_t read_number(const struct cgroup *cgroup, const char *name, uint64_t without_limit)
{
    const char *value = read_file(cgroup, name);
    return strncmp(value, "max", 3) == 0 ? without_limit : strtoull(value, NULL, 10);
}

static void put_cpu(const struct cgroup *cgroup, struct buffer *out)
{
    struct buffer cpu = {0};
    struct buffer usage = {0};
    struct buffer throttling = {0};
    const char *stat = read_file(cgroup, "cpu.stat");
    wire_put_uint(&usage, 1, cgroup_number(stat, "usage_usec") * NANOSECONDS);
    wire_put_uint(&usage, 3, cgroup_number(stat, "system_usec") * NANOSECONDS);
    wire_put_uint(&usage, 4, cgroup_number(stat, "user_usec") * NANOSECONDS);
    wire_put_uint(&throttling, 1, cgroup_number(stat, "nr_periods"));
    wire_put_uint(&throttling, 2, cgroup_number(stat, "nr_throttled"));
    wire_put_uint(&throttling, 3, cgroup_number(stat, "throttled_usec") * NANOSECONDS);
    put_nested(&cpu, 1, &usage);
    put_nested(&cpu, 2, &throttling);
    put_nested(out, 1, &cpu);
}

static void put_memory_data(struct buffer *out, uint32_t number, uint64_t usage, uint64_t peak, uint64_t failures,
                            uint64_t limit)
{
    struct buffer data = {0};
    wire_put_uint(&data, 1, usage);
    wire_put_uint(&data, 2, peak);
    wire_put_uint(&data, 3, failures);
    wire_put_uint(&data, 4, limit);
    put_nested(out, number, &data);
}

/* Each line is a key and a value of a map. */
static void put_rows(struct buffer *out, uint32_t number, char *rows)
{
    char *rest = rows;
    for (char *row = strsep(&rest, "\n"); row != NULL; row = strsep(&rest, "\n")) {
        char *value = strchr(row, ' ');
        struct buffer pair = {0};
        if (value == NULL)
            continue;
        *value++ = '\0';
        wire_put_text(&pair, 1, row);
        wire_put_uint(&pair, 2, strtoull(value, NULL, 10));
        put_nested(out, number, &pair);
    }
}

static void put_memory(const struct cgroup *cgroup, struct buffer *out)
{
    struct buffer memory = {0};
    uint64_t failures = cgroup_number(read_file(cgroup, "memory.events"), "max");
    uint64_t swap_failures = cgroup_number(read_file(cgroup, "memory.swap.events"), "max");
    const char *stat = read_file(cgroup, "memory.stat");
    uint64_t kernel = cgroup_number(stat, "kernel");
    wire_put_uint(&memory, 1, cgroup_number(stat, "file"));
    put_memory_data(&memory, 2, read_number(cgroup, "memory.current", 0), read_number(cgroup, "memory.peak", 0),
                    failures, read_number(cgroup, "memory.max", UINT64_MAX));
    put_memory_data(&memory, 3, read_number(cgroup, "memory.swap.current", 0),
                    read_number(cgroup, "memory.swap.peak", 0), swap_failures,
                    read_number(cgroup, "memory.swap.max", UINT64_MAX));
    put_memory_data(&memory, 4, kernel, 0, 0, 0);
    wire_put_uint(&memory, 5, true); /* version 2 always counts what is below */
    read_file(cgroup, "memory.stat");
    put_rows(&memory, 6, text);
    put_nested(out, 2, &memory);
}

static void put_pids(const struct cgroup *cgroup, struct buffer *out)
{
    struct buffer pids = {0};
    wire_put_uint(&pids, 1, read_number(cgroup, "pids.current", 0));
    wire_put_uint(&pids, 2, read_number(cgroup, "pids.max", 0));
    put_nested(out, 3, &pids);
}

/* "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6" */
static void put_disk(struct buffer *out, char *row)
{
    static const char *const names[][2] = {{"rbytes=", "read"}, {"wbytes=", "write"}, {"rios=", "rios"},
                                           {"wios=", "wios"},   {"dbytes=", "dbytes"}, {"dios=", "dios"}};
    char *end;
    uint64_t major = strtoull(row, &end, 10);
    if (*end != ':')
        return;
    uint64_t minor = strtoull(end + 1, &end, 10);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const char *value = strstr(end, names[i][0]);
        struct buffer entry = {0};
        if (value == NULL)
            continue;
        wire_put_uint(&entry, 1, major);
        wire_put_uint(&entry, 2, minor);
        wire_put_text(&entry, 3, names[i][1]);
        wire_put_uint(&entry, 4, strtoull(value + strlen(names[i][0]), NULL, 10));
        put_nested(out, 1, &entry); /* Kata's agent has no other list than that of bytes for all six */
    }
}

static void put_io(const struct cgroup *cgroup, struct buffer *out)
{
    struct buffer io = {0};
    read_file(cgroup, "io.stat");
    char *rest = text;
    for (char *row = strsep(&rest, "\n"); row != NULL; row = strsep(&rest, "\n"))
        put_disk(&io, row);
    put_nested(out, 4, &io);
}

/* The sizes that there are: those of "hugetlb.SIZE.current". */
static bool is_huge_page_file(const char *name, char *size, size_t room)
{
    static const char prefix[] = "hugetlb.";
    static const char suffix[] = ".current";
    size_t length = strlen(name);
    if (strncmp(name, prefix, sizeof prefix - 1) != 0 || length < sizeof prefix + sizeof suffix ||
        strcmp(name + length - (sizeof suffix - 1), suffix) != 0)
        return false;
    size_t inner = length - (sizeof prefix - 1) - (sizeof suffix - 1);
    if (inner >= room || memchr(name + sizeof prefix - 1, '.', inner) != NULL) /* SIZE.rsvd */
        return false;
    memcpy(size, name + sizeof prefix - 1, inner);
    size[inner] = '\0';
    return true;
}

static void put_huge_pages(const struct cgroup *cgroup, struct buffer *out, const char *size)
{
    char name[64];
    struct buffer numbers = {0};
    struct buffer pair = {0};
    snprintf(name, sizeof name, "hugetlb.%s.current", size);
    wire_put_uint(&numbers, 1, read_number(cgroup, name, 0));
    snprintf(name, sizeof name, "hugetlb.%s.events", size);
    wire_put_uint(&numbers, 3, cgroup_number(read_file(cgroup, name), "max"));
    wire_put_text(&pair, 1, size);
    put_nested(&pair, 2, &numbers);
    put_nested(out, 5, &pair);
}

static void put_all_huge_pages(const struct cgroup *cgroup, struct buffer *out)
{
    char size[24];
    int copy = openat(cgroup->directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *stream = copy < 0 ? NULL : fdopendir(copy);
    if (stream == NULL) {
        if (copy >= 0)
            close(copy);
        return;
    }
    for (struct dirent *entry = readdir(stream); entry != NULL; entry = readdir(stream))
        if (is_huge_page_file(entry->d_name, size, sizeof size))
            put_huge_pages(cgroup, out, size);
    closedir(stream);
}

void cgroup_put_stats(const struct cgroup *cgroup, struct buffer *out)
{
    put_cpu(cgroup, out);
    put_memory(cgroup, out);
    put_pids(cgroup, out);
    put_io(cgroup, out);
    put_all_huge_pages(cgroup, out);
}
