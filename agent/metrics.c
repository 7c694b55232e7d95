#define _GNU_SOURCE
#include "metrics.h"

#include "metrics_guest.h"
#include "metrics_text.h"
#include "small_file.h"
#include "wire.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Of /proc/self/stat, behind the name of the program. */
struct own_stat {
    uint64_t times[4]; /* utime, stime, cutime, cstime, in ticks */
    uint64_t threads;
    uint64_t virtual_bytes;
    uint64_t resident_pages;
};

static bool read_own_stat(struct own_stat *own)
{
    char text[2048];
    if (!small_file_read("/proc/self/stat", text, sizeof text))
        return false;
    char *rest = strrchr(text, ')'); /* a name may have any character in it */
    if (rest == NULL)
        return false;
    strsep(&rest, " ");
    for (int number = 3; rest != NULL; number++) { /* as proc(5) counts */
        uint64_t value = strtoull(strsep(&rest, " "), NULL, 10);
        if (number >= 14 && number <= 17)
            own->times[number - 14] = value;
        else if (number == 20)
            own->threads = value;
        else if (number == 23)
            own->virtual_bytes = value;
        else if (number == 24)
            own->resident_pages = value;
    }
    return true;
}

static const struct metrics_label none[] = {{NULL, NULL}};

static void put_stat(struct metrics *metrics)
{
    static const char *const items[] = {"utime", "stime", "cutime", "cstime"};
    struct own_stat own = {0};
    long ticks = sysconf(_SC_CLK_TCK);
    if (!read_own_stat(&own))
        return;
    metrics_family(metrics, "kata_agent_threads", "gauge", "Threads of the agent.");
    metrics_count(metrics, none, own.threads);
    metrics_family(metrics, "kata_agent_total_time", "gauge", "Seconds of processor time that the agent used.");
    metrics_sample(metrics, none, (double)(own.times[0] + own.times[1]) / (double)(ticks > 0 ? ticks : 100));
    metrics_family(metrics, "kata_agent_total_vm", "gauge", "Virtual memory of the agent, in bytes.");
    metrics_count(metrics, none, own.virtual_bytes);
    metrics_family(metrics, "kata_agent_total_rss", "gauge", "Memory of the agent, in bytes.");
    metrics_count(metrics, none, own.resident_pages * (uint64_t)sysconf(_SC_PAGESIZE));
    metrics_family(metrics, "kata_agent_proc_stat", "gauge", "Ticks that the agent and its children used.");
    for (size_t i = 0; i < 4; i++)
        metrics_item(metrics, items[i], own.times[i]);
}

/* Lines of "Name:  123 kB" whose names, in small letters, are listed; NULL: all are. */
static void put_lines(struct metrics *metrics, char *text, const char *const *names)
{
    for (char *line = strsep(&text, "\n"); line != NULL; line = strsep(&text, "\n")) {
        char *name = strsep(&line, ":");
        if (line == NULL)
            continue;
        for (char *at = name; *at != '\0'; at++)
            *at = (char)tolower((unsigned char)*at);
        const char *const *listed = names;
        while (listed != NULL && *listed != NULL && strcmp(*listed, name) != 0)
            listed++;
        if (listed == NULL || *listed != NULL)
            metrics_item(metrics, name, strtoull(line, NULL, 10));
    }
}

static void put_status(struct metrics *metrics)
{
    static const char *const names[] = {
        "vmpeak",  "vmsize", "vmlck", "vmpin", "vmhwm", "vmrss", "rssanon", "rssfile",      "rssshmem",
        "vmdata",  "vmstk",  "vmexe", "vmlib", "vmpte", "vmswap", "hugetlbpages", "voluntary_ctxt_switches",
        "nonvoluntary_ctxt_switches", NULL};
    char text[4096];
    metrics_family(metrics, "kata_agent_proc_status", "gauge", "Memory of the agent in KiB, and its switches.");
    if (small_file_read("/proc/self/status", text, sizeof text))
        put_lines(metrics, text, names);
}

static void put_io(struct metrics *metrics)
{
    char text[1024];
    metrics_family(metrics, "kata_agent_io_stat", "gauge", "What the agent read and wrote.");
    if (small_file_read("/proc/self/io", text, sizeof text))
        put_lines(metrics, text, NULL);
}

static enum ttrpc_status get_metrics(struct ttrpc_call *call)
{
    static uint64_t scrapes;
    struct empty request;
    struct metrics metrics = {.family = NULL};
    if (!ttrpc_decode(call, &message_empty, &request))
        return call->failure.status;
    metrics_family(&metrics, "kata_agent_scrape_count", "counter", "How often these numbers were asked for.");
    metrics_count(&metrics, none, ++scrapes);
    put_stat(&metrics);
    put_status(&metrics);
    put_io(&metrics);
    metrics_put_guest(&metrics);
    bool whole = !metrics.text.failed;
    if (whole)
        wire_put_bytes(&call->reply, 1, buffer_content(&metrics.text));
    buffer_reset(&metrics.text);
    if (!whole)
        failure_set(&call->failure, TTRPC_RESOURCE_EXHAUSTED, "no memory for the numbers");
    return whole ? TTRPC_OK : call->failure.status;
}

const struct ttrpc_method_row metrics_calls[] = {
    {"GetMetrics", get_metrics},
    {NULL, NULL},
};
