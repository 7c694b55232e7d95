/* From here to execve the program is still the agent's, but more and more of what surrounds it is the container's:
 * only descriptors that were looked at are used, and nothing is logged. */
#define _GNU_SOURCE
#include "spawned.h"

#include "child.h"
#include "identity.h"
#include "inside.h"
#include "kernel_settings.h"
#include "log.h"
#include "rootfs.h"
#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEFAULT_PATH "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

enum {
    CLOSE_ON_EXEC = 4, /* CLOSE_RANGE_CLOEXEC */
    FAILED_STATUS = 127, /* as a shell's for a command that is not there */
    KEPT = SPAWN_JOINS + 5,
};

/* --- reports --- */

static bool send_report(int channel, const struct spawned_report *report, int terminal)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct spawned_report copy = *report;
    struct iovec piece = {&copy, sizeof copy};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    if (terminal >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *part = CMSG_FIRSTHDR(&message);
        part->cmsg_level = SOL_SOCKET;
        part->cmsg_type = SCM_RIGHTS;
        part->cmsg_len = CMSG_LEN(sizeof terminal);
        memcpy(CMSG_DATA(part), &terminal, sizeof terminal);
    }
    return sendmsg(channel, &message, MSG_NOSIGNAL) == sizeof copy;
}

static _Noreturn void fail(int channel, const struct failure *failure)
{
    send_report(channel, &(struct spawned_report){.failure = *failure}, -1);
    _exit(FAILED_STATUS);
}

static void wait_for_go(int channel)
{
    char byte;
    ssize_t got;
    do
        got = recv(channel, &byte, 1, 0);
    while (got < 0 && errno == EINTR);
    if (got != 1)
        _exit(FAILED_STATUS); /* the agent has gone, or nobody wants this container any more */
}

/* --- descriptors --- */

static int compare(const void *one, const void *other)
{
    return *(const int *)one - *(const int *)other;
}

/* All but these: a container that was made and not started must not keep the agent's connections open. */
static void close_others(int kept[], size_t count)
{
    unsigned int from = STDERR_FILENO + 1;
    qsort(kept, count, sizeof kept[0], compare);
    for (size_t i = 0; i < count; i++) {
        if (kept[i] < (int)from)
            continue;
        if (kept[i] > (int)from)
            syscall(SYS_close_range, from, (unsigned int)kept[i] - 1, 0);
        from = (unsigned int)kept[i] + 1;
    }
    syscall(SYS_close_range, from, ~0U, 0);
}

static bool take_files(const struct plan *plan, const struct spawned_files *files)
{
    int kept[KEPT] = {files->channel, plan->cgroup->directory, plan->leader, plan->pids, files->numbers};
    size_t count = 5;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    const int wanted[] = {files->in, files->out, files->err};
    if (null < 0)
        return false;
    for (int i = STDIN_FILENO; i <= STDERR_FILENO; i++)
        if (dup2(wanted[i] < 0 ? null : wanted[i], i) < 0)
            return false;
    for (size_t i = 0; i < plan->join_count; i++)
        kept[count++] = plan->joins[i];
    close_others(kept, count);
    return true;
}

/* --- the way into the container --- */

static int open_cgroup(const struct cgroup *cgroup, struct failure *failure)
{
    int file = openat(cgroup->directory, "cgroup.procs", O_WRONLY | O_CLOEXEC);
    if (file < 0)
        failure_errno(failure, "cannot open the container's cgroup");
    return file;
}

static bool enter_cgroup(int file, struct failure *failure)
{
    bool entered = write(file, "0", 1) == 1 || failure_errno(failure, "cannot enter the container's cgroup");
    close(file);
    return entered;
}

static bool enter_namespaces(const struct plan *plan, struct failure *failure)
{
    for (size_t i = 0; i < plan->join_count; i++)
        if (setns(plan->joins[i], 0) != 0)
            return failure_errno(failure, "cannot join a namespace");
    if (unshare(plan->fresh | CLONE_NEWNS | CLONE_NEWCGROUP) != 0)
        return failure_errno(failure, "cannot make namespaces");
    const char *name = plan->spec->hostname;
    if ((plan->fresh & CLONE_NEWUTS) != 0 && name[0] != '\0' && sethostname(name, strlen(name)) != 0)
        return failure_errno(failure, "cannot set the hostname %.100s", name);
    return true;
}

