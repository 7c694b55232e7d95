/* Mount options as fstab has them: names that are flags, and the rest, which is the filesystem's own. */
#ifndef AGENT_MOUNT_OPTIONS_H
#define AGENT_MOUNT_OPTIONS_H

#include "failure.h"
#include "messages.h"

struct mount_options {
    unsigned long flags; /* MS_… */
    unsigned long propagation; /* MS_SHARED, MS_SLAVE, … and perhaps MS_REC; 0: as it is */
    char data[4096]; /* what the kernel takes at most: a page */
};

/* Add one option, which may be several with commas between them. */
bool mount_options_add(struct mount_options *options, const char *words, struct failure *failure);
/* Add text to the data as it is. */
bool mount_options_add_data(struct mount_options *options, const char *text, struct failure *failure);

#endif
