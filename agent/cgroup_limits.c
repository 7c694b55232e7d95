/* Which number of an OCI description becomes which text in which file of a cgroup. What version 2 has no file for -
 * kernel memory, swappiness, switching the OOM killer off, leaf weights - is passed over, as runc does; any other limit
 * must be set, or the container does not run. */
#define _GNU_SOURCE
#include "cgroup.h"

#include "cgroup_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TEXT = 96 };

static bool has(const struct cgroup *cgroup, const char *file)
{
    return faccessat(cgroup->directory, file, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

static bool put(const struct cgroup *cgroup, const char *file, const char *text, struct failure *failure)
{
    if (cgroup_write(cgroup->directory, file, text))
        return true;
    if (errno == ENOENT)
        return failure_set(failure, TTRPC_FAILED_PRECONDITION,
                           "cannot set %.40s to %.100s: the guest has no such limit (controller %.*s)", file, text,
                           (int)strcspn(file, "."), file);
    if (errno == EINVAL || errno == ERANGE || errno == ENODEV || errno == E2BIG || errno == EOVERFLOW)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the kernel does not take %.100s for %.40s: %s", text, file,
                           strerror(errno));
    return failure_errno(failure, "cannot write %.100s to %.40s", text, file);
}

static bool put_number(const struct cgroup *cgroup, const char *file, uint64_t value, struct failure *failure)
{
    char text[TEXT];
    snprintf(text, sizeof text, "%" PRIu64, value);
    return put(cgroup, file, text, failure);
}

/* 0: not set; negative: no limit. */
static bool put_limit(const struct cgroup *cgroup, const char *file, int64_t value, struct failure *failure)
{
    if (value == 0)
        return true;
    return value < 0 ? put(cgroup, file, "max", failure) : put_number(cgroup, file, (uint64_t)value, failure);
}

/* --- memory --- */

/* The limit that a limit of both counts from: the one of the same request, else the one there is. */
static int64_t memory_limit(const struct cgroup *cgroup, const struct oci_memory *memory)
{
    char text[TEXT];
    if (memory->limit != 0 || !cgroup_read(cgroup->directory, "memory.max", text, sizeof text))
        return memory->limit;
    return strncmp(text, "max", 3) == 0 ? -1 : strtoll(text, NULL, 10);
}

/* OCI's number is memory and swap together, version 2's is swap alone. */
static bool put_swap(const struct cgroup *cgroup, const struct oci_memory *memory, struct failure *failure)
{
    if (memory->swap == 0) /* who lifts the limit of memory has none of both together */
        return memory->limit >= 0 || !has(cgroup, "memory.swap.max") || put(cgroup, "memory.swap.max", "max", failure);
    if (memory->swap < 0)
        return !has(cgroup, "memory.swap.max") || put(cgroup, "memory.swap.max", "max", failure);
    int64_t limit = memory_limit(cgroup, memory);
    if (limit <= 0)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT,
                           "a limit of memory and swap together (%" PRId64 ") needs one of memory", memory->swap);
    if (memory->swap < limit)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT,
                           "the limit of memory and swap together (%" PRId64 ") is below that of memory (%" PRId64 ")",
                           memory->swap, limit);
    if (memory->swap == limit && !has(cgroup, "memory.swap.max")) /* a kernel without swap keeps that by itself */
        return true;
    return put_number(cgroup, "memory.swap.max", (uint64_t)(memory->swap - limit), failure);
}

/* Swap first: when memory.max falls, the kernel makes room at once, by the limit of swap that is set then. */
static bool limit_memory(const struct cgroup *cgroup, const struct oci_memory *memory, struct failure *failure)
{
    return put_swap(cgroup, memory, failure) && put_limit(cgroup, "memory.max", memory->limit, failure) &&
           put_limit(cgroup, "memory.low", memory->reservation, failure);
}

/* --- processors --- */

/* 2…262144 to 1…10000 in a straight line, as Kata's agent and, until 2025, runc do. runc's new curve (1024 is 100) fits
 * better beside processes that have the usual weight; in a guest containers compete with each other alone, and the line
 * keeps the proportions they were given. */
static uint64_t weight_of_shares(uint64_t shares)
{
    enum { LEAST = 2, MOST = 262144 };
    if (shares < LEAST)
        shares = LEAST;
    if (shares > MOST)
        shares = MOST;
    return 1 + (shares - LEAST) * 9999 / MOST;
}

static bool limit_time(const struct cgroup *cgroup, const struct oci_cpu *cpu, struct failure *failure)
{
    char text[TEXT];
    char quota[TEXT];
    if (cpu->quota == 0 && cpu->period == 0)
        return true;
    if (cpu->quota != 0)
        snprintf(quota, sizeof quota, "%" PRId64, cpu->quota);
    else if (cgroup_read(cgroup->directory, "cpu.max", quota, sizeof quota))
        quota[strcspn(quota, " \n")] = '\0';
    if (cpu->quota < 0 || quota[0] == '\0')
        snprintf(quota, sizeof quota, "max");
    if (cpu->period != 0)
        snprintf(text, sizeof text, "%.24s %" PRIu64, quota, cpu->period);
    else /* the kernel keeps the period there is */
        snprintf(text, sizeof text, "%.24s", quota);
    return put(cgroup, "cpu.max", text, failure);
}

