/* The image is hostile: every path in the container is looked up below its root by inside.h, a mount is put upon the
 * descriptor that came of it and was looked at, and what covers a file to hide it is the guest's own /dev/null. Paths
 * of the guest keep their meaning until rootfs_enter: the container's root lies over "/", and a lookup that begins at
 * "/" does not cross what lies over it. */
#define _GNU_SOURCE
#include "rootfs.h"

#include "device_nodes.h"
#include "inside.h"
#include "mountfd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#define SHARED "/run/kata-containers/" /* of the guest; containers may write below it */

enum { NEW_GUEST = 128 };

static bool is_directory(int fd)
{
    struct stat state;
    return fstat(fd, &state) == 0 && S_ISDIR(state.st_mode);
}

static bool is_below(const char *path, const char *directory)
{
    size_t length = strlen(directory);
    return strncmp(path, directory, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

static bool is_procfs(int fd)
{
    struct statfs state;
    return fstatfs(fd, &state) == 0 && state.f_type == PROC_SUPER_MAGIC;
}

/* --- mounts --- */

/* Where containers can write, a link in the path may be one that a container made: there are to be none. */
static int open_source(const char *path)
{
    int guest = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (guest < 0)
        return -1;
    int source = inside_open_straight(guest, path, O_PATH);
    if (source < 0 && errno == ELOOP && strncmp(path, SHARED, strlen(SHARED)) != 0)
        source = inside_open(guest, path, O_PATH);
    int number = errno;
    close(guest);
    errno = number;
    return source;
}

/* The target of a mount of the kernel's own trees must be what it seems: were /proc a link, all that is said about
 * /proc/… afterwards would be said about something else. */
static int open_target(int root, const struct oci_mount *mount, bool directory, bool straight)
{
    int target = directory ? inside_make_directory(root, mount->destination)
                           : inside_make_file(root, mount->destination);
    if (target < 0)
        return -1;
    if (straight) {
        close(target);
        return inside_open_straight(root, mount->destination, O_PATH);
    }
    if (is_procfs(target) && !is_below(mount->destination, "/proc")) {
        close(target);
        errno = ELOOP;
        return -1;
    }
    return target;
}

static bool put(int root, const struct oci_mount *row, int mount, bool directory, bool straight,
                const struct mountfd_wishes *wishes, struct failure *failure)
{
    int target = open_target(root, row, directory, straight);
    if (target < 0)
        return failure_errno(failure, "the container has no place to mount on at %.100s", row->destination);
    bool done = mountfd_set(mount, wishes) && mountfd_put(mount, target) &&
                mountfd_propagate(mount, wishes->propagation, wishes->propagation_below);
    if (!done)
        failure_errno(failure, "cannot mount on %.100s", row->destination);
    close(target);
    return done;
}

static bool mount_copy(int root, const struct oci_mount *row, const struct mountfd_wishes *wishes,
                       struct failure *failure)
{
    int source = open_source(row->source);
    if (source < 0)
        return failure_errno(failure, "cannot open %.100s to mount it on %.100s", row->source, row->destination);
    int mount = mountfd_copy(source, wishes->below);
    bool done = mount >= 0;
    if (!done)
        failure_errno(failure, "cannot mount %.100s on %.100s", row->source, row->destination);
    else
        done = put(root, row, mount, is_directory(source), false, wishes, failure);
    if (mount >= 0)
        close(mount);
    close(source);
    return done;
}

static const char *type_of(const struct oci_mount *row)
{
    return strcmp(row->type, "cgroup") == 0 ? "cgroup2" : row->type;
}

static bool mount_new(int root, const struct oci_mount *row, const struct mountfd_wishes *wishes,
                      struct failure *failure)
{
    const char *type = type_of(row);
    int mount = mountfd_new(type, row->source, &row->options, row->destination, failure);
    if (mount < 0)
        return false;
    bool straight = strcmp(type, "proc") == 0 || strcmp(type, "sysfs") == 0;
    bool done = put(root, row, mount, true, straight, wishes, failure);
    close(mount);
    return done;
}

static bool remount(int root, const struct oci_mount *row, const struct mountfd_wishes *wishes,
                    struct failure *failure)
{
    int mount = inside_open(root, row->destination, O_PATH);
    bool done = mount >= 0 && mountfd_set(mount, wishes);
    if (!done)
        failure_errno(failure, "cannot change the mount of %.100s", row->destination);
    if (mount >= 0)
        close(mount);
    return done;
}

static bool mount_row(int root, const struct oci_mount *row, struct failure *failure)
{
    struct mountfd_wishes wishes = mountfd_wishes(&row->options);
    if (row->destination[strspn(row->destination, "/.")] == '\0')
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "nothing can be mounted on the container's root");
    if (wishes.remount)
        return remount(root, row, &wishes, failure);
    if (wishes.bind || strcmp(row->type, "bind") == 0)
        return mount_copy(root, row, &wishes, failure);
    return mount_new(root, row, &wishes, failure);
}

/* --- /dev --- */

static const struct oci_mount *find_mount(const struct oci_spec *spec, const char *destination)
{
    const struct oci_mount *found = NULL;
    for (size_t i = 0; i < spec->mounts.count; i++) {
        const char *path = spec->mounts.items[i].destination;
        size_t length = strlen(path);
        while (length > 1 && path[length - 1] == '/')
            length--;
        if (length == strlen(destination) && strncmp(path, destination, length) == 0)
            found = &spec->mounts.items[i];
    }
    return found;
}

static bool is_bind(const struct oci_mount *row)
{
    return strcmp(row->type, "bind") == 0 || mountfd_wishes(&row->options).bind;
}

/* A description without a /dev gets one: nodes are not written into the image, nor are the image's used. */
static bool mount_dev(int root, struct failure *failure)
{
    static const char *dev_options[] = {"nosuid", "noexec", "strictatime", "mode=755", "size=64k"};
    static const char *pts_options[] = {"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"};
    static const struct oci_mount rows[] = {
        {.destination = "/dev", .source = "tmpfs", .type = "tmpfs", .options = {dev_options, 5}},
        {.destination = "/dev/pts", .source = "devpts", .type = "devpts", .options = {pts_options, 5}},
    };
    return mount_row(root, &rows[0], failure) && mount_row(root, &rows[1], failure);
}

/* --- what is hidden, and what is read-only --- */

/* The path, when it is there and is what its name says; -1 without a failure: it is not there. */
static int open_kernel_path(int root, const char *path, bool has_proc, struct failure *failure)
{
    int fd = inside_open(root, path, O_PATH);
    if (fd < 0 && errno != ENOENT && errno != ENOTDIR)
        failure_errno(failure, "cannot open %.100s of the container", path);
    if (fd < 0)
        return -1;
    if (has_proc && is_below(path, "/proc") && !is_procfs(fd)) {
        close(fd);
        failure_set(failure, TTRPC_INVALID_ARGUMENT, "%.100s of the container is not the kernel's", path);
        return -1;
    }
    return fd;
}

static int cover_for(int target, int null, const char *path, struct failure *failure)
{
    static const struct texts none = {NULL, 0};
    if (is_directory(target))
        return mountfd_new("tmpfs", "tmpfs", &none, path, failure);
    int cover = mountfd_copy(null, false);
    if (cover < 0)
        failure_errno(failure, "cannot hide %.100s", path);
    return cover;
}

static bool hide(int root, const char *path, int null, bool has_proc, struct failure *failure)
{
    int target = open_kernel_path(root, path, has_proc, failure);
    if (target < 0)
        return failure->status == TTRPC_OK;
    int cover = cover_for(target, null, path, failure);
    bool done = cover >= 0;
    if (done && !((!is_directory(target) || mountfd_make_readonly(cover, false)) && mountfd_put(cover, target)))
        done = failure_errno(failure, "cannot hide %.100s", path);
    if (cover >= 0)
        close(cover);
    close(target);
    return done;
}

static bool protect(int root, const char *path, bool has_proc, struct failure *failure)
{
    int target = open_kernel_path(root, path, has_proc, failure);
    if (target < 0)
        return failure->status == TTRPC_OK;
    int mount = mountfd_copy(target, true);
    bool done = mount >= 0 && mountfd_make_readonly(mount, true) && mountfd_put(mount, target);
    if (!done)
        failure_errno(failure, "cannot make %.100s read-only", path);
    if (mount >= 0)
        close(mount);
    close(target);
    return done;
}

static int open_null(void)
{
    struct stat state;
    int null = open("/dev/null", O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (null < 0)
        return -1;
    if (fstat(null, &state) == 0 && S_ISCHR(state.st_mode) && state.st_rdev == makedev(1, 3))
        return null;
    close(null);
    errno = ENODEV;
    return -1;
}

static bool restrict_paths(int root, const struct oci_spec *spec, struct failure *failure)
{
    const struct oci_linux *about = spec->linux_;
    const struct oci_mount *proc = find_mount(spec, "/proc");
    bool has_proc = proc != NULL && strcmp(proc->type, "proc") == 0;
    int null = open_null();
    if (null < 0)
        return failure_errno(failure, "this guest has no /dev/null");
    bool done = true;
    for (size_t i = 0; done && i < about->readonly_paths.count; i++)
        done = protect(root, about->readonly_paths.items[i], has_proc, failure);
    for (size_t i = 0; done && i < about->masked_paths.count; i++)
        done = hide(root, about->masked_paths.items[i], null, has_proc, failure);
    close(null);
    return done;
}

/* --- the root --- */

static bool is_guest_root(int fd)
{
    struct stat one;
    struct stat other;
    return fstat(fd, &one) == 0 && stat("/", &other) == 0 && one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

static int copy_root(const char *path, struct failure *failure)
{
    int source = open_source(path);
    if (source < 0 || !is_directory(source)) {
        if (source >= 0)
            errno = ENOTDIR;
        failure_errno(failure, "cannot open the container's root %.100s", path);
        if (source >= 0)
            close(source);
        return -1;
    }
    /* Whoever asks for the guest's own root gets what is on it, not what the guest has mounted. */
    int copy = mountfd_copy(source, !is_guest_root(source));
    if (copy < 0)
        failure_errno(failure, "cannot mount the container's root %.100s", path);
    close(source);
    return copy;
}

/* Nothing that happens in this namespace reaches the guest's; what is unmounted there goes here as well if its mounts
 * are shared. */
static bool leave_propagation(struct failure *failure)
{
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) == 0)
        return true;
    return failure_errno(failure, "cannot part the container's mounts from the guest's");
}

static bool cover_guest(int root)
{
    int guest = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    bool done = guest >= 0 && mountfd_put(root, guest);
    int number = errno;
    if (guest >= 0)
        close(guest);
    errno = number;
    return done;
}

static bool fill(int root, const struct oci_spec *spec, const struct oci_device *devices, size_t count,
                 struct failure *failure)
{
    const struct oci_mount *dev = find_mount(spec, "/dev");
    if (dev == NULL && !mount_dev(root, failure))
        return false;
    for (size_t i = 0; i < spec->mounts.count; i++)
        if (!mount_row(root, &spec->mounts.items[i], failure))
            return false;
    if ((dev == NULL || !is_bind(dev)) && !device_nodes_make(root, devices, count, failure))
        return false;
    return restrict_paths(root, spec, failure);
}

int rootfs_build(const struct oci_spec *spec, const struct oci_device *devices, size_t count, struct failure *failure)
{
    if (!leave_propagation(failure))
        return -1;
    int root = copy_root(spec->root->path, failure);
    if (root < 0)
        return -1;
    if (!mountfd_propagate(root, MS_PRIVATE, true) || !cover_guest(root)) {
        failure_errno(failure, "cannot mount the container's root");
    } else if (fill(root, spec, devices, count, failure)) {
        return root;
    }
    close(root);
    return -1;
}

/* --- the step inside --- */

static bool pivot(int root)
{
    return fchdir(root) == 0 && syscall(SYS_pivot_root, ".", ".") == 0 && umount2(".", MNT_DETACH) == 0 &&
           chdir("/") == 0;
}

/* The mount points right below "/" of the guest; NULL at the end. Each is the caller's to free. */
static size_t list_guest(char *points[NEW_GUEST])
{
    FILE *file = fopen("/proc/self/mountinfo", "re");
    char *line = NULL;
    size_t size = 0;
    size_t count = 0;
    while (file != NULL && count < NEW_GUEST && getline(&line, &size, file) > 0) {
        char *rest = line;
        char *word = NULL;
        for (int i = 0; i < 5; i++)
            word = strsep(&rest, " ");
        if (word != NULL && strcmp(word, "/") != 0)
            points[count++] = strdup(word);
    }
    free(line);
    if (file != NULL)
        fclose(file);
    return count;
}

/* The first filesystem of a guest that runs from its initramfs cannot be left by pivot_root. It stays below, empty of
 * mounts, and is covered by the container's root for whoever comes to this namespace. A mount that still cannot go is
 * out of reach all the same. */
static bool stay_above(int root)
{
    char *points[NEW_GUEST];
    size_t count = list_guest(points);
    for (size_t i = 0; i < count; i++) {
        if (points[i] != NULL)
            umount2(points[i], MNT_DETACH | UMOUNT_NOFOLLOW);
        free(points[i]);
    }
    return fchdir(root) == 0 && chroot(".") == 0 && chdir("/") == 0;
}

bool rootfs_enter(int root, const struct oci_spec *spec, struct failure *failure)
{
    uint64_t propagation = 0;
    bool below = false;
    const char *word = spec->linux_->rootfs_propagation;
    if (word[0] != '\0' && !mountfd_propagation(word, &propagation, &below))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%.100s is no propagation of mounts", word);
    if (spec->root->readonly && !mountfd_make_readonly(root, false))
        return failure_errno(failure, "cannot make the container's root read-only");
    bool inside = pivot(root);
    if (!inside && errno == EINVAL)
        inside = stay_above(root);
    if (!inside)
        return failure_errno(failure, "cannot enter the container's root");
    if (!mountfd_propagate(root, propagation, below))
        return failure_errno(failure, "cannot set how the mounts of the container's root propagate");
    return true;
}
