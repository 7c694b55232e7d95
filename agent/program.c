#define _GNU_SOURCE
#include "program.h"

#include "child.h"
#include "clock.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    LAST_WORDS = 160, /* bytes: they have to fit into a failure beside the program's name */
    NOT_STARTED = 127, /* what a process that could not become the program ends with */
};

struct last_words {
    char text[LAST_WORDS];
    size_t size;
};

struct running {
    pid_t pid;
    int ended; /* a pidfd: readable when the program has ended */
    int input; /* -1: closed */
    int words;
    int start; /* an errno comes here when the program could not be started, else nothing */
    const char *left; /* of the input */
    struct last_words last_words;
};

struct pipes {
    int input[2];
    int words[2];
    int start[2];
};

static void close_if_open(int *file)
{
    if (*file >= 0)
        close(*file);
    *file = -1;
}

static void close_pipes(struct pipes *pipes)
{
    for (int end = 0; end < 2; end++) {
        close_if_open(&pipes->input[end]);
        close_if_open(&pipes->words[end]);
        close_if_open(&pipes->start[end]);
    }
}

static bool open_pipes(struct pipes *pipes)
{
    *pipes = (struct pipes){{-1, -1}, {-1, -1}, {-1, -1}};
    if (pipe2(pipes->input, O_CLOEXEC) == 0 && pipe2(pipes->words, O_CLOEXEC) == 0 &&
        pipe2(pipes->start, O_CLOEXEC) == 0 && fcntl(pipes->input[1], F_SETFL, O_NONBLOCK) == 0 &&
        fcntl(pipes->words[0], F_SETFL, O_NONBLOCK) == 0)
        return true;
    int number = errno;
    close_pipes(pipes);
    errno = number;
    return false;
}

/* In the new process; does not return. A session of its own: it can be killed with what it starts, and has no terminal. */
static _Noreturn void become(const struct program *program, const struct pipes *pipes)
{
    setsid();
    child_reset_signals();
    int nothing = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (dup2(pipes->input[0], STDIN_FILENO) >= 0 && dup2(nothing, STDOUT_FILENO) >= 0 &&
        dup2(pipes->words[1], STDERR_FILENO) >= 0)
        execve(program->path, (char *const *)program->argv,
               program->env != NULL ? (char *const *)program->env : environ);
    int number = errno;
    if (write(pipes->start[1], &number, sizeof number) < 0)
        _exit(NOT_STARTED + 1);
    _exit(NOT_STARTED);
}

static bool start(const struct program *program, struct running *running)
{
    struct pipes pipes;
    if (!open_pipes(&pipes))
        return false;
    pid_t pid = fork();
    if (pid == 0)
        become(program, &pipes);
    int number = errno;
    if (pid > 0) {
        *running = (struct running){.pid = pid,
                                    .ended = (int)syscall(SYS_pidfd_open, pid, 0),
                                    .input = pipes.input[1],
                                    .words = pipes.words[0],
                                    .start = pipes.start[0],
                                    .left = program->input != NULL ? program->input : ""};
        pipes.input[1] = pipes.words[0] = pipes.start[0] = -1;
    }
    close_pipes(&pipes);
    errno = number;
    return pid > 0;
}

static void add_words(struct last_words *last, const char *text, size_t size)
{
    if (size > LAST_WORDS) {
        text += size - LAST_WORDS;
        size = LAST_WORDS;
    }
    size_t kept = last->size + size > LAST_WORDS ? LAST_WORDS - size : last->size;
    memmove(last->text, last->text + last->size - kept, kept);
    memcpy(last->text + kept, text, size);
    last->size = kept + size;
}

static void read_words(struct running *running)
{
    enum { TURNS = 64 }; /* who writes without end is not listened to without end: the clock has to be looked at */
    char piece[1024];
    for (int turn = 0; turn < TURNS; turn++) {
        ssize_t got = read(running->words, piece, sizeof piece);
        if (got > 0) {
            add_words(&running->last_words, piece, (size_t)got);
        } else if (got < 0 && errno == EINTR) {
            continue;
        } else {
            if (got == 0 || errno != EAGAIN)
                close_if_open(&running->words);
            return;
        }
    }
}

static void write_input(struct running *running)
{
    while (*running->left != '\0') {
        ssize_t wrote = write(running->input, running->left, strlen(running->left));
        if (wrote > 0)
            running->left += wrote;
        else if (errno == EAGAIN)
            return;
        else if (errno != EINTR)
            break; /* it does not want to read that much */
    }
    close_if_open(&running->input);
}

