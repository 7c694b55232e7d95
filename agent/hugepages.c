#define _GNU_SOURCE
#include "hugepages.h"

#include "small_file.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* 2097152, 2M, 1G: as the kernel reads it. 0: none, or no size. */
static uint64_t parse_size(const char *text)
{
    char *end;
    errno = 0;
    unsigned long long size = strtoull(text, &end, 10);
    static const char units[] = "KMGT";
    const char *unit = *end == '\0' || *end == ',' ? NULL : strchr(units, *end & ~0x20);
    unsigned int shift = unit == NULL || *unit == '\0' ? 0 : 10 * (unsigned int)(unit - units + 1);
    if (shift > 0)
        end++;
    if (*text < '0' || *text > '9' || errno != 0 || (*end != '\0' && *end != ',') || size > UINT64_MAX >> shift)
        return 0;
    return (uint64_t)size << shift;
}

/* One option may have several with commas between them. */
static uint64_t find_size(const struct storage *storage, const char *name)
{
    size_t length = strlen(name);
    for (size_t i = 0; i < storage->options.count; i++)
        for (const char *at = storage->options.items[i]; at != NULL; at = strchr(at, ',')) {
            at += *at == ',';
            if (strncmp(at, name, length) == 0)
                return parse_size(at + length);
        }
    return 0;
}

static bool read_count(const char *path, uint64_t *count)
{
    char text[32];
    if (!small_file_read(path, text, sizeof text) || *text == '\0')
        return false;
    *count = strtoull(text, NULL, 10);
    return true;
}

static bool write_count(const char *path, uint64_t count)
{
    char text[32];
    snprintf(text, sizeof text, "%" PRIu64, count);
    return small_file_write(path, text);
}

bool hugepages_allocate(const struct storage *storage, struct failure *failure)
{
    uint64_t page = find_size(storage, "pagesize=");
    uint64_t size = find_size(storage, "size=");
    if (page < 1024 || size < page)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT,
                           "hugetlbfs needs the options pagesize= and size=, of which the second is not the smaller");
    char path[96];
    snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/hugepages-%" PRIu64 "kB/nr_hugepages", page / 1024);
    uint64_t before;
    uint64_t after;
    uint64_t wanted = size / page;
    if (!read_count(path, &before))
        return failure_errno(failure, "there are no huge pages of %" PRIu64 " bytes", page);
    if (wanted > UINT64_MAX - before || !write_count(path, before + wanted) || !read_count(path, &after))
        return failure_errno(failure, "cannot ask for huge pages");
    if (after >= before + wanted)
        return true;
    write_count(path, before); /* those that came are of no use */
    return failure_set(failure, TTRPC_RESOURCE_EXHAUSTED,
                       "there is memory for %" PRIu64 " of %" PRIu64 " huge pages of %" PRIu64 " bytes",
                       after > before ? after - before : 0, wanted, page);
}
