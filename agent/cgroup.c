#define _GNU_SOURCE
#include "cgroup.h"

#include "cgroup_file.h"
#include "cgroup_path.h"
#include "log.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define SUBSYSTEM "cgroup"
#define ROOT "/sys/fs/cgroup"
#define OWN_LEAF "osbuilder-agent"

enum {
    PROCS_SIZE = 16 * 1024,
    /* What a container may make below its cgroup, so that removing it ends soon. */
    STEPS_OF_REMOVAL = 100 * 1000,
};
#define MOST_DESCENDANTS "4096"
#define DEEPEST "64"

static int open_directory(int parent, const char *name)
{
    return openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
}

static void warn(const char *message, const char *what)
{
    int number = errno;
    LOG(LOG_WARN, SUBSYSTEM, message, LOG_STRING("what", what), LOG_ERRNO(number));
}

/* --- where all of them lie --- */

/* PIDs of others' namespaces read as 0 and cannot be moved by us. */
static void move_processes(int from, int to)
{
    char *procs = malloc(PROCS_SIZE);
    if (procs == NULL)
        return;
    cgroup_read(from, "cgroup.procs", procs, PROCS_SIZE);
    char *rest = procs;
    for (char *pid = strsep(&rest, "\n"); pid != NULL; pid = strsep(&rest, "\n"))
        if (pid[0] != '\0' && strcmp(pid, "0") != 0 && !cgroup_write(to, "cgroup.procs", pid) && errno != ESRCH)
            warn("cannot move a process out of the way of the containers' cgroups", pid);
    free(procs);
}

/* A cgroup other than the root that has processes cannot give controllers to those below it. As PID 1 the agent is in
 * the root; under systemd, or in tests, it must make room. */
static void make_room(int home)
{
    if (faccessat(home, "cgroup.type", F_OK, 0) != 0)
        return;
    if (mkdirat(home, OWN_LEAF, 0755) != 0 && errno != EEXIST) {
        warn("cannot make the agent's own cgroup", OWN_LEAF);
        return;
    }
    int leaf = open_directory(home, OWN_LEAF);
    if (leaf < 0)
        return;
    move_processes(home, leaf);
    close(leaf);
}

/* The line of version 2 in /proc/self/cgroup: "0::/path". */
static void find_own(char *path, size_t size)
{
    char text[4096];
    path[0] = '\0';
    cgroup_read(AT_FDCWD, "/proc/self/cgroup", text, sizeof text);
    char *rest = text;
    for (char *line = strsep(&rest, "\n"); line != NULL; line = strsep(&rest, "\n"))
        if (strncmp(line, "0::/", 4) == 0 && strstr(line, "/..") == NULL && strlen(line + 3) < size)
            snprintf(path, size, "%s", strcmp(line + 3, "/") == 0 ? "" : line + 3);
}

/* The cgroup that the agent was started in, below which nobody else has a say; NULL: there is no version 2. */
static const char *find_home(void)
{
    static char home[384] = "";
    static bool known;
    struct statfs statistics;
    char own[256];
    if (known)
        return home;
    if (statfs(ROOT, &statistics) != 0 || statistics.f_type != CGROUP2_SUPER_MAGIC)
        return NULL;
    find_own(own, sizeof own);
    snprintf(home, sizeof home, ROOT "%s", own);
    int directory = open_directory(AT_FDCWD, home);
    if (directory < 0) {
        snprintf(home, sizeof home, ROOT);
    } else {
        make_room(directory);
        close(directory);
    }
    known = true;
    return home;
}

int cgroup_open_home(void)
{
    const char *home = find_home();
    if (home != NULL)
        return open_directory(AT_FDCWD, home);
    errno = ENOENT;
    return -1;
}

/* --- making one --- */

/* Each by itself: one that cannot be had must not cost the others. */
static void enable_controllers(int directory)
{
    static const char *const wanted[] = {"cpuset", "cpu", "io", "memory", "hugetlb", "pids"};
    char there[512];
    char text[32];
    char *rest = there;
    cgroup_read(directory, "cgroup.controllers", there, sizeof there);
    for (char *name = strsep(&rest, " \n"); name != NULL; name = strsep(&rest, " \n"))
        for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++)
            if (strcmp(name, wanted[i]) == 0) {
                snprintf(text, sizeof text, "+%s", name);
                if (!cgroup_write(directory, "cgroup.subtree_control", text))
                    warn("cannot pass on a controller", name);
            }
}

static bool is_populated(int directory)
{
    char text[256];
    return cgroup_read(directory, "cgroup.events", text, sizeof text) && cgroup_number(text, "populated") != 0;
}

static void remove_below(int directory);

/* What somebody left there would bring old limits with it. */
static bool make_afresh(int parent, const char *name)
{
    if (mkdirat(parent, name, 0755) == 0)
        return true;
    int old = errno == EEXIST ? open_directory(parent, name) : -1;
    if (old < 0)
        return false;
    if (!is_populated(old))
        remove_below(old);
    close(old);
    return unlinkat(parent, name, AT_REMOVEDIR) == 0 && mkdirat(parent, name, 0755) == 0;
}

/* Make and open what `name` says in `parent`, which is closed. -1 and errno. */
static int step_down(int parent, const char *name, bool last)
{
    enable_controllers(parent);
    bool made = last ? make_afresh(parent, name) : mkdirat(parent, name, 0755) == 0 || errno == EEXIST;
    int child = made ? open_directory(parent, name) : -1;
    int number = errno;
    close(parent);
    errno = number;
    return child;
}

