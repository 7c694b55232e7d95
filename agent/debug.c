#define _GNU_SOURCE
#include "debug.h"

#include "guest.h"
#include "log.h"
#include "server.h"

#include <sys/socket.h> /* before vm_sockets.h, which in older headers needs it and does not say so */

#include <errno.h>
#include <linux/vm_sockets.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#define SUBSYSTEM "debug"

enum { WAITING = 4 }; /* connections that the kernel holds for us */

static struct debug_options asked;
static unsigned log_port;

static bool parse_port(const char *word, unsigned *port)
{
    char text[32];
    char *end;
    *port = 0;
    if (!guest_word(word, text, sizeof text) || strcmp(text, "0") == 0)
        return false;
    unsigned long value = strtoul(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || value >= VMADDR_PORT_ANY) {
        LOG(LOG_WARN, SUBSYSTEM, "no port of vsock", LOG_STRING("word", word), LOG_STRING("value", text));
        return false;
    }
    *port = (unsigned)value;
    return true;
}

static void accept_one(struct watch *watch, uint32_t events)
{
    struct listener *listener = LOOP_OWNER(watch, struct listener, watch);
    struct sockaddr_storage peer = {0};
    socklen_t size = sizeof peer;
    (void)events;
    int stream = accept4(watch->fd, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (stream < 0)
        return;
    if (server_is_host(&peer)) {
        listener->accepted(stream);
        return;
    }
    LOG(LOG_WARN, SUBSYSTEM, "somebody who is not the host was turned away", LOG_STRING("what", listener->what));
    close(stream);
}

static void listen_at(struct listener *listener, const struct sockaddr *address, socklen_t size)
{
    int fd = socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    listener->watch = (struct watch){.fd = fd, .ready = accept_one};
    if (fd >= 0 && bind(fd, address, size) == 0 && listen(fd, WAITING) == 0 && loop_watch(&listener->watch, EPOLLIN)) {
        LOG(LOG_INFO, SUBSYSTEM, "listening", LOG_STRING("what", listener->what));
        return;
    }
    int number = errno;
    LOG(LOG_WARN, SUBSYSTEM, "cannot listen", LOG_STRING("what", listener->what), LOG_ERRNO(number));
    if (fd >= 0)
        close(fd);
}

static void listen_on(struct listener *listener, const char *path, unsigned port)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    struct sockaddr_vm number = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    if (path != NULL) {
        snprintf(name.sun_path, sizeof name.sun_path, "%s", path);
        listen_at(listener, (const struct sockaddr *)&name, sizeof name);
    } else if (port != 0) {
        listen_at(listener, (const struct sockaddr *)&number, sizeof number);
    }
}

void debug_begin(const struct debug_options *options)
{
    asked = *options;
    if (asked.log != NULL || parse_port("agent.log_vport", &log_port))
        debug_log_begin();
}

void debug_listen(void)
{
    static struct listener console = {.accepted = debug_console_accepted, .what = "debug console"};
    static struct listener lines = {.accepted = debug_log_accepted, .what = "log"};
    unsigned port = 0;
    listen_on(&lines, asked.log, log_port);
    bool wanted = asked.console != NULL || guest_flag("agent.debug_console");
    if (!wanted)
        return;
    if (asked.console == NULL && !parse_port("agent.debug_console_vport", &port))
        debug_console_local();
    else
        listen_on(&console, asked.console, port);
}
