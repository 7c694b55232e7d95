#define _GNU_SOURCE
#include "volume.h"

#include "hotplug.h"
#include "loop.h"
#include "place.h"
#include "ttrpc.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    ROOT = STDERR_FILENO + 1, /* of the volume, in the process that gives it */
    ON_ROOT_MISMATCH = 1, /* of types.FSGroupChangePolicy; 0 is Always */
    DEEPEST = 200, /* each level has a descriptor open */
    READ = 0440,
    READ_WRITE = 0660,
    ENTER = 0110,
};

struct group_rule {
    gid_t group;
    mode_t bits; /* that everything gets */
    dev_t device; /* mounts on top are not ours to give */
};

static bool is_read_only(const struct storage *storage)
{
    for (size_t i = 0; i < storage->options.count; i++)
        if (strcmp(storage->options.items[i], "ro") == 0)
            return true;
    return false;
}

static int give_entries(int directory, const struct group_rule *rule, int depth);

/* A change of owner takes set-id bits off, and they stay off. */
static int give_one(int thing, const struct group_rule *rule)
{
    struct stat status;
    if (fchownat(thing, "", (uid_t)-1, rule->group, AT_EMPTY_PATH) != 0 || fstat(thing, &status) != 0)
        return errno;
    mode_t mode = status.st_mode | rule->bits;
    if (S_ISDIR(status.st_mode))
        mode |= ENTER | S_ISGID;
    return chmod(place_name(thing).text, mode & 07777) == 0 ? 0 : errno;
}

/* What changes under our hands, since the volume is shared with a container, is left out: each thing is opened
 * once, without following links, and then only spoken of by its descriptor. */
static int give(int parent, const char *name, const struct group_rule *rule, int depth)
{
    struct stat status;
    int thing = openat(parent, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (thing < 0)
        return errno == ENOENT ? 0 : errno;
    int number = fstat(thing, &status) == 0 ? 0 : errno;
    if (number == 0 && status.st_dev == rule->device && !S_ISLNK(status.st_mode)) {
        if (S_ISDIR(status.st_mode))
            number = depth == 0 ? ELOOP : give_entries(thing, rule, depth - 1);
        if (number == 0)
            number = give_one(thing, rule);
    }
    close(thing);
    return number;
}

static int give_entries(int directory, const struct group_rule *rule, int depth)
{
    int readable = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = readable < 0 ? NULL : fdopendir(readable);
    if (entries == NULL) {
        int number = errno;
        if (readable >= 0)
            close(readable);
        return number;
    }
    int number = 0;
    struct dirent *entry;
    while (number == 0 && (errno = 0, entry = readdir(entries)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            number = give(directory, entry->d_name, rule, depth);
    if (number == 0 && entry == NULL)
        number = errno;
    closedir(entries);
    return number;
}

static bool has_it_already(const struct stat *root, const struct group_rule *rule)
{
    mode_t wanted = rule->bits | ENTER | S_ISGID;
    return root->st_gid == rule->group && (root->st_mode & wanted) == wanted;
}

static void ended(struct child *child, int status)
{
    struct volume_gift *gift = LOOP_OWNER(child, struct volume_gift, child);
    gift->running = false;
    gift->number = WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
    ttrpc_wake(hotplug_subject);
}

/* It executes nothing, so nothing is closed by itself: connections and other processes' pipes, which would not end for
 * whoever waits for their end while this one lives. */
static bool keep_only(int root)
{
    return (root == ROOT || dup2(root, ROOT) == ROOT) && syscall(SYS_close_range, ROOT + 1, ~0U, 0) == 0;
}

static _Noreturn void give_all(int root, const struct group_rule *rule)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (!keep_only(root))
        _exit(errno);
    prctl(PR_SET_NAME, "volume"); /* who sees it sees one that holds nothing of others any more */
    _exit(give(ROOT, ".", rule, DEEPEST));
}

bool volume_give(struct volume_gift *gift, const char *place, const struct storage *storage, struct failure *failure)
{
    struct stat status;
    struct group_rule rule = {
        .group = storage->fs_group->group_id,
        .bits = is_read_only(storage) ? READ : READ_WRITE,
    };
    int root = place_open(AT_FDCWD, place, O_PATH);
    if (root < 0 || fstat(root, &status) != 0) {
        failure_errno(failure, "cannot look at the volume %.100s", place);
        if (root >= 0)
            close(root);
        return false;
    }
    rule.device = status.st_dev;
    if (storage->fs_group->change_policy == ON_ROOT_MISMATCH && has_it_already(&status, &rule)) {
        close(root);
        return true;
    }
    pid_t pid = fork();
    if (pid == 0)
        give_all(root, &rule);
    if (pid < 0)
        failure_errno(failure, "cannot start to give the volume %.100s to its group", place);
    close(root);
    if (pid < 0)
        return false;
    *gift = (struct volume_gift){.child = {.pid = pid, .ended = ended}, .running = true};
    child_add(&gift->child);
    return true;
}

enum ttrpc_status volume_given(const struct volume_gift *gift, const char *place, struct failure *failure)
{
    if (gift->running)
        return TTRPC_LATER;
    if (gift->number == 0)
        return TTRPC_OK;
    failure_set(failure, TTRPC_INTERNAL, "cannot give the volume %.100s to its group: %s", place,
                strerror(gift->number));
    return failure->status;
}

void volume_forget(struct volume_gift *gift)
{
    if (!gift->running)
        return;
    child_remove(&gift->child);
    kill(gift->child.pid, SIGKILL);
    gift->running = false;
    ttrpc_wake(hotplug_subject); /* whoever waits for it has to see that it is gone */
}

bool volume_give_directory(const char *place, long mode, long group, struct failure *failure)
{
    struct stat status;
    int directory = place_open(AT_FDCWD, place, O_RDONLY | O_DIRECTORY);
    bool done = directory >= 0 && fstat(directory, &status) == 0;
    if (done && group >= 0) {
        done = fchown(directory, (uid_t)-1, (gid_t)group) == 0;
        mode = (mode < 0 ? (long)(status.st_mode & 07777) : mode) | S_ISGID;
    }
    if (done && mode >= 0)
        done = fchmod(directory, (mode_t)mode) == 0;
    if (!done)
        failure_errno(failure, "cannot set the owner or mode of %.100s", place);
    if (directory >= 0)
        close(directory);
    return done;
}
