#define _GNU_SOURCE
#include "process.h"

#include "clock.h"
#include "log.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define SUBSYSTEM "process"

enum {
    PIECE = 256 * 1024, /* what one read gives at most: an answer has to be copied and sent whole */
    /* So long after its end is its output waited for: a runtime asks for the status only when the output has ended, and
     * a process that it left behind may keep that open. */
    LEFTOVER_MS = 500,
    FULL_MS = 50, /* a terminal that takes no more does not always say when it does again */
};

static size_t count;
static uint64_t last_serial;
static uint8_t piece[PIECE];

/* --- streams --- */

static void stream_ready(struct watch *watch, uint32_t events)
{
    (void)events; /* edges: the calls that wait find out by trying */
    ttrpc_wake(LOOP_OWNER(watch, struct stream, watch));
}

static bool stream_open(struct stream *stream, int fd)
{
    stream->watch = (struct watch){.fd = fd, .ready = stream_ready};
    return fd < 0 || loop_watch(&stream->watch, EPOLLIN | EPOLLOUT | EPOLLET);
}

static void stream_close(struct stream *stream)
{
    if (stream->watch.fd < 0)
        return;
    loop_forget(&stream->watch);
    close(stream->watch.fd);
    stream->watch.fd = -1;
    ttrpc_wake(stream);
}

static void close_streams(struct process *process)
{
    stream_close(&process->in);
    stream_close(&process->out);
    stream_close(&process->err);
}

/* --- set-up --- */

static void tell(struct process *process)
{
    ttrpc_wake(process);
    process->changed(process);
}

static void close_channel(struct process *process)
{
    loop_forget(&process->channel);
    close(process->channel.fd);
    process->channel.fd = -1;
}

static void set_failed(struct process *process)
{
    process->state = PROCESS_FAILED;
    close_streams(process);
}

static void take_terminal(struct process *process, int terminal)
{
    if (terminal < 0)
        return;
    fcntl(terminal, F_SETFL, O_NONBLOCK);
    if (!process->terminal || process->out.watch.fd >= 0 || !stream_open(&process->out, terminal)) {
        close(terminal);
        process->out.watch.fd = -1;
    }
}

/* Only the first process waits to be told to go on. */
static void set_ready(struct process *process, bool waits)
{
    process->state = waits ? PROCESS_READY : PROCESS_EXECUTING;
}

static void set_closed(struct process *process)
{
    close_channel(process);
    if (process->state == PROCESS_EXECUTING) {
        process->state = PROCESS_RUNNING;
    } else if (process->state == PROCESS_SETTING_UP) {
        failure_set(&process->failure, TTRPC_INTERNAL, "the process ended before it was set up");
        set_failed(process);
    }
}

/* False: there is no more to hear for now. */
static bool hear(struct process *process)
{
    struct failure failure;
    int terminal = -1;
    switch (spawn_hear(process->channel.fd, &terminal, &failure)) {
    case SPAWN_READY:
        take_terminal(process, terminal);
        set_ready(process, process->id[0] == '\0');
        return true;
    case SPAWN_FAILED:
        process->failure = failure;
        close_channel(process);
        set_failed(process);
        return false;
    case SPAWN_CLOSED:
        set_closed(process);
        return false;
    case SPAWN_NOTHING:
        break;
    }
    return false;
}

static void hear_all(struct process *process)
{
    while (process->channel.fd >= 0 && hear(process))
        ;
}

static void channel_ready(struct watch *watch, uint32_t events)
{
    struct process *process = LOOP_OWNER(watch, struct process, channel);
    (void)events;
    hear_all(process);
    tell(process);
}

static void ended(struct child *child, int status)
{
    struct process *process = LOOP_OWNER(child, struct process, child);
    hear_all(process); /* its last words come before its end */
    process->alive = false;
    process->status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    process->ended_at = clock_ms();
    ttrpc_wake(&process->in);
    ttrpc_wake(&process->out);
    ttrpc_wake(&process->err);
    tell(process);
}

static bool watch_all(struct process *process, const struct spawned *spawned)
{
    process->channel = (struct watch){.fd = spawned->channel, .ready = channel_ready};
    bool watched = loop_watch(&process->channel, EPOLLIN);
    watched &= stream_open(&process->in, spawned->in);
    watched &= stream_open(&process->out, spawned->out);
    watched &= stream_open(&process->err, spawned->err);
    return watched;
}

struct process *process_start(const char *id, const struct plan *plan, void (*changed)(struct process *process),
                              void *owner, struct failure *failure)
{
    struct spawned spawned;
    struct process *process = calloc(1, sizeof *process);
    if (process == NULL) {
        failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "no memory for a process");
        return NULL;
    }
    if (!spawn(plan, &spawned, failure)) {
        free(process);
        return NULL;
    }
    snprintf(process->id, sizeof process->id, "%s", id);
    process->serial = ++last_serial;
    process->alive = true;
    process->terminal = plan->process->terminal;
    process->changed = changed;
    process->owner = owner;
    process->child = (struct child){.pid = spawned.pid, .ended = ended};
    child_add(&process->child);
    count++;
    if (watch_all(process, &spawned))
        return process;
    failure_errno(failure, "cannot watch a process");
    kill(spawned.pid, SIGKILL);
    process_free(process);
    return NULL;
}

