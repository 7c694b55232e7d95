#define _GNU_SOURCE
#include "tree.h"

#include "mountinfo.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

bool tree_make(const char *path, mode_t mode)
{
    char part[512];
    size_t size = strlen(path);
    if (size >= sizeof part) {
        errno = ENAMETOOLONG;
        return false;
    }
    for (size_t at = 1; at <= size; at++) {
        if (path[at] != '/' && path[at] != '\0')
            continue;
        memcpy(part, path, at);
        part[at] = '\0';
        if (mkdir(part, mode) != 0 && errno != EEXIST)
            return false;
    }
    struct stat status;
    if (stat(path, &status) != 0)
        return false;
    errno = ENOTDIR;
    return S_ISDIR(status.st_mode);
}

/* --- mounts --- */

static bool lies_in(const char *path, const char *directory)
{
    size_t size = strlen(directory);
    return strncmp(path, directory, size) == 0 && (path[size] == '\0' || path[size] == '/');
}

/* The last mount on `path` or below it, in the caller's memory; NULL: there is none. */
static char *last_mount(const char *path)
{
    FILE *file = fopen("/proc/self/mountinfo", "re");
    char *line = NULL;
    char *found = NULL;
    size_t size = 0;
    while (file != NULL && getline(&line, &size, file) > 0) {
        struct mountinfo mount;
        if (!mountinfo_split(line, &mount) || !lies_in(mount.target, path))
            continue;
        free(found);
        found = strdup(mount.target);
    }
    free(line);
    if (file != NULL)
        fclose(file);
    return found;
}

void tree_unmount(const char *path)
{
    enum { MOST = 1024 }; /* whoever mounts as fast as we unmount does not keep us here */
    char *real = realpath(path, NULL); /* as the kernel's list of mounts spells it: /var/run is a link */
    bool gone = real != NULL;
    for (int i = 0; gone && i < MOST; i++) {
        char *target = last_mount(real);
        gone = target != NULL && umount2(target, MNT_DETACH | UMOUNT_NOFOLLOW) == 0;
        free(target);
    }
    free(real);
}

/* --- removal --- */

/* Directories are moved up to stand beside each other in `top`, under new names, until each is empty when its turn comes:
 * so a container that nests a million of them costs us time, but neither stack nor descriptors. */
struct removal {
    int top;
    unsigned long moved;
    int problem; /* the first errno */
};

static void note(struct removal *removal)
{
    if (removal->problem == 0)
        removal->problem = errno;
}

static void move_up(struct removal *removal, int from, const char *name)
{
    enum { MOST = 1000 }; /* names that are taken, by somebody who wants to be in the way */
    char new_name[40];
    for (int i = 0; i < MOST; i++) {
        snprintf(new_name, sizeof new_name, ".removing.%lu", removal->moved++);
        if (renameat(from, name, removal->top, new_name) == 0) /* it may replace an empty directory */
            return;
        if (errno != EEXIST && errno != ENOTEMPTY && errno != ENOTDIR)
            break;
    }
    note(removal);
}

static DIR *open_list(int parent, const char *name)
{
    int file = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *list = file >= 0 ? fdopendir(file) : NULL;
    if (list == NULL && file >= 0)
        close(file);
    return list;
}

static bool is_dot(const char *name)
{
    return strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
}

static void empty(struct removal *removal, const char *name)
{
    DIR *list = open_list(removal->top, name);
    if (list == NULL) {
        note(removal);
        return;
    }
    for (const struct dirent *entry; (entry = readdir(list)) != NULL;) {
        if (is_dot(entry->d_name) || unlinkat(dirfd(list), entry->d_name, 0) == 0)
            continue;
        if (errno != EISDIR)
            note(removal);
        else if (unlinkat(dirfd(list), entry->d_name, AT_REMOVEDIR) != 0)
            move_up(removal, dirfd(list), entry->d_name);
    }
    closedir(list);
}

/* True: something went, so another round may find more. */
static bool remove_round(struct removal *removal)
{
    bool went = false;
    DIR *list = open_list(removal->top, ".");
    if (list == NULL) {
        note(removal);
        return false;
    }
    removal->problem = 0;
    for (const struct dirent *entry; (entry = readdir(list)) != NULL;) {
        if (is_dot(entry->d_name))
            continue;
        if (unlinkat(removal->top, entry->d_name, 0) == 0) {
            went = true;
            continue;
        }
        if (errno != EISDIR) {
            note(removal);
            continue;
        }
        /* A mount point is EBUSY: what is mounted there is not ours to delete. */
        if (unlinkat(removal->top, entry->d_name, AT_REMOVEDIR) != 0 && (errno == ENOTEMPTY || errno == EEXIST))
            empty(removal, entry->d_name);
        if (unlinkat(removal->top, entry->d_name, AT_REMOVEDIR) == 0 || errno == ENOENT)
            went = true;
        else
            note(removal);
    }
    closedir(list);
    return went;
}

bool tree_remove(const char *path)
{
    struct removal removal = {.top = open(path, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
    if (removal.top < 0)
        return errno == ENOENT;
    while (remove_round(&removal))
        ;
    close(removal.top);
    if (rmdir(path) == 0)
        return true;
    if (removal.problem != 0)
        errno = removal.problem;
    return false;
}