static int make_path(const char *home, const char *relative)
{
    char names[sizeof ((struct cgroup *)NULL)->path];
    int directory = open_directory(AT_FDCWD, home);
    char *rest = names;
    snprintf(names, sizeof names, "%s", relative);
    for (char *name = strsep(&rest, "/"); name != NULL && directory >= 0; name = strsep(&rest, "/"))
        directory = step_down(directory, name, rest == NULL);
    return directory;
}

/* From the last component upwards, as far as they are empty. */
static void remove_path(char *path)
{
    const char *home = find_home();
    while (home != NULL && strlen(path) > strlen(home) && (rmdir(path) == 0 || errno == ENOENT))
        *strrchr(path, '/') = '\0';
}

bool cgroup_create(struct cgroup *cgroup, const char *path, struct failure *failure)
{
    *cgroup = (struct cgroup){.directory = -1, .devices = -1};
    const char *home = find_home();
    if (home == NULL)
        return failure_set(failure, TTRPC_FAILED_PRECONDITION, "the guest has no cgroup version 2 at " ROOT);
    snprintf(cgroup->path, sizeof cgroup->path, "%s/", home);
    char *relative = cgroup->path + strlen(cgroup->path);
    if (!cgroup_path(path, relative, sizeof cgroup->path - strlen(cgroup->path), failure))
        return false;
    if (strcspn(relative, "/") == strlen(OWN_LEAF) && strncmp(relative, OWN_LEAF, strlen(OWN_LEAF)) == 0)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the cgroup " OWN_LEAF " is the agent's own");
    cgroup->directory = make_path(home, relative);
    if (cgroup->directory < 0) {
        int number = errno;
        if (number != EBUSY) /* it is somebody's */
            remove_path(cgroup->path);
        errno = number;
        if (number == EBUSY)
            return failure_set(failure, TTRPC_ALREADY_EXISTS, "the cgroup %.200s is in use", path);
        return failure_errno(failure, "cannot make the cgroup %.200s", path);
    }
    cgroup_write(cgroup->directory, "cgroup.max.descendants", MOST_DESCENDANTS);
    cgroup_write(cgroup->directory, "cgroup.max.depth", DEEPEST);
    return true;
}

/* --- all that is in it --- */

bool cgroup_freeze(const struct cgroup *cgroup, bool frozen, struct failure *failure)
{
    if (cgroup_write(cgroup->directory, "cgroup.freeze", frozen ? "1" : "0"))
        return true;
    return failure_errno(failure, "cannot %s the cgroup", frozen ? "freeze" : "thaw");
}

bool cgroup_is_frozen(const struct cgroup *cgroup)
{
    char text[256];
    return cgroup_read(cgroup->directory, "cgroup.events", text, sizeof text) && cgroup_number(text, "frozen") != 0;
}

bool cgroup_kill(const struct cgroup *cgroup)
{
    return cgroup_write(cgroup->directory, "cgroup.kill", "1");
}

void cgroup_signal(const struct cgroup *cgroup, int number, pid_t first, int first_number)
{
    enum { MOST = 1 << 16 }; /* who forks while we read does not keep us here */
    int file = openat(cgroup->directory, "cgroup.procs", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    FILE *list = file < 0 ? NULL : fdopen(file, "r");
    long pid;
    for (int i = 0; list != NULL && i < MOST && fscanf(list, "%ld", &pid) == 1; i++)
        if (pid > 1) /* 0: of a namespace that is not ours to see */
            kill((pid_t)pid, (pid_t)pid == first ? first_number : number);
    if (list != NULL)
        fclose(list);
    else if (file >= 0)
        close(file);
}

bool cgroup_is_empty(const struct cgroup *cgroup)
{
    return cgroup->directory < 0 || !is_populated(cgroup->directory);
}

unsigned long cgroup_oom_kills(const struct cgroup *cgroup)
{
    char text[512];
    cgroup_read(cgroup->directory, "memory.events", text, sizeof text);
    return (unsigned long)cgroup_number(text, "oom_kill");
}

/* --- removing --- */

/* The first directory in `directory`, which stays open; false: there is none. */
static bool first_child(int directory, char *name, size_t size)
{
    int copy = open_directory(directory, ".");
    DIR *stream = copy < 0 ? NULL : fdopendir(copy);
    bool found = false;
    if (stream == NULL) {
        if (copy >= 0)
            close(copy);
        return false;
    }
    for (struct dirent *entry = readdir(stream); entry != NULL && !found; entry = readdir(stream)) {
        if (entry->d_type != DT_DIR || strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        snprintf(name, size, "%s", entry->d_name);
        found = true;
    }
    closedir(stream);
    return found;
}

/* Without a stack: how deep it goes was the container's choice. */
static void remove_below(int directory)
{
    char name[256];
    int depth = 0;
    bool risen = false; /* just back from a child that has nothing below it */
    int at = open_directory(directory, ".");
    for (int step = 0; at >= 0 && step < STEPS_OF_REMOVAL; step++) {
        int next = -1;
        if (first_child(at, name, sizeof name)) {
            if (unlinkat(at, name, AT_REMOVEDIR) == 0) {
                risen = false;
                continue;
            }
            if (!risen) /* else it is in use */
                next = open_directory(at, name);
            depth++;
            risen = false;
        } else if (depth > 0) {
            next = open_directory(at, "..");
            depth--;
            risen = true;
        }
        close(at);
        at = next;
    }
    if (at >= 0)
        close(at);
}

void cgroup_remove(struct cgroup *cgroup)
{
    if (cgroup->devices >= 0)
        close(cgroup->devices);
    if (cgroup->directory >= 0) {
        remove_below(cgroup->directory);
        close(cgroup->directory);
        remove_path(cgroup->path);
    }
    *cgroup = (struct cgroup){.directory = -1, .devices = -1};
}