static bool run_hooks(const struct plan *plan, const struct oci_hook *hooks, size_t count, const char *status,
                      struct failure *failure)
{
    struct container_hooks_state state = plan->state;
    state.status = status;
    state.pid = getpid();
    signal(SIGPIPE, SIG_IGN); /* a hook need not read its state */
    bool done = container_hooks_run(hooks, count, &state, failure);
    signal(SIGPIPE, SIG_DFL);
    return done;
}

static bool open_root(int *root, struct failure *failure)
{
    *root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    return *root >= 0 || failure_errno(failure, "cannot open the container's root");
}

static bool become_first(const struct plan *plan, int *root, struct failure *failure)
{
    const struct oci_hooks *hooks = plan->spec->hooks;
    int cgroup = open_cgroup(plan->cgroup, failure);
    if (cgroup < 0 || !enter_cgroup(cgroup, failure) || !enter_namespaces(plan, failure))
        return false;
    int mount = rootfs_build(plan->spec, plan->devices, plan->device_count, failure);
    if (mount < 0)
        return false;
    /* As runc does; where it cannot be, the step into it says so. */
    int cwd = inside_make_directory(mount, plan->process->cwd);
    if (cwd >= 0)
        close(cwd);
    if (hooks != NULL &&
        !run_hooks(plan, hooks->create_container.items, hooks->create_container.count, "creating", failure))
        return false;
    if (!rootfs_enter(mount, plan->spec, failure) || !open_root(root, failure))
        return false;
    close(mount);
    return settings_apply(&plan->spec->linux_->sysctl, plan->process->oom_score_adj, failure);
}

/* --- the program's surroundings --- */

static bool take_terminal(const struct plan *plan, int root, const struct identity *identity, int *master,
                          struct failure *failure)
{
    struct terminal terminal;
    if (!terminal_open(root, plan->process->console_size, &terminal, failure))
        return false;
    if (plan->spec != NULL && !terminal_be_console(root, terminal.slave, failure))
        return false;
    for (int i = STDIN_FILENO; i <= STDERR_FILENO; i++)
        dup2(terminal.slave, i);
    if (fchown(terminal.slave, identity->uid, (gid_t)-1) != 0 || fchmod(terminal.slave, 0620) != 0 ||
        !terminal_control(STDIN_FILENO))
        return failure_errno(failure, "cannot take the terminal");
    close(terminal.slave);
    *master = terminal.master;
    return true;
}

/* So that a program that is not root can open /dev/stdout. */
static void own_pipes(const struct identity *identity)
{
    struct stat state;
    for (int i = STDIN_FILENO; i <= STDERR_FILENO; i++)
        if (fstat(i, &state) == 0 && S_ISFIFO(state.st_mode) && fchown(i, identity->uid, identity->gid) != 0)
            return;
}

/* That "." has a name says that it is below this root and not, by a descriptor that leaked, somewhere else
 * (CVE-2024-21626). */
static bool change_directory(int root, const char *path)
{
    char name[PATH_MAX];
    int directory = inside_open(root, path, O_PATH | O_DIRECTORY);
    bool changed = directory >= 0 && fchdir(directory) == 0;
    int number = errno;
    if (directory >= 0)
        close(directory);
    errno = number;
    if (changed && (getcwd(name, sizeof name) == NULL || name[0] != '/')) {
        errno = ENOENT;
        return false;
    }
    return changed;
}

static bool become_user(const struct plan *plan, int root, const struct identity *identity, struct failure *failure)
{
    const struct oci_process *process = plan->process;
    if (!limits_apply(process))
        return failure_errno(failure, "cannot set the limits of the process");
    /* The user may not be allowed to search the way there, root may be not allowed on a network's filesystem. */
    bool changed = change_directory(root, process->cwd);
    if (!capabilities_limit(&plan->capabilities) || !identity_apply(identity))
        return failure_errno(failure, "cannot become user %ld", (long)identity->uid);
    if (!changed && !change_directory(root, process->cwd))
        return failure_errno(failure, "cannot change to the directory %.100s of the container", process->cwd);
    return true;
}

/* --- the program --- */

