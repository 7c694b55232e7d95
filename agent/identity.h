/* Who a process is: user, groups, home, limits. Names are those of the container's own files. */
#ifndef AGENT_IDENTITY_H
#define AGENT_IDENTITY_H

#include "failure.h"
#include "messages.h"

#include <sys/types.h>

enum { IDENTITY_GROUPS = 256, IDENTITY_HOME = 256 };

struct identity {
    uid_t uid;
    gid_t gid;
    gid_t groups[IDENTITY_GROUPS];
    size_t group_count;
    char home[IDENTITY_HOME]; /* what /etc/passwd says; "/" of whom it does not know */
};

/* `root`: a descriptor of the container's root. `names` may be NULL, and then `user` says all. */
bool identity_resolve(int root, const struct oci_user *user, const struct string_user *names,
                      struct identity *identity, struct failure *failure);
bool identity_apply(const struct identity *identity);

/* RLIMIT_NOFILE and its like are limits; INVALID_ARGUMENT for a name that is none. */
bool limits_check(const struct oci_process *process, struct failure *failure);
bool limits_apply(const struct oci_process *process);

#endif
