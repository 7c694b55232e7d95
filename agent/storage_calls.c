#define _GNU_SOURCE
#include "device.h"
#include "log.h"
#include "mount_options.h"
#include "mountinfo.h"
#include "place.h"
#include "storage.h"
#include "storage_drivers.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/swap.h>
#include <unistd.h>

#define SUBSYSTEM "storage"
#define SHARED "/run/kata-containers/shared/containers"

enum { BYTES = 1, INODES = 2 }; /* of grpc.VolumeUsage.Unit */

/* --- UpdateEphemeralMounts --- */

/* Flags of a mount are replaced by a remount, those of its filesystem's options that are not named stay. */
static bool resize(const char *place, const struct mount_options *options, struct failure *failure)
{
    static const struct {
        unsigned long has;
        unsigned long flag;
    } kept[] = {{ST_RDONLY, MS_RDONLY}, {ST_NOSUID, MS_NOSUID}, {ST_NODEV, MS_NODEV}, {ST_NOEXEC, MS_NOEXEC}};
    struct statvfs status;
    int target = place_open(AT_FDCWD, place, O_PATH);
    bool done = target >= 0 && fstatvfs(target, &status) == 0;
    if (done) {
        unsigned long flags = options->flags | MS_REMOUNT;
        for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++)
            if ((status.f_flag & kept[i].has) != 0)
                flags |= kept[i].flag;
        done = mount(NULL, place_name(target).text, NULL, flags, options->data) == 0;
    }
    if (!done)
        failure_errno(failure, "cannot change the mount %.100s", place);
    if (target >= 0)
        close(target);
    return done;
}

static bool update_ephemeral(const struct storage *storage, struct failure *failure)
{
    char place[PLACE_SIZE];
    struct mount_options options = {0};
    if (strcmp(storage->driver, "ephemeral") != 0)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "only ephemeral storage can be updated, not %.100s",
                           storage->driver);
    if (!place_normalize(storage->mount_point, "the mount point", place, failure))
        return false;
    if (!storage_holds(place, "ephemeral"))
        return failure_set(failure, TTRPC_NOT_FOUND, "no ephemeral storage is mounted on %.100s", place);
    if (storage->options.count == 0)
        return true;
    return storage_options(storage, &options, failure) && resize(place, &options, failure);
}

static enum ttrpc_status update_ephemeral_mounts(struct ttrpc_call *call)
{
    struct update_ephemeral_mounts_request request;
    if (!ttrpc_decode(call, &message_update_ephemeral_mounts_request, &request))
        return call->failure.status;
    for (size_t i = 0; i < request.storages.count; i++)
        if (!update_ephemeral(&request.storages.items[i], &call->failure))
            return call->failure.status;
    return TTRPC_OK;
}

/* --- swap --- */

static enum ttrpc_status swap_on(struct ttrpc_call *call, const char *kind, const char *where)
{
    struct device_node node;
    enum ttrpc_status status = device_find(kind, where, &node, &call->failure);
    if (status == TTRPC_LATER)
        return storage_later(call);
    if (status != TTRPC_OK)
        return status;
    if (swapon(node.path, 0) == 0)
        return TTRPC_OK;
    failure_errno(&call->failure, "cannot swap on %.100s", node.path);
    return call->failure.status;
}

static enum ttrpc_status add_swap(struct ttrpc_call *call)
{
    struct add_swap_request request;
    if (!ttrpc_decode(call, &message_add_swap_request, &request))
        return call->failure.status;
    char path[128] = "";
    for (size_t i = 0; i < request.pci_path.count && strlen(path) + 16 < sizeof path; i++)
        snprintf(path + strlen(path), sizeof path - strlen(path), "%s%02x", i > 0 ? "/" : "",
                 (unsigned int)request.pci_path.items[i]);
    return swap_on(call, DEVICE_BLK, path);
}

static enum ttrpc_status add_swap_path(struct ttrpc_call *call)
{
    struct add_swap_path_request request;
    if (!ttrpc_decode(call, &message_add_swap_path_request, &request))
        return call->failure.status;
    return swap_on(call, DEVICE_MMIOBLK, request.path);
}

/* --- GetVolumeStats --- */

static void put_usage(struct buffer *reply, uint64_t total, uint64_t available, unsigned int unit)
{
    struct buffer usage = {0};
    if (available > total)
        available = total;
    wire_put_uint(&usage, 1, available);
    wire_put_uint(&usage, 2, total);
    wire_put_uint(&usage, 3, total - available);
    wire_put_uint(&usage, 4, unit);
    wire_put_message(reply, 1, &usage);
    buffer_reset(&usage);
}

static enum ttrpc_status get_volume_stats(struct ttrpc_call *call)
{
    char place[PLACE_SIZE];
    struct statfs status;
    struct volume_stats_request request;
    if (!ttrpc_decode(call, &message_volume_stats_request, &request) ||
        !place_normalize(request.volume_guest_path, "the volume's path", place, &call->failure))
        return call->failure.status;
    int volume = place_open(AT_FDCWD, place, O_PATH);
    bool known = volume >= 0 && fstatfs(volume, &status) == 0;
    if (!known)
        failure_errno(&call->failure, "cannot look at the volume %.100s", place);
    if (volume >= 0)
        close(volume);
    if (!known)
        return call->failure.status;
    uint64_t block = (uint64_t)status.f_bsize;
    const struct buffer condition = {0};
    put_usage(&call->reply, status.f_blocks * block, status.f_bfree * block, BYTES);
    put_usage(&call->reply, status.f_files, status.f_ffree, INODES);
    wire_put_message(&call->reply, 2, &condition);
    return TTRPC_OK;
}

/* --- RemoveStaleVirtiofsShareMounts --- */

/* virtiofsd lets go of what is gone on the host's side when it is asked for it. */
static enum ttrpc_status remove_stale_mounts(struct ttrpc_call *call)
{
    struct empty request;
    if (!ttrpc_decode(call, &message_empty, &request))
        return call->failure.status;
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    if (mounts == NULL) {
        failure_errno(&call->failure, "cannot read the mounts");
        return call->failure.status;
    }
    char *line = NULL;
    size_t size = 0;
    struct mountinfo mount;
    struct stat status;
    while (getline(&line, &size, mounts) > 0)
        if (mountinfo_split(line, &mount) && place_is_below(mount.target, SHARED))
            LOG(LOG_DEBUG, SUBSYSTEM, "looked at a shared mount", LOG_STRING("place", mount.target),
                LOG_BOOL("there", lstat(mount.target, &status) == 0));
    free(line);
    fclose(mounts);
    return TTRPC_OK;
}

const struct ttrpc_method_row storage_calls[] = {
    {"UpdateEphemeralMounts", update_ephemeral_mounts},
    {"AddSwap", add_swap},
    {"AddSwapPath", add_swap_path},
    {"GetVolumeStats", get_volume_stats},
    {"RemoveStaleVirtiofsShareMounts", remove_stale_mounts},
    {NULL, NULL},
};
