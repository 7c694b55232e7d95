#define _GNU_SOURCE
#include "storage_drivers.h"

#include "device.h"
#include "hugepages.h"
#include "overlay.h"
#include "storage.h"
#include "volume.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define FSGID "fsgid=" /* Kata's own, among the options */
#define MODE "mode="
#define KATA "io.katacontainers."
#define SHARED "/run/kata-containers/shared/containers"

static bool has_prefix(const char *text, const char *prefix)
{
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

/* The value of the option that begins so; NULL: there is none. */
static const char *find_option(const struct storage *storage, const char *prefix)
{
    for (size_t i = 0; i < storage->options.count; i++)
        if (has_prefix(storage->options.items[i], prefix))
            return storage->options.items[i] + strlen(prefix);
    return NULL;
}

/* -1 where there is no such option. */
static bool read_number(const struct storage *storage, const char *prefix, int base, long most, long *number,
                        struct failure *failure)
{
    const char *text = find_option(storage, prefix);
    *number = -1;
    if (text == NULL)
        return true;
    char *end;
    errno = 0;
    long value = strtol(text, &end, base);
    if (*text < '0' || *text > '9' || *end != '\0' || errno != 0 || value > most)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%s is no number that could be: %.100s", prefix, text);
    *number = value;
    return true;
}

bool storage_options(const struct storage *storage, struct mount_options *options, struct failure *failure)
{
    for (size_t i = 0; i < storage->options.count; i++) {
        const char *option = storage->options.items[i];
        if (!has_prefix(option, FSGID) && !has_prefix(option, KATA) && !mount_options_add(options, option, failure))
            return false;
    }
    return true;
}

/* --- the mount itself --- */

static bool is_bind(const struct storage *storage)
{
    return strcmp(storage->fstype, "bind") == 0;
}

static bool make_file(const char *place, bool *made)
{
    const char *name;
    char parent[PLACE_SIZE];
    strcpy(parent, place);
    *strrchr(parent, '/') = '\0';
    bool made_parent;
    int directory = place_make(*parent == '\0' ? "/" : parent, 0755, &made_parent);
    if (directory < 0)
        return false;
    name = place + strlen(parent) + 1;
    int file = openat(directory, name, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
    int number = errno;
    close(directory);
    if (file >= 0)
        close(file);
    errno = number;
    *made = false; /* only directories are removed again */
    return file >= 0;
}

bool storage_make_place(const struct storage_request *request, bool *made, struct failure *failure)
{
    struct stat status;
    int source = is_bind(request->storage) ? place_open(AT_FDCWD, request->source, O_PATH) : -1;
    bool file = source >= 0 && fstat(source, &status) == 0 && !S_ISDIR(status.st_mode);
    if (source >= 0)
        close(source);
    if (file)
        return make_file(request->place, made) ||
               failure_errno(failure, "cannot make the mount point %.100s", request->place);
    int directory = place_make(request->place, 0755, made);
    if (directory < 0)
        return failure_errno(failure, "cannot make the mount point %.100s", request->place);
    close(directory);
    return true;
}

/* mount(2) on a place that is found without following links; what is mounted there already is found with it. */
static bool mount_on(const char *place, const char *source, const char *type, unsigned long flags, const char *data)
{
    int target = place_open(AT_FDCWD, place, O_PATH);
    if (target < 0)
        return false;
    bool done = mount(source, place_name(target).text, type, flags, data) == 0;
    int number = errno;
    close(target);
    errno = number;
    return done;
}

bool storage_mount_at(const struct storage_request *request, const char *source, const char *type,
                      const struct mount_options *options, struct failure *failure)
{
    unsigned long flags = options->flags & ~(unsigned long)MS_REMOUNT;
    if (!mount_on(request->place, source, type, flags, options->data))
        return failure_errno(failure, "cannot mount %.60s (%.20s) on %.100s", request->source, type, request->place);
    bool done = true;
    /* A bind mount takes its flags only when it is there. */
    if ((flags & MS_BIND) != 0 && (flags & ~(unsigned long)(MS_BIND | MS_REC)) != 0)
        done = mount_on(request->place, NULL, NULL, MS_REMOUNT | (flags & ~(unsigned long)MS_REC), NULL);
    if (done && options->propagation != 0)
        done = mount_on(request->place, NULL, NULL, options->propagation, NULL);
    if (done)
        return true;
    failure_errno(failure, "cannot set the options of %.100s", request->place);
    return false;
}

static bool mount_bind(const struct storage_request *request, struct mount_options *options, struct failure *failure)
{
    char source[PLACE_SIZE];
    if (!place_normalize(request->source, "the source", source, failure))
        return false;
    int opened = place_open(AT_FDCWD, source, O_PATH);
    if (opened < 0)
        return failure_errno(failure, "cannot open %.100s", source);
    options->flags |= MS_BIND;
    bool done = storage_mount_at(request, place_name(opened).text, "none", options, failure);
    close(opened);
    return done;
}

static bool mount_usual(const struct storage_driver *driver, const struct storage_request *request,
                        struct failure *failure)
{
    struct mount_options options = {0};
    const struct storage *storage = request->storage;
    if (!storage_options(storage, &options, failure))
        return false;
    if (is_bind(storage))
        return mount_bind(request, &options, failure);
    const char *type = *storage->fstype != '\0' ? storage->fstype : driver->type;
    if (*type == '\0')
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "a storage of %s needs a filesystem type", driver->name);
    if (*request->source == '\0')
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "a storage of %s needs a source", driver->name);
    return storage_mount_at(request, request->source, type, &options, failure);
}

