#define _GNU_SOURCE
#include "metrics_guest.h"

#include "mountinfo.h"
#include "place.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statfs.h>
#include <unistd.h>

enum { MOST_FILESYSTEMS = 64 };

/* Each line of a file, without its newline, until `take` has enough. */
static void each_line(const char *path, bool (*take)(struct metrics *metrics, char *line), struct metrics *metrics)
{
    FILE *file = fopen(path, "re");
    char *line = NULL;
    size_t size = 0;
    bool more = file != NULL;
    while (more && getline(&line, &size, file) > 0) {
        line[strcspn(line, "\n")] = '\0';
        more = take(metrics, line);
    }
    free(line);
    if (file != NULL)
        fclose(file);
}

/* Numbers of one line under the names of a list, which NULL ends, as far as both go. */
static void put_row(struct metrics *metrics, const char *label, const char *value, const char *const *items,
                    const char *numbers, unsigned int scale)
{
    for (; *items != NULL; items++) {
        char *end;
        uint64_t number = strtoull(numbers, &end, 10);
        if (end == numbers)
            return;
        numbers = end;
        metrics_count(metrics, (const struct metrics_label[]){{label, value}, {"item", *items}, {NULL, NULL}},
                      number * scale);
    }
}

/* --- load --- */

/* 0.20 0.18 0.12 1/80 11206 */
static void put_load(struct metrics *metrics)
{
    double load[3];
    unsigned long running;
    unsigned long all;
    FILE *file = fopen("/proc/loadavg", "re");
    bool known = file != NULL &&
                 fscanf(file, "%lf %lf %lf %lu/%lu", &load[0], &load[1], &load[2], &running, &all) == 5;
    if (file != NULL)
        fclose(file);
    if (!known)
        return;
    static const char *const items[] = {"load1", "load5", "load15"};
    metrics_family(metrics, "kata_guest_load", "gauge", "Load averages of the guest.");
    for (size_t i = 0; i < 3; i++)
        metrics_sample(metrics, (const struct metrics_label[]){{"item", items[i]}, {NULL, NULL}}, load[i]);
    metrics_family(metrics, "kata_guest_tasks", "gauge", "Tasks of the guest: those that can run, and all.");
    metrics_item(metrics, "cur", running);
    metrics_item(metrics, "max", all);
}

/* --- processors --- */

/* cpu0 4705 356 584 3699 23 23 0 0 0 0: in ticks; the line without a number is the sum of all */
static bool take_cpu(struct metrics *metrics, char *line)
{
    static const char *const items[] = {"user",    "nice",  "system", "idle",       "iowait", "irq",
                                        "softirq", "steal", "guest",  "guest_nice", NULL};
    if (strncmp(line, "cpu", 3) != 0 || metrics_full(metrics))
        return false;
    long ticks = sysconf(_SC_CLK_TCK);
    char *name = strsep(&line, " ");
    if (line != NULL)
        put_row(metrics, "cpu", name[3] == '\0' ? "total" : name + 3, items, line,
                ticks > 0 ? (unsigned int)(1000 / ticks) : 10);
    return true;
}

/* --- memory --- */

struct name_row {
    const char *kernel;
    const char *ours;
};

