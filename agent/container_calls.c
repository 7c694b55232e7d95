/* The calls about containers that are there, and about their processes. */
#define _GNU_SOURCE
#include "container.h"

#include "clock.h"
#include "containers.h"
#include "log.h"
#include "sandbox.h"
#include "terminal.h"
#include "wire.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

#define SUBSYSTEM "container"

enum {
    POLL_MS = 5, /* the kernel does not say when the last process of a cgroup has gone */
    SETTLE_MS = 2, /* for the calls that wait for a process to be told how it ended */
};

/* --- processes --- */

/* The process that a call is about; NULL, and the failure. */
static struct process *look_up(struct ttrpc_call *call, const char *container_id, const char *exec_id)
{
    struct container *container = container_look_up(call, container_id);
    return container == NULL ? NULL : container_process(call, container, exec_id);
}

/* The kernel would not give SIGTERM to a namespace's first process that has no handler for it. */
static int number_for_first(const struct process *first, int number)
{
    return number == SIGTERM && process_lacks_handler(first, SIGTERM) ? SIGKILL : number;
}

/* Whether or not the first process is there to be found. */
static void signal_all(struct container *container, int number)
{
    const struct process *first = container->first;
    if (number == SIGKILL)
        container_kill(container);
    else if (first == NULL || !first->alive)
        cgroup_signal(&container->cgroup, number, 0, number);
    else
        cgroup_signal(&container->cgroup, number, first->child.pid, number_for_first(first, number));
}

/* No exec id: a runtime that was asked for all processes of the container leaves it out. */
static enum ttrpc_status signal_process(struct ttrpc_call *call)
{
    struct signal_process_request request;
    if (!ttrpc_decode(call, &message_signal_process_request, &request))
        return call->failure.status;
    struct container *container = container_look_up(call, request.container_id);
    if (container == NULL)
        return call->failure.status;
    if (request.signal == 0 || request.signal > 64)
        return failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "there is no signal %u", request.signal),
               call->failure.status;
    int number = (int)request.signal;
    if (request.exec_id[0] == '\0') {
        signal_all(container, number);
        return TTRPC_OK;
    }
    const struct process *process = container_process(call, container, request.exec_id);
    if (process == NULL)
        return call->failure.status;
    if (!process_signal(process, process == container->first ? number_for_first(process, number) : number))
        return failure_errno(&call->failure, "cannot signal the process"), call->failure.status;
    return TTRPC_OK;
}

/* Its output that nobody has read is still there for the calls that read it now. */
static enum ttrpc_status wait_process(struct ttrpc_call *call)
{
    struct process_request request;
    if (!ttrpc_decode(call, &message_process_request, &request))
        return call->failure.status;
    struct process *process = look_up(call, request.container_id, request.exec_id);
    if (process == NULL)
        return call->failure.status;
    if (process->alive)
        return ttrpc_later(call, process, CLOCK_NEVER);
    wire_put_uint(&call->reply, 1, (uint64_t)process->status);
    if (process->delivered_at == 0) {
        process->delivered_at = clock_ms();
        ttrpc_wake(&process->out);
        ttrpc_wake(&process->err);
    }
    return TTRPC_OK;
}

static enum ttrpc_status read_stream(struct ttrpc_call *call, bool errors)
{
    struct read_stream_request request;
    if (!ttrpc_decode(call, &message_read_stream_request, &request))
        return call->failure.status;
    struct process *process = look_up(call, request.container_id, request.exec_id);
    if (process == NULL)
        return call->failure.status;
    if (request.len == 0)
        return failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "nothing is to be read: len is 0"),
               call->failure.status;
    return process_read(process, errors && !process->terminal ? &process->err : &process->out, request.len, call);
}

static enum ttrpc_status read_stdout(struct ttrpc_call *call)
{
    return read_stream(call, false);
}

static enum ttrpc_status read_stderr(struct ttrpc_call *call)
{
    return read_stream(call, true);
}

static enum ttrpc_status write_stdin(struct ttrpc_call *call)
{
    struct write_stream_request request;
    if (!ttrpc_decode(call, &message_write_stream_request, &request))
        return call->failure.status;
    struct process *process = look_up(call, request.container_id, request.exec_id);
    return process == NULL ? call->failure.status : process_write(process, request.data, call);
}

static enum ttrpc_status close_stdin(struct ttrpc_call *call)
{
    struct process_request request;
    if (!ttrpc_decode(call, &message_process_request, &request))
        return call->failure.status;
    struct process *process = look_up(call, request.container_id, request.exec_id);
    if (process == NULL)
        return call->failure.status;
    return process_close_input(process, call);
}

static enum ttrpc_status tty_win_resize(struct ttrpc_call *call)
{
    struct tty_win_resize_request request;
    if (!ttrpc_decode(call, &message_tty_win_resize_request, &request))
        return call->failure.status;
    const struct process *process = look_up(call, request.container_id, request.exec_id);
    if (process == NULL)
        return call->failure.status;
    if (!process->terminal || process->out.watch.fd < 0)
        return failure_set(&call->failure, TTRPC_UNAVAILABLE, "the process has no terminal"), call->failure.status;
    if (request.row > UINT16_MAX || request.column > UINT16_MAX)
        return failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "no terminal is so large"), call->failure.status;
    if (!terminal_resize(process->out.watch.fd, request.row, request.column))
        return failure_errno(&call->failure, "cannot resize the terminal"), call->failure.status;
    return TTRPC_OK;
}