/* The session that a process is in; 0: it is gone. The name before it may hold blanks and parentheses. */
static pid_t session_of(const char *process)
{
    char path[64];
    char text[512];
    snprintf(path, sizeof path, "/proc/%.20s/stat", process);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    text[size > 0 ? size : 0] = '\0';
    const char *name_end = strrchr(text, ')');
    int session = 0;
    if (name_end == NULL || sscanf(name_end + 1, " %*c %*d %*d %d", &session) != 1)
        return 0;
    return session;
}

/* The program has not been waited for, so its number is still the session's. Twice, for who was just being started. */
static void kill_session(pid_t session)
{
    kill(-session, SIGKILL);
    for (int round = 0; round < 2; round++) {
        DIR *processes = opendir("/proc");
        if (processes == NULL)
            return;
        for (const struct dirent *entry; (entry = readdir(processes)) != NULL;)
            if (isdigit((unsigned char)entry->d_name[0]) && session_of(entry->d_name) == session)
                kill((pid_t)strtol(entry->d_name, NULL, 10), SIGKILL);
        closedir(processes);
    }
}

/* True: it ended by itself. Without a pidfd (a kernel before 5.3) the clock has to do. */
static bool attend(struct running *running, int64_t deadline)
{
    enum { GLANCE_MS = 20 };
    for (;;) {
        int64_t left = deadline - clock_ms();
        if (left <= 0)
            return false;
        int wait = running->ended < 0 && left > GLANCE_MS ? GLANCE_MS : (int)left;
        struct pollfd files[] = {{.fd = running->ended, .events = POLLIN},
                                 {.fd = running->words, .events = POLLIN},
                                 {.fd = running->input, .events = POLLOUT}};
        if (poll(files, 3, wait) < 0 && errno != EINTR)
            return false;
        if (files[1].revents != 0)
            read_words(running);
        if (files[2].revents != 0)
            write_input(running);
        siginfo_t info = {0};
        if (waitid(P_PID, (id_t)running->pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid != 0)
            return true;
    }
}

/* One line of what may be many. */
static const char *spell_words(struct last_words *last, char *text, size_t size)
{
    while (last->size > 0 && isspace((unsigned char)last->text[last->size - 1]))
        last->size--;
    for (size_t i = 0; i < last->size; i++)
        if ((unsigned char)last->text[i] < ' ')
            last->text[i] = ' ';
    snprintf(text, size, "%s%.*s", last->size > 0 ? ": " : "", (int)last->size, last->text);
    return text;
}

static bool judge(const struct program *program, struct running *running, int status, struct failure *failure)
{
    int number;
    char words[LAST_WORDS + 3];
    if (read(running->start, &number, sizeof number) == sizeof number) {
        errno = number;
        return failure_errno(failure, "cannot run %.100s", program->path);
    }
    spell_words(&running->last_words, words, sizeof words);
    if (WIFSIGNALED(status))
        return failure_set(failure, TTRPC_INTERNAL, "%.100s was ended by signal %d%s", program->path,
                           WTERMSIG(status), words);
    if (WEXITSTATUS(status) != 0)
        return failure_set(failure, TTRPC_INTERNAL, "%.100s exited with %d%s", program->path, WEXITSTATUS(status),
                           words);
    return true;
}

/* Before the loop turns, and collects whoever has ended. It may be killed and not end, in a driver that hangs: then the
 * loop has it later. */
static int collect(const struct running *running)
{
    enum { PATIENCE_MS = 1000 };
    int status = 0;
    struct pollfd ended = {.fd = running->ended, .events = POLLIN};
    poll(&ended, 1, PATIENCE_MS);
    while (waitpid(running->pid, &status, WNOHANG) < 0 && errno == EINTR)
        ;
    return status;
}

bool program_run(const struct program *program, struct failure *failure)
{
    struct running running;
    int seconds = program->seconds > 0 && program->seconds < PROGRAM_LONGEST ? program->seconds : PROGRAM_LONGEST;
    if (!start(program, &running))
        return failure_errno(failure, "cannot run %.100s", program->path);
    bool in_time = attend(&running, clock_ms() + seconds * 1000);
    if (in_time && running.words >= 0)
        read_words(&running);
    if (!in_time)
        kill_session(running.pid);
    int status = collect(&running);
    bool good = in_time ? judge(program, &running, status, failure)
                        : failure_set(failure, TTRPC_DEADLINE_EXCEEDED, "%.100s took longer than %d s and was killed",
                                      program->path, seconds);
    close_if_open(&running.ended);
    close_if_open(&running.input);
    close_if_open(&running.words);
    close_if_open(&running.start);
    return good;
}
