/* A container's seccomp filter, from the OCI description to a BPF program. */
#ifndef AGENT_SECCOMP_H
#define AGENT_SECCOMP_H

#include "failure.h"
#include "messages.h"

#include <linux/filter.h>

struct seccomp_filter {
    struct sock_filter *rows; /* malloc'ed */
    unsigned short count;
    unsigned int flags; /* of seccomp(2) */
};

/* True and count 0 when the description asks for nothing. */
bool seccomp_compile(const struct oci_seccomp *seccomp, struct seccomp_filter *filter, struct failure *failure);
/* In the process that is to be filtered, after no_new_privs or with CAP_SYS_ADMIN; false and errno. */
bool seccomp_install(const struct seccomp_filter *filter);
void seccomp_reset(struct seccomp_filter *filter);

#endif
