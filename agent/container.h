/* Containers and their processes, by the calls of grpc.AgentService. */
#ifndef AGENT_CONTAINER_H
#define AGENT_CONTAINER_H

#include "ttrpc.h"

/* CreateContainer, StartContainer, ExecProcess, SignalProcess, WaitProcess, ReadStdout, ReadStderr, WriteStdin,
 * CloseStdin, TtyWinResize, StatsContainer, UpdateContainer, PauseContainer, ResumeContainer, RemoveContainer, GetOOMEvent. */
extern const struct ttrpc_method_row container_calls[];

bool container_supports_seccomp(void);
/* There is one at least. */
bool container_any(void);
/* Kill and remove all containers, without waiting for anybody: DestroySandbox. */
void container_destroy_all(void);

#endif