static const char *find_variable(const struct texts *env, const char *start)
{
    const char *found = NULL;
    for (size_t i = 0; i < env->count; i++)
        if (strncmp(env->items[i], start, strlen(start)) == 0)
            found = env->items[i];
    return found;
}

static bool is_program(const char *file)
{
    struct stat state;
    if (access(file, X_OK) != 0 || stat(file, &state) != 0)
        return false;
    errno = EACCES;
    return !S_ISDIR(state.st_mode);
}

static bool search(const char *name, const char *path, char *file, size_t size)
{
    int reason = ENOENT;
    for (const char *at = path;; at++) {
        int length = (int)strcspn(at, ":");
        if (snprintf(file, size, "%.*s%s%s", length, at, length == 0 ? "" : "/", name) < (int)size) {
            if (is_program(file))
                return true;
            if (errno != ENOENT && errno != ENOTDIR)
                reason = errno;
        }
        at += length;
        if (*at == '\0')
            break;
    }
    errno = reason;
    return false;
}

static bool find_program(const struct oci_process *process, char *file, size_t size)
{
    const char *name = process->args.items[0];
    const char *path = find_variable(&process->env, "PATH=");
    if (strchr(name, '/') == NULL) {
        if (!search(name, (path == NULL ? DEFAULT_PATH : path) + strlen("PATH="), file, size))
            return false;
    } else if (snprintf(file, size, "%s", name) >= (int)size) {
        errno = ENAMETOOLONG;
        return false;
    }
    /* A link of procfs such as /proc/self/exe is this program here, and not the container's. */
    errno = ELOOP;
    return !inside_is_magic(file);
}

static bool filter_calls(const struct seccomp_filter *filter, struct failure *failure)
{
    if (filter == NULL || filter->count == 0 || seccomp_install(filter))
        return true;
    return failure_errno(failure, "cannot install the seccomp filter");
}

/* The last steps: what the filter forbids from here on is not asked for, except by capset and prctl where the filter
 * must come before them, since there is no no_new_privs. */
static bool give_up_privileges(const struct plan *plan, struct failure *failure)
{
    bool last = plan->process->no_new_privileges;
    if (!last && !(capabilities_raise() && filter_calls(plan->filter, failure)))
        return failure->status != TTRPC_OK ? false : failure_errno(failure, "cannot install the seccomp filter");
    if (!capabilities_apply(&plan->capabilities))
        return failure_errno(failure, "cannot set the capabilities");
    if (!last)
        return true;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return failure_errno(failure, "cannot give up new privileges");
    return filter_calls(plan->filter, failure);
}

/* With the NULL. */
static const char **copy_words(const struct texts *words)
{
    const char **copy = calloc(words->count + 1, sizeof copy[0]);
    if (copy != NULL && words->count > 0)
        memcpy(copy, words->items, words->count * sizeof copy[0]);
    return copy;
}

/* Of a name's values the last, as runc and Kata's agent set them one by one; what has no value is no variable. HOME is
 * there in any case. */
static const char **make_environment(const struct texts *words, const char *home)
{
    const char **env = calloc(words->count + 2, sizeof env[0]);
    size_t count = 0;
    if (env == NULL)
        return NULL;
    for (size_t i = 0; i < words->count; i++) {
        const char *end = strchr(words->items[i], '=');
        size_t at = 0;
        if (end == NULL || end == words->items[i])
            continue;
        while (at < count && strncmp(env[at], words->items[i], (size_t)(end - words->items[i]) + 1) != 0)
            at++;
        env[at] = words->items[i];
        count += at == count;
    }
    if (find_variable(words, "HOME=") == NULL)
        env[count] = home;
    return env;
}

static bool run_program(const struct plan *plan, const struct identity *identity, struct failure *failure)
{
    const struct oci_process *process = plan->process;
    char file[PATH_MAX];
    char home[IDENTITY_HOME + 8];
    const char **argv = copy_words(&process->args);
    snprintf(home, sizeof home, "HOME=%s", identity->home);
    const char **env = make_environment(&process->env, home);
    if (argv == NULL || env == NULL)
        return failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "no memory to start a process");
    if (!find_program(process, file, sizeof file))
        return failure_errno(failure, "cannot execute %.100s", argv[0]);
    syscall(SYS_close_range, STDERR_FILENO + 1, ~0U, CLOSE_ON_EXEC);
    if (!give_up_privileges(plan, failure))
        return false;
    execve(file, (char *const *)argv, (char *const *)env);
    return failure_errno(failure, "cannot execute %.100s", argv[0]);
}