/* --- those with something of their own --- */

static bool mount_9p(const struct storage_driver *driver, const struct storage_request *request,
                     struct failure *failure)
{
    struct mount_options options = {0};
    if (*request->source == '\0')
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "a storage of 9p needs a tag as its source");
    if (!storage_options(request->storage, &options, failure))
        return false;
    if (strstr(options.data, "trans=") == NULL && !mount_options_add_data(&options, "trans=virtio", failure))
        return false;
    if (strstr(options.data, "version=") == NULL && !mount_options_add_data(&options, "version=9p2000.L", failure))
        return false;
    return storage_mount_at(request, request->source, driver->type, &options, failure);
}

static bool mount_ephemeral(const struct storage_driver *driver, const struct storage_request *request,
                            struct failure *failure)
{
    long group;
    const char *type = request->storage->fstype;
    if (!read_number(request->storage, FSGID, 10, UINT32_MAX - 1, &group, failure))
        return false;
    if (strcmp(type, "hugetlbfs") == 0) {
        if (!hugepages_allocate(request->storage, failure))
            return false;
    } else if (*type != '\0' && strcmp(type, "tmpfs") != 0 && !is_bind(request->storage)) {
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "ephemeral storage is no %.60s", type);
    }
    if (!mount_usual(driver, request, failure))
        return false;
    return group < 0 || volume_give_directory(request->place, -1, group, failure);
}

static bool make_local(const struct storage_driver *driver, const struct storage_request *request,
                       struct failure *failure)
{
    long mode;
    long group;
    (void)driver;
    if (!read_number(request->storage, FSGID, 10, UINT32_MAX - 1, &group, failure) ||
        !read_number(request->storage, MODE, 8, 07777, &mode, failure))
        return false;
    return (mode < 0 && group < 0) || volume_give_directory(request->place, mode, group, failure);
}

/* ConfigMaps, Secrets and tokens of Kubernetes. The share they come on tells nobody of changes, and may be read-only:
 * runtimes name a place in a directory of it that is the agent's to cover with a filesystem of its own. */
static bool cover_watchable(const char *place, struct failure *failure)
{
    static const char *const covered[] = {SHARED "/watchable", SHARED "/passthrough/watchable"};
    for (size_t i = 0; i < sizeof covered / sizeof covered[0]; i++) {
        struct stat share;
        struct stat status;
        bool made;
        if (!place_is_below(place, covered[i]))
            continue;
        int directory = place_make(covered[i], 0755, &made);
        bool done = directory >= 0 && fstat(directory, &status) == 0 && stat(SHARED, &share) == 0;
        if (done && status.st_dev == share.st_dev)
            done = mount("tmpfs", place_name(directory).text, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755") == 0;
        if (!done)
            failure_errno(failure, "cannot cover %s", covered[i]);
        if (directory >= 0)
            close(directory);
        return done;
    }
    return true;
}

/* Kata's agent copies what is small and looks every two seconds whether it changed, so that inotify tells of it; what
 * is large it binds, as we do all of it: changes are seen by whoever reads again. */
static enum ttrpc_status find_watchable(struct storage_request *request, struct failure *failure)
{
    if (!is_bind(request->storage))
        failure_set(failure, TTRPC_INVALID_ARGUMENT, "watchable storage is bound, and no %.60s",
                    request->storage->fstype);
    else
        cover_watchable(request->place, failure);
    return failure->status;
}

/* --- devices --- */

static enum ttrpc_status find_block(struct storage_request *request, struct failure *failure)
{
    struct device_node node;
    /* A runtime binds the device's node as well: a container is to have the disk, not what is on it. */
    if (is_bind(request->storage) && *request->source == '/' && !place_is_below(request->source, "/dev"))
        return TTRPC_OK;
    enum ttrpc_status status = device_find(request->storage->driver, request->storage->source, &node, failure);
    if (status == TTRPC_OK)
        strcpy(request->source, node.path);
    return status;
}

const struct storage_driver storage_drivers[] = {
    {"9p", "9p", true, false, NULL, mount_9p, NULL},
    {DEVICE_BLK, "", true, false, find_block, mount_usual, NULL},
    {"ephemeral", "tmpfs", true, true, NULL, mount_ephemeral, NULL},
    {"local", "", false, true, NULL, make_local, NULL},
    {DEVICE_MMIOBLK, "", true, false, find_block, mount_usual, NULL},
    {DEVICE_NVDIMM, "", true, false, find_block, mount_usual, NULL},
    {"overlayfs", "overlay", true, false, NULL, overlay_mount, overlay_clean},
    {DEVICE_SCSI, "", true, false, find_block, mount_usual, NULL},
    {"virtio-fs", "virtiofs", true, false, NULL, mount_usual, NULL},
    {"watchable-bind", "", true, false, find_watchable, mount_usual, NULL},
    {NULL, NULL, false, false, NULL, NULL, NULL},
};

const char *const storage_handlers[] = {
    "9p",          DEVICE_BLK,  "ephemeral", "local", DEVICE_MMIOBLK, DEVICE_NVDIMM,
    "overlayfs",   DEVICE_SCSI, "virtio-fs", "watchable-bind", NULL,
};

const struct storage_driver *storage_driver(const char *name)
{
    for (const struct storage_driver *driver = storage_drivers; driver->name != NULL; driver++)
        if (strcmp(driver->name, name) == 0)
            return driver;
    return NULL;
}