bool process_go(struct process *process)
{
    if (process->state != PROCESS_READY || process->channel.fd < 0 || !spawn_go(process->channel.fd))
        return false;
    process->state = PROCESS_EXECUTING;
    return true;
}

void process_free(struct process *process)
{
    if (process->alive)
        child_remove(&process->child);
    if (process->channel.fd >= 0)
        close_channel(process);
    close_streams(process);
    ttrpc_wake(process);
    count--;
    free(process);
}

size_t process_count(void)
{
    return count;
}

/* --- signals --- */

bool process_signal(const struct process *process, int number)
{
    /* Not reaped yet, so the number is nobody else's. */
    return !process->alive || kill(process->child.pid, number) == 0 || errno == ESRCH;
}

bool process_lacks_handler(const struct process *process, int number)
{
    char path[40];
    char text[4096];
    unsigned long long caught = 0;
    snprintf(path, sizeof path, "/proc/%ld/status", (long)process->child.pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    text[size < 0 ? 0 : size] = '\0';
    const char *line = strstr(text, "\nSigCgt:");
    return line != NULL && sscanf(line, "\nSigCgt: %llx", &caught) == 1 && (caught >> (number - 1) & 1) == 0;
}

/* --- what the calls do --- */

/* A failure ends the reading of all of Kata's runtimes. Some take no bytes for none yet, and ask again for ever. */
static enum ttrpc_status end_of_output(struct ttrpc_call *call)
{
    failure_set(&call->failure, TTRPC_INTERNAL, "EOF: the process writes no more");
    return call->failure.status;
}

static enum ttrpc_status wait_for_output(struct process *process, struct stream *stream, struct ttrpc_call *call)
{
    if (process->delivered_at != 0)
        return end_of_output(call);
    if (process->alive)
        return ttrpc_later(call, stream, CLOCK_NEVER);
    int64_t last = process->ended_at + LEFTOVER_MS;
    return clock_ms() >= last ? end_of_output(call) : ttrpc_later(call, stream, last);
}

enum ttrpc_status process_read(struct process *process, struct stream *stream, size_t size, struct ttrpc_call *call)
{
    if (stream->watch.fd < 0)
        return process->state == PROCESS_SETTING_UP ? ttrpc_later(call, process, CLOCK_NEVER) : end_of_output(call);
    ssize_t got;
    do
        got = read(stream->watch.fd, piece, size < PIECE ? size : PIECE);
    while (got < 0 && errno == EINTR);
    if (got > 0)
        return wire_put_bytes(&call->reply, 1, (struct span){piece, (size_t)got}), TTRPC_OK;
    if (got < 0 && errno == EAGAIN)
        return wait_for_output(process, stream, call);
    if (got < 0 && errno != EIO) /* EIO: nobody has the other end of the terminal open any more */
        return failure_errno(&call->failure, "cannot read what the process wrote"), call->failure.status;
    return end_of_output(call);
}

static struct stream *input_of(struct process *process)
{
    return process->terminal ? &process->out : &process->in;
}

/* Behind what came before it, so that it is not lost. */
enum ttrpc_status process_close_input(struct process *process, struct ttrpc_call *call)
{
    if (process->terminal)
        return TTRPC_OK;
    if (!ttrpc_has_turn(call, &process->in.writers))
        return ttrpc_later(call, NULL, CLOCK_NEVER);
    stream_close(&process->in);
    return TTRPC_OK;
}

enum ttrpc_status process_write(struct process *process, struct span data, struct ttrpc_call *call)
{
    struct stream *stream = input_of(process);
    if (data.size == 0)
        return process_close_input(process, call);
    /* A part of what came later must not come between two parts of this. */
    if (!ttrpc_has_turn(call, &stream->writers))
        return ttrpc_later(call, NULL, CLOCK_NEVER);
    if (stream->watch.fd < 0)
        return failure_set(&call->failure, TTRPC_FAILED_PRECONDITION, "the standard input of the process is closed"),
               call->failure.status;
    /* All of it, as Kata's agent does: its runtime takes a part for an error and gives up the input. */
    while (call->done < data.size) {
        ssize_t wrote = write(stream->watch.fd, data.data + call->done, data.size - call->done);
        if (wrote > 0)
            call->done += (size_t)wrote;
        else if (wrote == 0 || errno == EAGAIN)
            return ttrpc_later(call, stream, process->terminal ? clock_ms() + FULL_MS : CLOCK_NEVER);
        else if (errno != EINTR)
            return failure_errno(&call->failure, "cannot write to the process"), call->failure.status;
    }
    wire_put_uint(&call->reply, 1, data.size);
    return TTRPC_OK;
}
