#define _GNU_SOURCE
#include "storage.h"

#include "clock.h"
#include "hotplug.h"
#include "log.h"
#include "place.h"
#include "storage_drivers.h"
#include "volume.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#define SUBSYSTEM "storage"

enum { AGAIN_MS = 200 }; /* uevents may be lost */

struct owner {
    struct owner *next;
    bool fresh; /* since a storage_mount that has not come to its end */
    char id[];
};

/* A place where something is. */
struct held {
    struct held *next; /* the older one */
    const struct storage_driver *driver;
    char *place;
    char *source; /* as the storage has it */
    bool made; /* the directory is new */
    bool mounted;
    struct volume_gift gift;
    struct owner *owners;
};

static struct held *all; /* newest first, so that what was mounted on top of others goes before them */

static struct held *find(const char *place)
{
    for (struct held *held = all; held != NULL; held = held->next)
        if (strcmp(held->place, place) == 0)
            return held;
    return NULL;
}

/* --- owners --- */

static struct owner **find_owner(struct held *held, const char *id)
{
    struct owner **at = &held->owners;
    while (*at != NULL && strcmp((*at)->id, id) != 0)
        at = &(*at)->next;
    return at;
}

static bool add_owner(struct held *held, const char *id, struct failure *failure)
{
    struct owner **at = find_owner(held, id);
    if (*at != NULL)
        return true;
    struct owner *owner = malloc(sizeof *owner + strlen(id) + 1);
    if (owner == NULL)
        return failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "no memory for a storage");
    *owner = (struct owner){.next = NULL, .fresh = true};
    memcpy(owner->id, id, strlen(id) + 1);
    *at = owner;
    return true;
}

static void drop_owner(struct owner **at)
{
    struct owner *owner = *at;
    *at = owner->next;
    free(owner);
}

/* --- what is held --- */

static void warn(const char *message, const char *place)
{
    int number = errno;
    LOG(LOG_WARN, SUBSYSTEM, message, LOG_STRING("place", place), LOG_ERRNO(number));
}

static void unmount(const char *parent, const char *place)
{
    if (umount2(parent, UMOUNT_NOFOLLOW) == 0 || errno == EINVAL)
        return;
    /* Busy: somebody still has a file open in it. It goes away for everybody else, and for good with the last
     * file. */
    if (umount2(parent, UMOUNT_NOFOLLOW | MNT_DETACH) != 0)
        warn("cannot unmount", place);
}

static void leave(const struct held *held)
{
    const char *name;
    int parent = place_open_parent(held->place, &name);
    if (parent < 0) {
        warn("cannot find what is to be unmounted", held->place);
        return;
    }
    char path[sizeof(struct place_name) + PLACE_SIZE];
    snprintf(path, sizeof path, "%s/%s", place_name(parent).text, name);
    if (held->mounted)
        unmount(path, held->place);
    if (held->made && unlinkat(parent, name, AT_REMOVEDIR) != 0 && errno != ENOTEMPTY)
        warn("cannot remove a mount point", held->place);
    close(parent);
}

static void free_held(struct held *held)
{
    while (held->owners != NULL)
        drop_owner(&held->owners);
    free(held->place);
    free(held->source);
    free(held);
}

static void drop_held(struct held **at, const char *last_owner)
{
    struct held *held = *at;
    *at = held->next;
    volume_forget(&held->gift);
    leave(held);
    if (held->driver->clean != NULL)
        held->driver->clean(last_owner);
    free_held(held);
}

/* Take `id` off all that it owns, or off what it has owned only since the call that is failing. */
static void release(const char *id, bool only_fresh)
{
    for (struct held **at = &all; *at != NULL;) {
        struct owner **owner = find_owner(*at, id);
        if (*owner != NULL && ((*owner)->fresh || !only_fresh))
            drop_owner(owner);
        if ((*at)->owners == NULL)
            drop_held(at, id);
        else
            at = &(*at)->next;
    }
}

/* --- mounting --- */

static const char *owner_of(const struct storage_request *request, const struct storage_driver *driver)
{
    return driver->lasts ? "" : request->owner;
}

static struct held *hold(const struct storage_request *request, const struct storage_driver *driver, bool made,
                         struct failure *failure)
{
    struct held *held = calloc(1, sizeof *held);
    if (held != NULL) {
        *held = (struct held){.driver = driver, .made = made, .place = strdup(request->place),
                              .source = strdup(request->storage->source)};
        if (held->place != NULL && held->source != NULL && add_owner(held, owner_of(request, driver), failure)) {
            held->next = all;
            all = held;
            return held;
        }
        free_held(held);
    }
    failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "no memory for a storage");
    return NULL;
}

static bool forbidden(const char *place)
{
    return strcmp(place, "/") == 0 || place_is_below(place, "/proc") || place_is_below(place, "/sys") ||
           place_is_below(place, "/dev") || strcmp(place, "/run") == 0;
}

