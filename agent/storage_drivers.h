/* What can be mounted, by the name that a storage has for it. Between storage.c, which keeps account, and the
 * drivers. */
#ifndef AGENT_STORAGE_DRIVERS_H
#define AGENT_STORAGE_DRIVERS_H

#include "failure.h"
#include "messages.h"
#include "mount_options.h"
#include "place.h"

struct storage_request {
    const struct storage *storage;
    const char *owner;
    char place[PLACE_SIZE]; /* the mount point, normal */
    char source[PLACE_SIZE]; /* as mount(2) takes it: a device's node, a tag, … */
};

struct storage_driver {
    const char *name;
    const char *type; /* of the filesystem, unless the storage says; "": it has to say */
    bool mounts; /* rather than only making the directory */
    bool lasts; /* as long as the sandbox, whoever asked for it */
    /* Fill in the source; TTRPC_LATER, and a failure that says what is missing, while the device is not there.
     * NULL: as it is in the storage. */
    enum ttrpc_status (*find)(struct storage_request *request, struct failure *failure);
    /* True: `place` is as it was asked for. */
    bool (*mount)(const struct storage_driver *driver, const struct storage_request *request,
                  struct failure *failure);
    /* After it was unmounted. NULL: nothing is left. */
    void (*clean)(const char *owner);
};

/* Sorted by name; a NULL name ends them. */
extern const struct storage_driver storage_drivers[];
const struct storage_driver *storage_driver(const char *name);
/* What it is mounted on: a directory, or a file where a file is bound. */
bool storage_make_place(const struct storage_request *request, bool *made, struct failure *failure);
/* mount(2) on the place of a request, and what takes further calls: a bind mount's own flags, propagation. */
bool storage_mount_at(const struct storage_request *request, const char *source, const char *type,
                      const struct mount_options *options, struct failure *failure);
/* The storage's options but for those that are meant for the agent. */
bool storage_options(const struct storage *storage, struct mount_options *options, struct failure *failure);

#endif
