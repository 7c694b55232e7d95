#define _GNU_SOURCE
#include "shared.h"

#include "tree.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#define DIRECTORY "/var/run/sandbox-ns"

static const struct {
    const char *kind;
    const char *source;
    const char *path;
} kept[] = {
    {"ipc", "/proc/self/ns/ipc", DIRECTORY "/ipc"},
    {"uts", "/proc/self/ns/uts", DIRECTORY "/uts"},
};

enum { KEPT = sizeof kept / sizeof kept[0] };

static bool made;

const char *shared_path(const char *kind)
{
    for (size_t i = 0; made && i < KEPT; i++)
        if (strcmp(kept[i].kind, kind) == 0)
            return kept[i].path;
    return NULL;
}

void shared_remove(void)
{
    made = false;
    tree_unmount(DIRECTORY);
    for (size_t i = 0; i < KEPT; i++)
        unlink(kept[i].path);
    rmdir(DIRECTORY);
}

static bool make_files(void)
{
    if (!tree_make(DIRECTORY, 0755))
        return false;
    for (size_t i = 0; i < KEPT; i++) {
        int file = open(kept[i].path, O_RDONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0444);
        if (file < 0)
            return false;
        close(file);
    }
    return true;
}

/* In a process of its own, which the namespaces outlive. */
static bool enter_and_keep(const char *hostname)
{
    if (unshare(CLONE_NEWIPC | CLONE_NEWUTS) != 0)
        return false;
    if (hostname[0] != '\0' && sethostname(hostname, strlen(hostname)) != 0)
        return false;
    for (size_t i = 0; i < KEPT; i++)
        if (mount(kept[i].source, kept[i].path, NULL, MS_BIND, NULL) != 0)
            return false;
    return true;
}

/* An errno, 0 when all went well; no error number is above 255. */
static int keep_in_child(const char *hostname)
{
    int status;
    pid_t pid = fork();
    if (pid == 0)
        _exit(enter_and_keep(hostname) ? 0 : errno);
    if (pid < 0)
        return errno;
    /* Before the loop turns, and collects whoever has ended. */
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return errno;
    return WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
}

bool shared_make(const char *hostname, struct failure *failure)
{
    shared_remove();
    if (!make_files())
        return failure_errno(failure, "cannot make files for namespaces in " DIRECTORY);
    int problem = keep_in_child(hostname);
    made = problem == 0;
    if (made)
        return true;
    shared_remove();
    errno = problem;
    return failure_errno(failure, "cannot make the sandbox's namespaces");
}
