/* Shells for whoever debugs the guest: on terminals that a stream carries, or on the guest's console.
 *
 *     host ── stream ── to_shell → ─┐
 *                   └── ← to_host ──┴── master ═ slave ── shell
 */
#define _GNU_SOURCE
#include "debug.h"

#include "buffer.h"
#include "child.h"
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define SUBSYSTEM "debug"
#define CONSOLE "/dev/console"

enum {
    SESSIONS = 8,
    PIECE = 4096, /* waits in each direction, at most */
    TURNS = 32, /* in a row, before others get theirs */
    PAUSE_SECONDS = 1, /* between a shell on the console and the next */
};

struct session {
    bool used;
    bool running; /* the shell */
    bool connected;
    bool finished; /* the host will say no more; what the shell says still counts */
    struct watch stream;
    struct watch master;
    struct child shell;
    struct buffer to_shell;
    struct buffer to_host;
};

static struct session sessions[SESSIONS];

/* --- the shell --- */

static const char *find_shell(void)
{
    static const char *const shells[] = {"/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh"};
    for (size_t i = 0; i < sizeof shells / sizeof shells[0]; i++)
        if (access(shells[i], X_OK) == 0)
            return shells[i];
    LOG(LOG_WARN, SUBSYSTEM, "the guest has no shell for its debug console");
    return NULL;
}

static _Noreturn void become_shell(const char *shell, int terminal)
{
    const char *const argv[] = {shell, NULL};
    const char *const env[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
                               "TERM=linux", NULL};
    child_reset_signals();
    setsid();
    ioctl(terminal, TIOCSCTTY, 1); /* the console is taken from PID 1, which has no use for it */
    for (int i = STDIN_FILENO; i <= STDERR_FILENO; i++)
        dup2(terminal, i);
    execve(shell, (char *const *)(uintptr_t)argv, (char *const *)(uintptr_t)env);
    _exit(127);
}

static bool start_shell(struct child *child, int terminal)
{
    const char *shell = find_shell();
    if (shell == NULL)
        return false;
    child->pid = fork();
    if (child->pid == 0)
        become_shell(shell, terminal);
    if (child->pid < 0) {
        int number = errno;
        LOG(LOG_WARN, SUBSYSTEM, "cannot start a shell", LOG_ERRNO(number));
        return false;
    }
    child_add(child);
    LOG(LOG_INFO, SUBSYSTEM, "a debug console was opened", LOG_STRING("shell", shell));
    return true;
}

/* --- on a stream --- */

static void release(struct session *session)
{
    buffer_reset(&session->to_shell);
    buffer_reset(&session->to_host);
    *session = (struct session){0};
}

/* Closing the master hangs the terminal up; a shell that does not mind is killed. The place is free when it is gone. */
static void hang_up(struct session *session)
{
    if (!session->connected)
        return;
    session->connected = false;
    loop_forget(&session->stream);
    loop_forget(&session->master);
    close(session->stream.fd);
    close(session->master.fd);
    if (session->running)
        kill(session->shell.pid, SIGKILL);
    else
        release(session);
}

/* 1: something moved; 0: nothing for now; -1: no more will come. */
static int fill(int from, struct buffer *into)
{
    if (into->size >= PIECE)
        return 0;
    uint8_t *room = buffer_reserve(into, PIECE - into->size);
    if (room == NULL)
        return -1;
    ssize_t got = read(from, room, PIECE - into->size);
    if (got > 0) {
        buffer_commit(into, (size_t)got);
        return 1;
    }
    return got < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}

static int drain(struct buffer *from, int to)
{
    struct span content = buffer_content(from);
    if (content.size == 0)
        return 0;
    ssize_t wrote = write(to, content.data, content.size);
    if (wrote > 0) {
        buffer_consume(from, (size_t)wrote);
        return 1;
    }
    return wrote < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}

static int move_in(struct session *session)
{
    int filled = session->finished ? 0 : fill(session->stream.fd, &session->to_shell);
    if (filled < 0)
        session->finished = true;
    int drained = drain(&session->to_shell, session->master.fd);
    return filled > 0 || drained > 0;
}

