/* Overlays: the directories of their options are found without following links, and made where they are to be
 * written. */
#ifndef AGENT_OVERLAY_H
#define AGENT_OVERLAY_H

#include "storage_drivers.h"

bool overlay_mount(const struct storage_driver *driver, const struct storage_request *request,
                   struct failure *failure);
/* Remove what was written in a container's own overlay. */
void overlay_clean(const char *owner);

#endif
