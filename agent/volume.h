/* Giving a volume to a group (Kubernetes' fsGroup), in a process of its own: it may be a million files. */
#ifndef AGENT_VOLUME_H
#define AGENT_VOLUME_H

#include "child.h"
#include "failure.h"
#include "messages.h"

struct volume_gift {
    struct child child;
    bool running;
    int number; /* the error it ended with, as errno has it */
};

/* Begin to give what is mounted at a normal place to storage->fs_group. */
bool volume_give(struct volume_gift *gift, const char *place, const struct storage *storage, struct failure *failure);
/* TTRPC_LATER while it goes on: hotplug_subject is woken at the end. */
enum ttrpc_status volume_given(const struct volume_gift *gift, const char *place, struct failure *failure);
/* Stop it. */
void volume_forget(struct volume_gift *gift);
/* Give one directory to a group, and what will be made in it; a mode of -1 stays as it is. */
bool volume_give_directory(const char *place, long mode, long group, struct failure *failure);

#endif