/* -1: it is over. */
static int move_out(struct session *session)
{
    int filled = fill(session->master.fd, &session->to_host);
    int drained = drain(&session->to_host, session->stream.fd);
    if (drained < 0)
        return -1;
    /* The shell's last words, and then the end: every process has closed the terminal, or the shell has ended. */
    bool silent = filled < 0 || (filled == 0 && !session->running && session->to_host.size < PIECE);
    if (silent && session->to_host.size == 0)
        return -1;
    return filled > 0 || drained > 0;
}

/* Edges would not tell of what is left: watching anew does. */
static void again(struct session *session)
{
    loop_forget(&session->stream);
    loop_watch(&session->stream, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
}

static void pump(struct session *session)
{
    for (int turn = 0; turn < TURNS; turn++) {
        int in = move_in(session);
        int out = move_out(session);
        if (out < 0) {
            hang_up(session);
            return;
        }
        if (in == 0 && out == 0)
            return;
    }
    again(session);
}

static void stream_ready(struct watch *watch, uint32_t events)
{
    struct session *session = LOOP_OWNER(watch, struct session, stream);
    if ((events & (EPOLLHUP | EPOLLERR)) != 0)
        hang_up(session);
    else
        pump(session);
}

static void master_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    pump(LOOP_OWNER(watch, struct session, master));
}

static void shell_ended(struct child *child, int status)
{
    struct session *session = LOOP_OWNER(child, struct session, shell);
    (void)status;
    session->running = false;
    if (session->connected)
        pump(session);
    else
        release(session);
}

static struct session *free_session(void)
{
    for (size_t i = 0; i < SESSIONS; i++)
        if (!sessions[i].used)
            return &sessions[i];
    LOG(LOG_WARN, SUBSYSTEM, "too many debug consoles at a time");
    return NULL;
}

/* The master, and the name of the slave; -1: there are no terminals to be had. */
static int open_terminal(char *name, size_t size)
{
    const struct winsize usual = {.ws_row = 24, .ws_col = 80};
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (master < 0)
        return -1;
    if (unlockpt(master) != 0 || ptsname_r(master, name, size) != 0) {
        close(master);
        return -1;
    }
    ioctl(master, TIOCSWINSZ, &usual);
    return master;
}

static bool open_session(struct session *session, int stream)
{
    char terminal[32];
    int master = open_terminal(terminal, sizeof terminal);
    int slave = master < 0 ? -1 : open(terminal, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0) {
        int number = errno;
        LOG(LOG_WARN, SUBSYSTEM, "no terminal for a debug console", LOG_ERRNO(number));
    }
    bool able = slave >= 0 && start_shell(&session->shell, slave);
    if (slave >= 0)
        close(slave);
    if (!able && master >= 0)
        close(master);
    if (!able)
        return false;
    session->used = session->running = session->connected = true;
    session->stream = (struct watch){.fd = stream, .ready = stream_ready};
    session->master = (struct watch){.fd = master, .ready = master_ready};
    session->shell.ended = shell_ended;
    return true;
}

void debug_console_accepted(int stream)
{
    struct session *session = free_session();
    if (session == NULL || !open_session(session, stream)) {
        close(stream);
        return;
    }
    loop_watch(&session->master, EPOLLIN | EPOLLOUT | EPOLLET);
    again(session);
}

/* --- on the guest's console --- */

static void console_ended(struct child *child, int status);
static void open_console(struct watch *watch, uint32_t events);

static struct child on_console = {.ended = console_ended};
static struct watch pause_over = {.fd = -1, .ready = open_console};

static void console_ended(struct child *child, int status)
{
    const struct itimerspec pause = {.it_value = {.tv_sec = PAUSE_SECONDS}};
    (void)child;
    (void)status;
    timerfd_settime(pause_over.fd, 0, &pause, NULL);
}

static void open_console(struct watch *watch, uint32_t events)
{
    uint64_t times;
    (void)events;
    if (read(watch->fd, &times, sizeof times) < 0 && errno != EAGAIN)
        return;
    int terminal = open(CONSOLE, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (terminal < 0) {
        int number = errno;
        LOG(LOG_WARN, SUBSYSTEM, "there is no console to debug on", LOG_ERRNO(number));
        return;
    }
    start_shell(&on_console, terminal);
    close(terminal);
}

void debug_console_local(void)
{
    pause_over.fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (pause_over.fd >= 0 && loop_watch(&pause_over, EPOLLIN))
        open_console(&pause_over, 0);
}
