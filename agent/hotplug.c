#define _GNU_SOURCE
#include "hotplug.h"

#include "log.h"
#include "loop.h"

#include <errno.h>
#include <linux/netlink.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SUBSYSTEM "hotplug"

static void (*on_change)(void);

static const char subject;
const void *const hotplug_subject = &subject;

int64_t hotplug_timeout_ms(void)
{
    return 3000;
}

static void read_uevents(struct watch *watch, uint32_t events)
{
    char event[4096];
    (void)events;
    /* ENOBUFS: some were lost. Whatever they said, everybody looks. */
    while (recv(watch->fd, event, sizeof event, 0) >= 0 || errno == ENOBUFS || errno == EINTR)
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

const struct ttrpc_method_row hotplug_calls[] = {
    {NULL, NULL},
};