static bool put_list(const struct cgroup *cgroup, const char *file, const char *list, struct failure *failure)
{
    return list[0] == '\0' || put(cgroup, file, list, failure);
}

static bool limit_cpu(const struct cgroup *cgroup, const struct oci_cpu *cpu, struct failure *failure)
{
    if (cpu->realtime_runtime != 0 || cpu->realtime_period != 0)
        return failure_set(failure, TTRPC_FAILED_PRECONDITION, "cgroup version 2 cannot limit realtime processes");
    if (cpu->shares != 0 && !put_number(cgroup, "cpu.weight", weight_of_shares(cpu->shares), failure))
        return false;
    return limit_time(cgroup, cpu, failure) && put_list(cgroup, "cpuset.cpus", cpu->cpus, failure) &&
           put_list(cgroup, "cpuset.mems", cpu->mems, failure);
}

/* --- disks --- */

/* BFQ's weights are those of version 1, 10…1000; those of io.weight go to 10000. */
static bool put_weight(const struct cgroup *cgroup, const char *device, uint32_t weight, struct failure *failure)
{
    char text[TEXT];
    bool bfq = has(cgroup, "io.bfq.weight");
    if (weight < 10 || weight > 1000)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%" PRIu32 " is no weight of disks: 10 to 1000 are", weight);
    snprintf(text, sizeof text, "%s%" PRIu32, device, bfq ? weight : 1 + (weight - 10) * 9999 / 990);
    return put(cgroup, bfq ? "io.bfq.weight" : "io.weight", text, failure);
}

static bool limit_weights(const struct cgroup *cgroup, const struct oci_block_io *io, struct failure *failure)
{
    char device[48];
    if (io->weight != 0 && !put_weight(cgroup, "default ", io->weight, failure))
        return false;
    for (size_t i = 0; i < io->weight_device.count; i++) {
        const struct oci_weight_device *row = &io->weight_device.items[i];
        snprintf(device, sizeof device, "%" PRId64 ":%" PRId64 " ", row->major, row->minor);
        if (row->weight != 0 && !put_weight(cgroup, device, row->weight, failure))
            return false;
    }
    return true;
}

static bool throttle(const struct cgroup *cgroup, const char *key, const struct oci_throttle_device *rows, size_t count,
                     struct failure *failure)
{
    char text[TEXT];
    for (size_t i = 0; i < count; i++) {
        char rate[24] = "max";
        if (rows[i].rate != 0)
            snprintf(rate, sizeof rate, "%" PRIu64, rows[i].rate);
        snprintf(text, sizeof text, "%" PRId64 ":%" PRId64 " %s=%s", rows[i].major, rows[i].minor, key, rate);
        if (!put(cgroup, "io.max", text, failure))
            return false;
    }
    return true;
}

static bool limit_io(const struct cgroup *cgroup, const struct oci_block_io *io, struct failure *failure)
{
    return limit_weights(cgroup, io, failure) &&
           throttle(cgroup, "rbps", io->read_bps.items, io->read_bps.count, failure) &&
           throttle(cgroup, "wbps", io->write_bps.items, io->write_bps.count, failure) &&
           throttle(cgroup, "riops", io->read_iops.items, io->read_iops.count, failure) &&
           throttle(cgroup, "wiops", io->write_iops.items, io->write_iops.count, failure);
}

/* --- huge pages --- */

static bool limit_pages(const struct cgroup *cgroup, const struct oci_hugepage_limit *row, struct failure *failure)
{
    static const char alphabet[] = "0123456789KMGB";
    char file[TEXT];
    size_t length = strlen(row->page_size);
    if (length == 0 || length > 16 || strspn(row->page_size, alphabet) != length)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%.40s is no size of huge pages, such as 2MB",
                           row->page_size);
    snprintf(file, sizeof file, "hugetlb.%s.max", row->page_size);
    if (!has(cgroup, file)) /* a kubelet names all sizes that the host has; of what the guest has not nobody uses any */
        return true;
    if (!put_number(cgroup, file, row->limit, failure))
        return false;
    snprintf(file, sizeof file, "hugetlb.%s.rsvd.max", row->page_size);
    return !has(cgroup, file) || put_number(cgroup, file, row->limit, failure);
}

bool cgroup_limit(const struct cgroup *cgroup, const struct oci_resources *resources, struct failure *failure)
{
    if (resources == NULL)
        return true;
    if (resources->memory != NULL && !limit_memory(cgroup, resources->memory, failure))
        return false;
    if (resources->cpu != NULL && !limit_cpu(cgroup, resources->cpu, failure))
        return false;
    if (resources->pids != NULL && !put_limit(cgroup, "pids.max", resources->pids->limit, failure))
        return false;
    if (resources->block_io != NULL && !limit_io(cgroup, resources->block_io, failure))
        return false;
    for (size_t i = 0; i < resources->hugepage_limits.count; i++)
        if (!limit_pages(cgroup, &resources->hugepage_limits.items[i], failure))
            return false;
    return true;
}
