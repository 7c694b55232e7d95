/* What is plugged in while the guest runs: the kernel's uevents, processors and memory. */
#ifndef AGENT_HOTPLUG_H
#define AGENT_HOTPLUG_H

#include "ttrpc.h"

/* OnlineCPUMem, MemHotplugByProbe. */
extern const struct ttrpc_method_row hotplug_calls[];

/* Hear the kernel's uevents; hot-added memory comes online by itself. Each batch of uevents wakes hotplug_subject and
 * calls `changed`, which may be NULL. */
void hotplug_begin(void (*changed)(void));
/* Calls that wait for a device wait for this: `return ttrpc_later(call, hotplug_subject, deadline)`. */
extern const void *const hotplug_subject;
/* How long a device that was announced may take to come: agent.hotplug_timeout, 3 s unless the kernel's words say
 * otherwise. Milliseconds. */
int64_t hotplug_timeout_ms(void);

#endif
