#define _GNU_SOURCE
#include "device_nodes.h"

#include "inside.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { DEFAULT_MODE = 0666 };

static const struct oci_device usual[] = {
    {.path = "/dev/null", .type = "c", .major = 1, .minor = 3, .file_mode = DEFAULT_MODE},
    {.path = "/dev/zero", .type = "c", .major = 1, .minor = 5, .file_mode = DEFAULT_MODE},
    {.path = "/dev/full", .type = "c", .major = 1, .minor = 7, .file_mode = DEFAULT_MODE},
    {.path = "/dev/random", .type = "c", .major = 1, .minor = 8, .file_mode = DEFAULT_MODE},
    {.path = "/dev/urandom", .type = "c", .major = 1, .minor = 9, .file_mode = DEFAULT_MODE},
    {.path = "/dev/tty", .type = "c", .major = 5, .minor = 0, .file_mode = DEFAULT_MODE},
};

static const struct {
    const char *path;
    const char *target;
} links[] = {
    {"/dev/fd", "/proc/self/fd"},        {"/dev/stdin", "/proc/self/fd/0"}, {"/dev/stdout", "/proc/self/fd/1"},
    {"/dev/stderr", "/proc/self/fd/2"},  {"/dev/ptmx", "pts/ptmx"},
};
static const char core[] = "/proc/kcore"; /* few kernels of guests have it */

static bool node_mode(const struct oci_device *device, mode_t *mode)
{
    mode_t permissions = device->file_mode == 0 ? DEFAULT_MODE : device->file_mode & 07777;
    if (strcmp(device->type, "c") == 0 || strcmp(device->type, "u") == 0)
        *mode = S_IFCHR | permissions;
    else if (strcmp(device->type, "b") == 0)
        *mode = S_IFBLK | permissions;
    else if (strcmp(device->type, "p") == 0)
        *mode = S_IFIFO | permissions;
    else
        return false;
    return true;
}

/* What stands there may be the image's: it goes, unless it is the same device. */
static bool make_node(int parent, const char *name, mode_t mode, dev_t number)
{
    struct stat state;
    if (mknodat(parent, name, mode, number) == 0)
        return true;
    if (errno != EEXIST || fstatat(parent, name, &state, AT_SYMLINK_NOFOLLOW) != 0)
        return false;
    if ((state.st_mode & S_IFMT) == (mode & S_IFMT) && state.st_rdev == number)
        return true;
    return unlinkat(parent, name, 0) == 0 && mknodat(parent, name, mode, number) == 0;
}

static bool make_device(int root, const struct oci_device *device, struct failure *failure)
{
    char name[NAME_MAX + 1];
    mode_t mode = 0;
    if (!node_mode(device, &mode))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the device %.100s is of no known type", device->path);
    int parent = inside_make_parent(root, device->path, name, sizeof name);
    if (parent < 0)
        return failure_errno(failure, "cannot make the directory of %.100s", device->path);
    dev_t number = makedev((unsigned int)device->major, (unsigned int)device->minor);
    bool made = make_node(parent, name, mode, (mode & S_IFMT) == S_IFIFO ? 0 : number) &&
                ((device->uid == 0 && device->gid == 0) ||
                 fchownat(parent, name, device->uid, device->gid, AT_SYMLINK_NOFOLLOW) == 0);
    if (!made)
        failure_errno(failure, "cannot make the device %.100s", device->path);
    close(parent);
    return made;
}

static bool make_link(int root, const char *path, const char *target, struct failure *failure)
{
    char name[NAME_MAX + 1];
    int parent = inside_make_parent(root, path, name, sizeof name);
    bool made = parent >= 0 && (symlinkat(target, parent, name) == 0 || errno == EEXIST);
    if (!made)
        failure_errno(failure, "cannot make the link %.100s", path);
    if (parent >= 0)
        close(parent);
    return made;
}

bool device_nodes_make(int root, const struct oci_device *devices, size_t count, struct failure *failure)
{
    mode_t mask = umask(0);
    bool made = true;
    for (size_t i = 0; made && i < sizeof usual / sizeof usual[0]; i++)
        made = make_device(root, &usual[i], failure);
    for (size_t i = 0; made && i < count; i++)
        made = make_device(root, &devices[i], failure);
    for (size_t i = 0; made && i < sizeof links / sizeof links[0]; i++)
        made = make_link(root, links[i].path, links[i].target, failure);
    if (made && access(core, F_OK) == 0)
        made = make_link(root, "/dev/core", core, failure);
    umask(mask);
    return made;
}
