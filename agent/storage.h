/* Storages and devices: what a request names is found in the guest, waited for, and mounted. */
#ifndef AGENT_STORAGE_H
#define AGENT_STORAGE_H

#include "ttrpc.h"

#include <sys/types.h>

/* UpdateEphemeralMounts, AddSwap, AddSwapPath, GetVolumeStats, RemoveStaleVirtiofsShareMounts. */
extern const struct ttrpc_method_row storage_calls[];

/* Sorted; NULL ends them. */
extern const char *const storage_handlers[];
extern const char *const storage_device_handlers[];

/* Mount `count` storages for `owner`, a container's id, or "" for the sandbox. TTRPC_OK: all are; TTRPC_LATER: a
 * device is not there yet, or a volume is still being given to its group: `return storage_later(call)`, and the
 * same again at the next try; else the failure, and none of this call's is mounted. May be called again: a mount
 * point that is mounted already gets one more owner. "ephemeral" and "local" storages belong to the sandbox,
 * whoever asked for them: what a container leaves in them is there for the next. */
enum ttrpc_status storage_mount(const struct storage *storages, size_t count, const char *owner,
                                struct failure *failure);
/* What only this owner used is unmounted; at the end of the sandbox, everything. */
void storage_release(const char *owner);
/* Something of that driver is mounted there. */
bool storage_holds(const char *place, const char *driver);

/* The device node that a device of a request is in this guest, and its number: as storage_mount for the waiting.
 * The root's devices are refused. */
enum ttrpc_status storage_find_device(const struct device *device, char *node, size_t size, dev_t *number,
                                      bool *is_block, struct failure *failure);
/* What a method returns that got TTRPC_LATER from storage_mount or storage_find_device with &call->failure: later,
 * until the time that a device may take to come is over; then the failure, which names what did not come. */
enum ttrpc_status storage_later(struct ttrpc_call *call);
/* The block devices that hold the guest's own root (CVE-2026-24834): the root's, its partitions' parent, what lies
 * below a dm device. At most `room` numbers; how many there are. No container may ever reach them. */
size_t storage_root_devices(dev_t *numbers, size_t room);

#endif
