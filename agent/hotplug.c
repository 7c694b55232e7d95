#define _GNU_SOURCE
#include "hotplug.h"

#include "clock.h"
#include "guest.h"
#include "log.h"
#include "loop.h"
#include "small_file.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/netlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SUBSYSTEM "hotplug"
#define SYSTEM "/sys/devices/system/"
#define PROBE SYSTEM "memory/probe"

enum {
    TIMEOUT_SECONDS = 3,
    LONGEST_TIMEOUT_SECONDS = 3600,
    /* Kata's agent looks for processors a hundred times. We look at each uevent as well, so time is the limit. */
    AGAIN_MS = 50,
    PATIENCE_MS = 100 * AGAIN_MS,
};

static void (*on_change)(void);

static const char subject;
const void *const hotplug_subject = &subject;

static int64_t read_timeout(void)
{
    char word[16];
    char *end;
    if (!guest_word("agent.hotplug_timeout", word, sizeof word))
        return TIMEOUT_SECONDS;
    unsigned long seconds = strtoul(word, &end, 10);
    if (word[0] >= '0' && word[0] <= '9' && *end == '\0' && seconds > 0 && seconds <= LONGEST_TIMEOUT_SECONDS)
        return (int64_t)seconds;
    LOG(LOG_WARN, SUBSYSTEM, "agent.hotplug_timeout is no number of seconds from 1 to 3600",
        LOG_STRING("value", word));
    return TIMEOUT_SECONDS;
}

int64_t hotplug_timeout_ms(void)
{
    static int64_t seconds;
    if (seconds == 0)
        seconds = read_timeout();
    return 1000 * seconds;
}

/* --- what is offline --- */

/* "memory12" of "memory": a name, and digits behind it. */
static bool is_numbered(const char *name, const char *kind)
{
    size_t size = strlen(kind);
    if (strncmp(name, kind, size) != 0 || name[size] == '\0')
        return false;
    return name[size + strspn(name + size, "0123456789")] == '\0';
}

/* False: it is online, or nothing that can be switched. */
static bool is_offline(const char *path)
{
    char digit[2];
    return small_file_read(path, digit, sizeof digit) && digit[0] == '0';
}

/* Memory is made available only where nothing of it is in use yet: that may fail, and is tried again when asked. */
static void bring_online(const char *kind, const char *name)
{
    char path[sizeof SYSTEM + 320];
    snprintf(path, sizeof path, SYSTEM "%s/%.255s/online", kind, name);
    if (!is_offline(path))
        return;
    if (small_file_write(path, "1")) {
        LOG(LOG_INFO, SUBSYSTEM, "brought online", LOG_STRING("what", name));
        return;
    }
    int number = errno;
    LOG(LOG_WARN, SUBSYSTEM, "cannot bring online", LOG_STRING("what", name), LOG_ERRNO(number));
}

/* Of "0-3,5": how many. */
static unsigned long count_online_cpus(void)
{
    char text[4096];
    if (!small_file_read(SYSTEM "cpu/online", text, sizeof text))
        return 0;
    unsigned long count = 0;
    for (char *at = text; *at >= '0' && *at <= '9';) {
        unsigned long first = strtoul(at, &at, 10);
        unsigned long last = *at == '-' ? strtoul(at + 1, &at, 10) : first;
        count += last >= first ? last - first + 1 : 0;
        at += *at == ',';
    }
    return count;
}

/* All of a kind; of processors, until so many are online. */
static void bring_all_online(const char *kind, unsigned long enough)
{
    char directory[sizeof SYSTEM + 32];
    snprintf(directory, sizeof directory, SYSTEM "%s", kind);
    DIR *list = opendir(directory);
    if (list == NULL)
        return;
    for (const struct dirent *entry; (entry = readdir(list)) != NULL;) {
        if (!is_numbered(entry->d_name, kind))
            continue;
        if (enough > 0 && count_online_cpus() >= enough)
            break;
        bring_online(kind, entry->d_name);
    }
    closedir(list);
}

/* --- uevents --- */

/* The value of `KEY=` among the lines of an event, which end with NULs; "": it has none. */
static const char *event_value(const char *event, size_t size, const char *key)
{
    size_t length = strlen(key);
    for (const char *line = event; line < event + size; line += strlen(line) + 1)
        if (strncmp(line, key, length) == 0 && line[length] == '=')
            return line + length + 1;
    return "";
}