static const struct name_row memory_names[] = {
    {"MemTotal", "mem_total"},
    {"MemFree", "mem_free"},
    {"MemAvailable", "mem_available"},
    {"Buffers", "buffers"},
    {"Cached", "cached"},
    {"SwapCached", "swap_cached"},
    {"Active", "active"},
    {"Inactive", "inactive"},
    {"Active(anon)", "active_anon"},
    {"Inactive(anon)", "inactive_anon"},
    {"Active(file)", "active_file"},
    {"Inactive(file)", "inactive_file"},
    {"Unevictable", "unevictable"},
    {"Mlocked", "mlocked"},
    {"HighTotal", "high_total"},
    {"HighFree", "high_free"},
    {"LowTotal", "low_total"},
    {"LowFree", "low_free"},
    {"MmapCopy", "mmap_copy"},
    {"SwapTotal", "swap_total"},
    {"SwapFree", "swap_free"},
    {"Dirty", "dirty"},
    {"Writeback", "writeback"},
    {"AnonPages", "anon_pages"},
    {"Mapped", "mapped"},
    {"Shmem", "shmem"},
    {"KReclaimable", "k_reclaimable"},
    {"Slab", "slab"},
    {"SReclaimable", "s_reclaimable"},
    {"SUnreclaim", "s_unreclaim"},
    {"KernelStack", "kernel_stack"},
    {"PageTables", "page_tables"},
    {"Quicklists", "quicklists"},
    {"NFS_Unstable", "nfs_unstable"},
    {"Bounce", "bounce"},
    {"WritebackTmp", "writeback_tmp"},
    {"CommitLimit", "commit_limit"},
    {"Committed_AS", "committed_as"},
    {"VmallocTotal", "vmalloc_total"},
    {"VmallocUsed", "vmalloc_used"},
    {"VmallocChunk", "vmalloc_chunk"},
    {"Percpu", "per_cpu"},
    {"HardwareCorrupted", "hardware_corrupted"},
    {"AnonHugePages", "anon_hugepages"},
    {"ShmemHugePages", "shmem_hugepages"},
    {"ShmemPmdMapped", "shmem_pmd_mapped"},
    {"CmaTotal", "cma_total"},
    {"CmaFree", "cma_free"},
    {"HugePages_Total", "hugepages_total"},
    {"HugePages_Free", "hugepages_free"},
    {"HugePages_Rsvd", "hugepages_rsvd"},
    {"HugePages_Surp", "hugepages_surp"},
    {"Hugepagesize", "hugepagesize"},
    {"Hugetlb", "hugetlb"},
    {"DirectMap4k", "direct_map_4k"},
    {"DirectMap4M", "direct_map_4M"},
    {"DirectMap2M", "direct_map_2M"},
    {"DirectMap1G", "direct_map_1G"},
};

/* MemTotal:       12334432 kB */
static bool take_memory(struct metrics *metrics, char *line)
{
    char *end;
    const char *name = strsep(&line, ":");
    if (line == NULL)
        return true;
    uint64_t value = strtoull(line, &end, 10);
    if (strcmp(end, " kB") == 0)
        value *= 1024;
    for (size_t i = 0; i < sizeof memory_names / sizeof memory_names[0]; i++)
        if (strcmp(memory_names[i].kernel, name) == 0)
            metrics_item(metrics, memory_names[i].ours, value);
    return true;
}

/* nr_free_pages 1234 */
static bool take_vm_stat(struct metrics *metrics, char *line)
{
    const char *name = strsep(&line, " ");
    if (line != NULL)
        metrics_item(metrics, name, strtoull(line, NULL, 10));
    return !metrics_full(metrics);
}

/* --- devices --- */

/*  254       0 vda 1013 … */
static bool take_disk(struct metrics *metrics, char *line)
{
    static const char *const items[] = {
        "reads",           "merged",       "sectors_read",     "time_reading",
        "writes",          "writes_merged", "sectors_written", "time_writing",
        "in_progress",     "time_in_progress", "weighted_time_in_progress",
        "discards",        "discards_merged", "sectors_discarded", "time_discarding",
        "flushes",         "time_flushing", NULL};
    char name[64];
    int used = 0;
    if (sscanf(line, "%*u %*u %63s%n", name, &used) == 1)
        put_row(metrics, "disk", name, items, line + used, 1);
    return !metrics_full(metrics);
}

/*   eth0: 1234 … ; two lines of headings have no colon */
static bool take_interface(struct metrics *metrics, char *line)
{
    static const char *const items[] = {
        "recv_bytes", "recv_packets", "recv_errs",       "recv_drop",      "recv_fifo",  "recv_frame",
        "recv_compressed",            "recv_multicast",  "sent_bytes",     "sent_packets", "sent_errs",
        "sent_drop",  "sent_fifo",    "sent_colls",      "sent_carrier",   "sent_compressed", NULL};
    line += strspn(line, " ");
    const char *name = strsep(&line, ":");
    if (line != NULL)
        put_row(metrics, "interface", name, items, line, 1);
    return !metrics_full(metrics);
}

