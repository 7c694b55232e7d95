/* Mounts by descriptors, never by paths that may mean something else by then: one is made or copied where nobody sees
 * it, set up, and put upon a descriptor that was looked at. */
#ifndef AGENT_MOUNTFD_H
#define AGENT_MOUNTFD_H

#include "failure.h"
#include "messages.h"

/* What a list of mount options asks for, apart from words for the filesystem. */
struct mountfd_wishes {
    uint64_t set; /* MOUNT_ATTR_… */
    uint64_t clear;
    uint64_t set_below; /* on the mounts below it as well */
    uint64_t propagation; /* MS_PRIVATE, MS_SLAVE, …; 0: as it comes */
    bool propagation_below;
    bool bind;
    bool below; /* rbind */
    bool remount;
};

struct mountfd_wishes mountfd_wishes(const struct texts *options);
/* One word: "rslave", "private", …; false when it is none of them. */
bool mountfd_propagation(const char *word, uint64_t *propagation, bool *below);

/* A copy of what `fd` (O_PATH) is, on its own; -1 and errno. */
int mountfd_copy(int fd, bool below);
/* A new filesystem of that type; options that are no wishes go to it. `what` is for the failure's words. */
int mountfd_new(const char *type, const char *source, const struct texts *options, const char *what,
                struct failure *failure);
/* All but the propagation, which is of use only once it is put somewhere. */
bool mountfd_set(int mount, const struct mountfd_wishes *wishes);
bool mountfd_propagate(int mount, uint64_t propagation, bool below);
bool mountfd_make_readonly(int mount, bool below);
bool mountfd_put(int mount, int target);

#endif
