/* The directory that the OCI specification calls a container's bundle, for the hooks that look into it. */
#ifndef AGENT_BUNDLE_H
#define AGENT_BUNDLE_H

#include "failure.h"
#include "messages.h"

#define BUNDLE_VERSION "1.0.2" /* of the specification */

enum { BUNDLE_SIZE = 320 }; /* of its path */

void bundle_path(const char *id, char path[BUNDLE_SIZE]);
/* The directory, and in it config.json: what hooks ask for of the description, not all of it. */
bool bundle_make(const char *id, const struct oci_spec *spec, struct failure *failure);
void bundle_remove(const char *id);

#endif
