/* A container's root: its mounts put together in a mount namespace of its own, and the step into it. */
#ifndef AGENT_ROOTFS_H
#define AGENT_ROOTFS_H

#include "failure.h"
#include "messages.h"

/* In a new mount namespace: everything on its place upon the container's root, which covers "/" of the namespace; but
 * this process still stands in the guest's. `devices` are to be made in /dev. A descriptor of the new root, or -1. */
int rootfs_build(const struct oci_spec *spec, const struct oci_device *devices, size_t count,
                 struct failure *failure);
/* The guest's tree is gone for this process and for all that come to this namespace. */
bool rootfs_enter(int root, const struct oci_spec *spec, struct failure *failure);

#endif