/* What can be told without touching anything. */
static const struct storage_driver *understand(const struct storage *storage, const char *owner,
                                               struct storage_request *request, struct failure *failure)
{
    const struct storage_driver *driver = storage_driver(storage->driver);
    if (driver == NULL) {
        failure_set(failure, TTRPC_UNIMPLEMENTED, "no storage driver %.100s", storage->driver);
        return NULL;
    }
    request->storage = storage;
    request->owner = owner;
    if (!place_normalize(storage->mount_point, "the mount point", request->place, failure))
        return NULL;
    if (forbidden(request->place)) {
        failure_set(failure, TTRPC_INVALID_ARGUMENT, "nothing is mounted on %.100s", request->place);
        return NULL;
    }
    if (strlen(storage->source) >= sizeof request->source) {
        failure_set(failure, TTRPC_INVALID_ARGUMENT, "the source of a storage is too long");
        return NULL;
    }
    strcpy(request->source, storage->source);
    return driver;
}

static bool same(const struct held *held, const struct storage *storage)
{
    return strcmp(held->driver->name, storage->driver) == 0 && strcmp(held->source, storage->source) == 0;
}

static bool join(struct held *held, const struct storage_request *request, struct failure *failure)
{
    if (!same(held, request->storage))
        return failure_set(failure, TTRPC_ALREADY_EXISTS, "%.100s is taken by another storage", held->place);
    return add_owner(held, owner_of(request, held->driver), failure);
}

static void log_mounted(const struct storage_request *request)
{
    LOG(LOG_INFO, SUBSYSTEM, "storage mounted", LOG_STRING("driver", request->storage->driver),
        LOG_STRING("source", request->source), LOG_STRING("place", request->place));
}

static bool mount_new(const struct storage_driver *driver, const struct storage_request *request,
                      struct failure *failure)
{
    bool made;
    if (!storage_make_place(request, &made, failure))
        return false;
    struct held *held = hold(request, driver, made, failure);
    if (held == NULL || !driver->mount(driver, request, failure))
        return false;
    held->mounted = driver->mounts;
    log_mounted(request);
    return request->storage->fs_group == NULL || volume_give(&held->gift, request->place, request->storage, failure);
}

/* One storage: found or waited for. */
static enum ttrpc_status look_for(const struct storage *storage, const char *owner, struct storage_request *request,
                                  struct failure *failure)
{
    const struct storage_driver *driver = understand(storage, owner, request, failure);
    if (driver == NULL)
        return failure->status;
    if (driver->find == NULL || find(request->place) != NULL)
        return TTRPC_OK;
    return driver->find(request, failure);
}

static enum ttrpc_status mount_one(const struct storage *storage, const char *owner, struct failure *failure)
{
    struct storage_request request;
    enum ttrpc_status status = look_for(storage, owner, &request, failure);
    if (status != TTRPC_OK)
        return status;
    struct held *held = find(request.place);
    bool done = held != NULL ? join(held, &request, failure)
                             : mount_new(storage_driver(storage->driver), &request, failure);
    return done ? TTRPC_OK : failure->status;
}

/* Has everybody got what he was given. */
static enum ttrpc_status settle(const char *owner, struct failure *failure)
{
    for (struct held *held = all; held != NULL; held = held->next) {
        bool fresh = false;
        for (struct owner *at = held->owners; at != NULL; at = at->next)
            fresh |= at->fresh && (strcmp(at->id, owner) == 0 || held->driver->lasts);
        enum ttrpc_status status = fresh ? volume_given(&held->gift, held->place, failure) : TTRPC_OK;
        if (status != TTRPC_OK)
            return status;
    }
    return TTRPC_OK;
}

static void settled(const char *owner)
{
    for (struct held *held = all; held != NULL; held = held->next) {
        struct owner *found = *find_owner(held, held->driver->lasts ? "" : owner);
        if (found != NULL)
            found->fresh = false;
    }
}

static void undo(const char *owner)
{
    release(owner, true);
    if (*owner != '\0')
        release("", true);
}

enum ttrpc_status storage_mount(const struct storage *storages, size_t count, const char *owner,
                                struct failure *failure)
{
    struct storage_request request;
    enum ttrpc_status status = TTRPC_OK;
    for (size_t i = 0; i < count && status == TTRPC_OK; i++)
        status = look_for(&storages[i], owner, &request, failure);
    if (status != TTRPC_OK)
        return status;
    for (size_t i = 0; i < count && status == TTRPC_OK; i++)
        status = mount_one(&storages[i], owner, failure);
    if (status == TTRPC_OK)
        status = settle(owner, failure);
    if (status == TTRPC_OK)
        settled(owner);
    else if (status != TTRPC_LATER || failure->status != TTRPC_OK) /* what only takes its time stays */
        undo(owner);
    return status;
}

void storage_release(const char *owner)
{
    release(owner, false);
    /* With the sandbox goes what was mounted for containers that never came to be: whoever asked hung up. */
    while (*owner == '\0' && all != NULL)
        drop_held(&all, all->owners->id);
}

bool storage_holds(const char *place, const char *driver)
{
    const struct held *held = find(place);
    return held != NULL && strcmp(held->driver->name, driver) == 0;
}

enum ttrpc_status storage_later(struct ttrpc_call *call)
{
    int64_t now = clock_ms();
    if (call->failure.status == TTRPC_OK) /* nothing is missing, it only takes its time */
        return ttrpc_later(call, hotplug_subject, CLOCK_NEVER);
    int64_t until = call->since + hotplug_timeout_ms();
    if (now >= until)
        return call->failure.status;
    return ttrpc_later(call, hotplug_subject, until < now + AGAIN_MS ? until : now + AGAIN_MS);
}