/* --- all of it --- */

static bool leave_agent(const struct plan *plan, const struct spawned_files *files, struct failure *failure)
{
    child_reset_signals();
    log_to(-1, false); /* by its number it may be anything from here on */
    umask(0022);
    setrlimit(RLIMIT_NOFILE, &files->limit);
    /* Keys of the guest and of other containers are not its own; a kernel may know no keys. */
    syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL);
    return take_files(plan, files) || failure_errno(failure, "cannot set up a process");
}

static bool prepare(const struct plan *plan, const struct spawned_files *files, int root, struct identity *identity,
                    struct failure *failure)
{
    int master = -1;
    if (!identity_resolve(root, plan->process->user, plan->user, identity, failure))
        return false;
    if (plan->process->terminal && !take_terminal(plan, root, identity, &master, failure))
        return false;
    own_pipes(identity);
    if (!send_report(files->channel, &(struct spawned_report){.ready = true}, master))
        _exit(FAILED_STATUS);
    if (master >= 0)
        close(master);
    return true;
}

static _Noreturn void become_program(const struct plan *plan, const struct spawned_files *files, int root,
                                     const struct identity *identity)
{
    struct failure failure = {0};
    if (become_user(plan, root, identity, &failure))
        run_program(plan, identity, &failure);
    fail(files->channel, &failure);
}

_Noreturn void spawned_main(const struct plan *plan, const struct spawned_files *files)
{
    struct failure failure = {0};
    struct identity identity;
    int root = -1;
    const struct oci_hooks *hooks = plan->spec->hooks;
    setsid();
    if (!leave_agent(plan, files, &failure) || !become_first(plan, &root, &failure) ||
        !prepare(plan, files, root, &identity, &failure))
        fail(files->channel, &failure);
    wait_for_go(files->channel);
    if (hooks != NULL &&
        !run_hooks(plan, hooks->start_container.items, hooks->start_container.count, "created", &failure))
        fail(files->channel, &failure);
    become_program(plan, files, root, &identity);
}

static _Noreturn void go_on_inside(const struct plan *plan, const struct spawned_files *files, int root, int cgroup)
{
    struct failure failure = {0};
    struct identity identity;
    close(files->numbers);
    setsid();
    if (!enter_cgroup(cgroup, &failure) || !settings_apply(NULL, plan->process->oom_score_adj, &failure) ||
        !prepare(plan, files, root, &identity, &failure))
        fail(files->channel, &failure);
    become_program(plan, files, root, &identity);
}

/* What leads out of the container is closed before anybody is born in its PID namespace. The cgroup is entered there
 * alone: it may be frozen, and the agent waits for this helper. */
static bool join(const struct plan *plan, int *root, int *cgroup, struct failure *failure)
{
    const int all = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET | CLONE_NEWCGROUP;
    *cgroup = open_cgroup(plan->cgroup, failure);
    if (*cgroup < 0)
        return false;
    if (setns(plan->leader, all) != 0 || setns(plan->pids, CLONE_NEWPID) != 0)
        return failure_errno(failure, "cannot join the container's namespaces");
    close(plan->cgroup->directory);
    close(plan->leader);
    close(plan->pids);
    return open_root(root, failure);
}

_Noreturn void spawned_join(const struct plan *plan, const struct spawned_files *files)
{
    struct failure failure = {0};
    int root = -1;
    int cgroup = -1;
    if (!leave_agent(plan, files, &failure) || !join(plan, &root, &cgroup, &failure))
        fail(files->channel, &failure);
    pid_t pid = (pid_t)syscall(SYS_clone, (long)(CLONE_PARENT | SIGCHLD), 0L, 0L, 0L, 0L); /* the agent's child */
    if (pid == 0)
        go_on_inside(plan, files, root, cgroup);
    if (pid < 0) {
        failure_errno(&failure, SPAWN_NO_SPLIT(errno));
        fail(files->channel, &failure);
    }
    _exit(write(files->numbers, &pid, sizeof pid) == sizeof pid ? 0 : FAILED_STATUS);
}