/* --- filesystems --- */

struct filesystem {
    char device[64];
    char place[PLACE_SIZE];
    struct statfs status;
};

/* Those that are written to, on a device, each once. How many. */
static size_t find_filesystems(struct filesystem *found, size_t room)
{
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    char *line = NULL;
    size_t size = 0;
    size_t count = 0;
    while (mounts != NULL && count < room && getline(&line, &size, mounts) > 0) {
        struct mountinfo mount;
        if (!mountinfo_split(line, &mount) || strncmp(mount.device, "0:", 2) == 0 ||
            strlen(mount.target) >= sizeof found->place || strncmp(mount.options, "rw", 2) != 0 ||
            strncmp(mount.super_options, "rw", 2) != 0)
            continue;
        struct filesystem *next = &found[count];
        mountinfo_device(&mount, next->device, sizeof next->device);
        bool known = false;
        for (size_t i = 0; i < count; i++)
            known |= strcmp(found[i].device, next->device) == 0;
        strcpy(next->place, mount.target);
        count += !known && statfs(next->place, &next->status) == 0;
    }
    free(line);
    if (mounts != NULL)
        fclose(mounts);
    return count;
}

static void put_filesystem(struct metrics *metrics, const struct filesystem *filesystem, uint64_t total,
                           uint64_t free_, uint64_t available)
{
    const struct {
        const char *item;
        uint64_t value;
    } rows[] = {{"total", total}, {"used", total - free_}, {"available", available}};
    const char *slash = strrchr(filesystem->device, '/');
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        metrics_count(metrics,
                      (const struct metrics_label[]){{"disk", slash == NULL ? filesystem->device : slash + 1},
                                                     {"mountpoint", filesystem->place},
                                                     {"item", rows[i].item},
                                                     {NULL, NULL}},
                      rows[i].value);
}

static void put_filesystems(struct metrics *metrics)
{
    struct filesystem *found = calloc(MOST_FILESYSTEMS, sizeof *found);
    size_t count = found == NULL ? 0 : find_filesystems(found, MOST_FILESYSTEMS);
    metrics_family(metrics, "kata_guest_filesystem_bytes", "gauge", "Room in filesystems that are written to.");
    for (size_t i = 0; i < count && !metrics_full(metrics); i++) {
        const struct statfs *status = &found[i].status;
        uint64_t block = (uint64_t)status->f_bsize;
        put_filesystem(metrics, &found[i], status->f_blocks * block, status->f_bfree * block,
                       status->f_bavail * block);
    }
    metrics_family(metrics, "kata_guest_filesystem_inodes", "gauge", "Inodes of filesystems that are written to.");
    for (size_t i = 0; i < count && !metrics_full(metrics); i++)
        put_filesystem(metrics, &found[i], found[i].status.f_files, found[i].status.f_ffree, found[i].status.f_ffree);
    free(found);
}

void metrics_put_guest(struct metrics *metrics)
{
    put_load(metrics);
    metrics_family(metrics, "kata_guest_cpu_time", "gauge", "Milliseconds that processors spent.");
    each_line("/proc/stat", take_cpu, metrics);
    metrics_family(metrics, "kata_guest_vm_stat", "gauge", "What the kernel counts of its virtual memory.");
    each_line("/proc/vmstat", take_vm_stat, metrics);
    metrics_family(metrics, "kata_guest_netdev_stat", "gauge", "What network interfaces received and sent.");
    each_line("/proc/net/dev", take_interface, metrics);
    metrics_family(metrics, "kata_guest_diskstat", "gauge", "What disks read and wrote, and how long.");
    each_line("/proc/diskstats", take_disk, metrics);
    metrics_family(metrics, "kata_guest_meminfo", "gauge", "Memory of the guest, in bytes; huge pages by number.");
    each_line("/proc/meminfo", take_memory, metrics);
    put_filesystems(metrics);
}