static void see_to_event(const char *event, size_t size)
{
    const char *path = event_value(event, size, "DEVPATH");
    const char *name = strrchr(path, '/');
    if (strcmp(event_value(event, size, "ACTION"), "add") == 0 &&
        strcmp(event_value(event, size, "SUBSYSTEM"), "memory") == 0 && name != NULL &&
        is_numbered(name + 1, "memory"))
        bring_online("memory", name + 1);
}

/* False: there is none for now. */
static bool read_event(int socket)
{
    char event[8192 + 1]; /* the kernel's are 2 KiB at most */
    struct sockaddr_nl sender = {0};
    struct iovec place = {.iov_base = event, .iov_len = sizeof event - 1};
    struct msghdr message = {.msg_name = &sender, .msg_namelen = sizeof sender, .msg_iov = &place, .msg_iovlen = 1};
    ssize_t size = recvmsg(socket, &message, 0);
    if (size < 0 && errno == ENOBUFS) {
        bring_all_online("memory", 0); /* events were lost, whatever they said */
        return true;
    }
    if (size < 0)
        return errno == EINTR;
    event[size] = '\0';
    if (sender.nl_pid == 0) /* the kernel, not a container that may send on netlink */
        see_to_event(event, (size_t)size);
    return true;
}

static void read_uevents(struct watch *watch, uint32_t events)
{
    enum { TURNS = 256 }; /* then the others get theirs */
    (void)events;
    for (int turn = 0; turn < TURNS && read_event(watch->fd); turn++)
        ;
    if (on_change != NULL)
        on_change();
    ttrpc_wake(hotplug_subject);
}

void hotplug_begin(void (*changed)(void))
{
    static struct watch watch = {.ready = read_uevents};
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
    on_change = changed;
    watch.fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
    if (watch.fd < 0 || bind(watch.fd, (const struct sockaddr *)&address, sizeof address) != 0 ||
        !loop_watch(&watch, EPOLLIN)) {
        int number = errno;
        LOG(LOG_WARN, SUBSYSTEM, "cannot hear of new devices", LOG_ERRNO(number));
        if (watch.fd >= 0)
            close(watch.fd);
    }
}

/* --- calls --- */

/* `wait` makes no difference, as in Kata's agent since 2.0: the answer says what has come of it. */
static enum ttrpc_status online_cpu_mem(struct ttrpc_call *call)
{
    struct online_cpu_mem_request request;
    if (!ttrpc_decode(call, &message_online_cpu_mem_request, &request))
        return call->failure.status;
    if (request.nb_cpus > 0)
        bring_all_online("cpu", request.nb_cpus);
    if (!request.cpu_only)
        bring_all_online("memory", 0);
    unsigned long online = count_online_cpus();
    if (online >= request.nb_cpus)
        return TTRPC_OK;
    int64_t now = clock_ms();
    if (now < call->since + PATIENCE_MS)
        return ttrpc_later(call, hotplug_subject, now + AGAIN_MS);
    failure_set(&call->failure, TTRPC_INTERNAL, "%lu of %" PRIu32 " processors are online, and no more came in %d ms",
                online, request.nb_cpus, PATIENCE_MS);
    return call->failure.status;
}

static enum ttrpc_status mem_hotplug_by_probe(struct ttrpc_call *call)
{
    struct mem_hotplug_by_probe_request request;
    if (!ttrpc_decode(call, &message_mem_hotplug_by_probe_request, &request))
        return call->failure.status;
    for (size_t i = 0; i < request.addresses.count; i++) {
        char text[32];
        snprintf(text, sizeof text, "0x%" PRIX64, request.addresses.items[i]);
        if (!small_file_write(PROBE, text)) {
            failure_errno(&call->failure, "cannot announce memory at %s in " PROBE, text);
            break;
        }
    }
    return call->failure.status;
}

const struct ttrpc_method_row hotplug_calls[] = {
    {"OnlineCPUMem", online_cpu_mem},
    {"MemHotplugByProbe", mem_hotplug_by_probe},
    {NULL, NULL},
};
