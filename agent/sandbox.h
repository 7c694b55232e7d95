/* The sandbox: what all containers of a pod have in common. */
#ifndef AGENT_SANDBOX_H
#define AGENT_SANDBOX_H

#include "ttrpc.h"

#include <sys/types.h>

/* CreateSandbox, DestroySandbox, SetGuestDateTime, ReseedRandomDev. */
extern const struct ttrpc_method_row sandbox_calls[];

enum sandbox_hook { SANDBOX_PRESTART, SANDBOX_POSTSTART, SANDBOX_POSTSTOP };

bool sandbox_is_running(void);
/* The file that keeps the shared "ipc" or "uts" namespace alive; NULL: there is none, or no such kind is shared. */
const char *sandbox_namespace(const char *kind);
/* Containers share one PID namespace: CreateSandbox asked for it. */
bool sandbox_shares_pids(void);
/* Run the guest's own hooks of that kind (found when the sandbox was made), with `state`, the OCI state as JSON, on their
 * standard input. What fails is logged. */
void sandbox_run_hooks(enum sandbox_hook hook, const char *state);

#endif
