/* The log for the host: lines wait here, at most so many bytes, until somebody comes and as fast as they are read. */
#define _GNU_SOURCE
#include "debug.h"

#include "buffer.h"
#include "log.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST = 64 * 1024 };

static struct buffer lines;
static bool torn; /* `lines` begins in the middle of one: the rest of it is the reader's */
static unsigned long lost;

static void ready(struct watch *watch, uint32_t events);
static struct watch reader = {.fd = -1, .ready = ready};

static void drop_line(void)
{
    struct span content = buffer_content(&lines);
    const uint8_t *end = memchr(content.data, '\n', content.size);
    buffer_consume(&lines, end == NULL ? content.size : (size_t)(end - content.data) + 1);
    lost++;
}

static void leave(void)
{
    loop_forget(&reader);
    close(reader.fd);
    reader.fd = -1;
    if (torn)
        drop_line();
    torn = false;
}

static void tell_lost(void)
{
    char number[24];
    snprintf(number, sizeof number, "%lu", lost);
    lost = 0;
    LOG(LOG_WARN, "debug", "the host's log has lost lines", LOG_RAW("lines", number));
}

static void flush(void)
{
    while (lines.size > 0) {
        struct span content = buffer_content(&lines);
        ssize_t sent = send(reader.fd, content.data, content.size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno == EAGAIN)
            return;
        if (sent <= 0) {
            leave();
            return;
        }
        torn = content.data[sent - 1] != '\n';
        buffer_consume(&lines, (size_t)sent);
    }
    if (lost > 0)
        tell_lost();
}

/* Nobody there: the last lines count. Somebody slow: what has been begun goes on, and new lines are left out. */
static void keep(struct span line)
{
    while (reader.fd < 0 && lines.size > 0 && lines.size + line.size > MOST)
        drop_line();
    if (lines.size + line.size > MOST) {
        lost++;
        return;
    }
    buffer_append(&lines, line.data, line.size);
    lines.failed = false; /* without memory a line is lost, no more */
    if (reader.fd >= 0)
        flush();
}

/* What a reader says does not matter; that it hung up does. */
static void ready(struct watch *watch, uint32_t events)
{
    (void)watch;
    if ((events & (EPOLLHUP | EPOLLERR)) != 0)
        leave();
    else
        flush();
}

void debug_log_begin(void)
{
    log_tee(keep);
}

void debug_log_accepted(int stream)
{
    if (reader.fd >= 0) { /* there is one reader, as with Kata's agent */
        close(stream);
        return;
    }
    reader.fd = stream;
    if (!loop_watch(&reader, EPOLLOUT | EPOLLET)) {
        close(stream);
        reader.fd = -1;
        return;
    }
    flush();
}
