/* The debug console (agent.debug_console, agent.debug_console_vport=) and the log on vsock (agent.log_vport=). */
#ifndef AGENT_DEBUG_H
#define AGENT_DEBUG_H

/* By the kernel's words; nothing without them. */
void debug_begin(void);

#endif
