/* A container's /dev: the nodes and links that every container has, and those of its description. */
#ifndef AGENT_DEVICE_NODES_H
#define AGENT_DEVICE_NODES_H

#include "failure.h"
#include "messages.h"

/* `root`: a descriptor of the container's root, seen from which everything is made. */
bool device_nodes_make(int root, const struct oci_device *devices, size_t count, struct failure *failure);

#endif