/* --- containers --- */

static enum ttrpc_status stats_container(struct ttrpc_call *call)
{
    struct container_request request;
    struct buffer stats = {0};
    if (!ttrpc_decode(call, &message_container_request, &request))
        return call->failure.status;
    const struct container *container = container_look_up(call, request.container_id);
    if (container == NULL)
        return call->failure.status;
    cgroup_put_stats(&container->cgroup, &stats);
    call->reply.failed |= stats.failed;
    wire_put_message(&call->reply, 1, &stats);
    buffer_reset(&stats);
    return TTRPC_OK;
}

static enum ttrpc_status update_container(struct ttrpc_call *call)
{
    struct update_container_request request;
    if (!ttrpc_decode(call, &message_update_container_request, &request))
        return call->failure.status;
    const struct container *container = container_look_up(call, request.container_id);
    if (container == NULL || !cgroup_limit(&container->cgroup, request.resources, &call->failure))
        return call->failure.status;
    return TTRPC_OK;
}

static enum ttrpc_status freeze(struct ttrpc_call *call, bool frozen)
{
    struct container_request request;
    if (!ttrpc_decode(call, &message_container_request, &request))
        return call->failure.status;
    struct container *container = container_look_up(call, request.container_id);
    if (container == NULL)
        return call->failure.status;
    if (container->state != CONTAINER_CREATED && container->state != CONTAINER_RUNNING)
        return failure_set(&call->failure, TTRPC_FAILED_PRECONDITION, "the container %.100s does not run",
                           container->id),
               call->failure.status;
    if (container->paused != frozen && !cgroup_freeze(&container->cgroup, frozen, &call->failure))
        return call->failure.status;
    container->paused = frozen;
    if (frozen && !cgroup_is_frozen(&container->cgroup))
        return ttrpc_later(call, container, clock_ms() + POLL_MS);
    return TTRPC_OK;
}

static enum ttrpc_status pause_container(struct ttrpc_call *call)
{
    return freeze(call, true);
}

static enum ttrpc_status resume_container(struct ttrpc_call *call)
{
    return freeze(call, false);
}

/* --- RemoveContainer --- */

static void run_last_hooks(const struct container *container)
{
    struct container_hooks_state state;
    struct failure failure = {0};
    struct buffer text = {0};
    const struct oci_spec *spec = container->request.oci;
    container_hooks(container, &state, "stopped");
    state.pid = 0;
    if (spec != NULL && spec->hooks != NULL &&
        !container_hooks_run(spec->hooks->poststop.items, spec->hooks->poststop.count, &state, &failure))
        LOG(LOG_WARN, SUBSYSTEM, "a poststop hook failed", LOG_STRING("reason", failure.reason));
    container_hooks_put_state(&text, &state);
    if (!text.failed)
        sandbox_run_hooks(SANDBOX_POSTSTOP, (const char *)buffer_content(&text).data);
    buffer_reset(&text);
}

static bool is_settled(const struct container *container)
{
    return container_is_dead(container) && clock_ms() >= container->changed_at + SETTLE_MS;
}

static enum ttrpc_status await_death(struct ttrpc_call *call, const struct container *container, uint32_t seconds)
{
    int64_t now = clock_ms();
    int64_t limit = seconds == 0 ? CLOCK_NEVER : call->since + (int64_t)seconds * 1000;
    if (now >= limit) {
        errno = ETIME;
        failure_errno(&call->failure, "the container %.100s did not end: ETIME", container->id);
        return call->failure.status;
    }
    return ttrpc_later(call, container, now + POLL_MS);
}

static enum ttrpc_status remove_container(struct ttrpc_call *call)
{
    struct remove_container_request request;
    if (!ttrpc_decode(call, &message_remove_container_request, &request))
        return call->failure.status;
    struct container *container = call->memo == 0 ? container_look_up(call, request.container_id)
                                                  : container_with(call->memo);
    if (container == NULL || container->state == CONTAINER_FAILED)
        return call->failure.status; /* OK when it went meanwhile */
    call->memo = container->serial;
    if (call->tries == 0 || !container_is_dead(container))
        container_kill(container);
    if (!is_settled(container))
        return await_death(call, container, request.timeout);
    run_last_hooks(container);
    container_release(container);
    container_free(container);
    return TTRPC_OK;
}

static enum ttrpc_status get_oom_event(struct ttrpc_call *call)
{
    struct empty request;
    if (!ttrpc_decode(call, &message_empty, &request))
        return call->failure.status;
    return oom_next(call);
}

bool container_supports_seccomp(void)
{
    return true;
}

const struct ttrpc_method_row container_calls[] = {
    {"CreateContainer", container_create},
    {"StartContainer", container_start},
    {"ExecProcess", container_exec},
    {"SignalProcess", signal_process},
    {"WaitProcess", wait_process},
    {"ReadStdout", read_stdout},
    {"ReadStderr", read_stderr},
    {"WriteStdin", write_stdin},
    {"CloseStdin", close_stdin},
    {"TtyWinResize", tty_win_resize},
    {"StatsContainer", stats_container},
    {"UpdateContainer", update_container},
    {"PauseContainer", pause_container},
    {"ResumeContainer", resume_container},
    {"RemoveContainer", remove_container},
    {"GetOOMEvent", get_oom_event},
    {NULL, NULL},
};
