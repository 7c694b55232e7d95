#define _GNU_SOURCE
#include "spawn.h"

#include "spawned.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    HELPER_MS = 5000, /* a busy emulator takes its time for what takes a millisecond */
    MOST_FILES = 16384, /* a thousand containers and a thousand processes have up to five descriptors each */
    PIPE_SIZE = 256 * 1024, /* of output: it is fetched in pieces as large, and each costs a call */
};

static void close_pair(int pair[2])
{
    for (int i = 0; i < 2; i++)
        if (pair[i] >= 0)
            close(pair[i]);
}

struct pipes {
    int in[2];
    int out[2];
    int err[2];
    int channel[2];
};

static const struct pipes no_pipes = {{-1, -1}, {-1, -1}, {-1, -1}, {-1, -1}};

static void close_pipes(struct pipes *pipes)
{
    close_pair(pipes->in);
    close_pair(pipes->out);
    close_pair(pipes->err);
    close_pair(pipes->channel);
}

static bool open_pipe(int pair[2], int ours)
{
    if (pipe2(pair, O_CLOEXEC) != 0)
        return false;
    fcntl(pair[ours], F_SETPIPE_SZ, PIPE_SIZE); /* if not, it works in smaller pieces */
    return fcntl(pair[ours], F_SETFL, O_NONBLOCK) == 0;
}

static bool open_pipes(struct pipes *pipes, bool terminal)
{
    *pipes = no_pipes;
    bool opened = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pipes->channel) == 0;
    if (opened && !terminal)
        opened = open_pipe(pipes->in, 1) && open_pipe(pipes->out, 0) && open_pipe(pipes->err, 0);
    if (!opened) {
        int number = errno;
        close_pipes(pipes);
        errno = number;
    }
    return opened;
}

/* As fork, which neither musl nor glibc lets have namespaces of its own. */
static pid_t split(int namespaces)
{
    return (pid_t)syscall(SYS_clone, (long)(namespaces | SIGCHLD), 0L, 0L, 0L, 0L);
}

/* A child that is in a container's namespaces and still this program must not be opened or traced from in there
 * (CVE-2019-5736); execve ends that. What the file of PID 1's program cannot be is written to: it is running. */
static pid_t split_hidden(int namespaces)
{
    int before = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    pid_t pid = split(namespaces);
    int number = errno;
    if (pid != 0 && before == 1)
        prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    errno = number;
    return pid;
}

/* The number of the process that a helper made; -1 and the failure, which the helper told by the channel. It waits for
 * nothing but the kernel, and not in the container's cgroup. */
static pid_t hear_number(int numbers, pid_t helper, int channel, struct failure *failure)
{
    struct pollfd heard = {.fd = numbers, .events = POLLIN};
    pid_t pid = -1;
    int unused;
    while (poll(&heard, 1, HELPER_MS) < 0 && errno == EINTR)
        ;
    if ((heard.revents & POLLIN) != 0 && read(numbers, &pid, sizeof pid) != sizeof pid)
        pid = -1;
    if (pid < 0 && spawn_hear(channel, &unused, failure) != SPAWN_FAILED)
        failure_set(failure, TTRPC_INTERNAL, "a process that joins the container did not come about");
    if (pid < 0)
        kill(helper, SIGKILL); /* the loop collects it */
    return pid;
}

/* A process for a container that runs. Who may trace there can look into it from its first moment on: so it is born
 * inside, of a helper that has gone there before, and has no descriptor of the guest's. */
static pid_t split_inside(const struct plan *plan, struct spawned_files *files, int channel, struct failure *failure)
{
    int numbers[2];
    pid_t pid = -1;
    if (pipe2(numbers, O_CLOEXEC) != 0)
        return failure_errno(failure, "cannot make pipes for a process"), -1;
    files->numbers = numbers[1];
    pid_t helper = split_hidden(0);
    if (helper == 0)
        spawned_join(plan, files);
    if (helper < 0)
        failure_errno(failure, "cannot start a process");
    close(numbers[1]);
    if (helper > 0)
        pid = hear_number(numbers[0], helper, channel, failure);
    close(numbers[0]);
    return pid;
}

/* Whose PID namespace it is goes by this process's setting at that moment: with one thread nobody comes between. */
static pid_t split_into(int pids)
{
    int own = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
    if (own < 0)
        return -1;
    pid_t pid = setns(pids, CLONE_NEWPID) == 0 ? split_hidden(0) : -1;
    int number = errno;
    if (pid != 0 && setns(own, CLONE_NEWPID) != 0)
        number = errno;
    close(own);
    errno = number;
    return pid;
}

/* What the agent may open is no business of its containers: they get what was before. */
static struct rlimit allow_files(void)
{
    static struct rlimit before;
    if (before.rlim_max == 0 && getrlimit(RLIMIT_NOFILE, &before) == 0 && before.rlim_cur < MOST_FILES) {
        struct rlimit more = {.rlim_cur = MOST_FILES, .rlim_max = before.rlim_max};
        if (more.rlim_max < MOST_FILES)
            more.rlim_max = MOST_FILES;
        setrlimit(RLIMIT_NOFILE, &more); /* if not, fewer containers find room */
    }
    return before;
}

static pid_t split_first(const struct plan *plan, const struct spawned_files *files, struct failure *failure)
{
    pid_t pid = plan->pids < 0 ? split_hidden(CLONE_NEWPID) : split_into(plan->pids);
    if (pid == 0)
        spawned_main(plan, files);
    if (pid < 0)
        failure_errno(failure, SPAWN_NO_SPLIT(errno));
    return pid;
}

bool spawn(const struct plan *plan, struct spawned *spawned, struct failure *failure)
{
    struct pipes pipes;
    struct rlimit limit = allow_files();
    if (!open_pipes(&pipes, plan->process->terminal))
        return failure_errno(failure, "cannot make pipes for a process");
    struct spawned_files files = {pipes.in[0], pipes.out[1], pipes.err[1], pipes.channel[1], -1, limit};
    pid_t pid = plan->spec != NULL ? split_first(plan, &files, failure)
                                   : split_inside(plan, &files, pipes.channel[0], failure);
    if (pid < 0) {
        close_pipes(&pipes);
        return false;
    }
    *spawned = (struct spawned){pid, pipes.channel[0], pipes.in[1], pipes.out[0], pipes.err[0]};
    pipes.channel[0] = pipes.in[1] = pipes.out[0] = pipes.err[0] = -1;
    close_pipes(&pipes);
    return true;
}

static int received_descriptor(struct msghdr *message)
{
    int fd = -1;
    const struct cmsghdr *part = CMSG_FIRSTHDR(message);
    if (part != NULL && part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(part), sizeof fd);
    return fd;
}

enum spawn_event spawn_hear(int channel, int *terminal, struct failure *failure)
{
    struct spawned_report report;
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec piece = {&report, sizeof report};
    struct msghdr message = {
        .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t size;
    do
        size = recvmsg(channel, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (size < 0 && errno == EINTR);
    if (size < 0 && errno == EAGAIN)
        return SPAWN_NOTHING;
    if (size != sizeof report)
        return SPAWN_CLOSED;
    *terminal = received_descriptor(&message);
    *failure = report.failure;
    return report.ready ? SPAWN_READY : SPAWN_FAILED;
}

bool spawn_go(int channel)
{
    return send(channel, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT) == 1;
}
