/* Where in this guest a block device is that a host speaks of by its place on a bus. */
#ifndef AGENT_DEVICE_H
#define AGENT_DEVICE_H

#include "failure.h"

#include <stdbool.h>
#include <sys/types.h>

/* How Kata calls them, sorted. */
#define DEVICE_BLK "blk" /* a PCI path such as 02/01, or a name in /dev */
#define DEVICE_MMIOBLK "mmioblk" /* a name in /dev */
#define DEVICE_NVDIMM "nvdimm" /* /dev/pmem… */
#define DEVICE_SCSI "scsi" /* id:lun */

struct device_node {
    char path[128];
    dev_t number;
};

/* The block device of that kind at that place. TTRPC_LATER, and a failure for those who have waited long enough,
 * while there is none; the buses are told to look. One of the guest's root is refused. */
enum ttrpc_status device_find(const char *kind, const char *where, struct device_node *node, struct failure *failure);
/* The directory in /sys (PLACE_SIZE) of whatever is at a place on PCI; its driver may still be on its way to it. */
enum ttrpc_status device_find_pci(const char *where, char *directory, struct failure *failure);

#endif
