/* A process's terminal, made in the container's own devpts. */
#ifndef AGENT_TERMINAL_H
#define AGENT_TERMINAL_H

#include "failure.h"
#include "messages.h"

struct terminal {
    int master;
    int slave;
};

bool terminal_open(int root, const struct oci_box *size, struct terminal *terminal, struct failure *failure);
/* /dev/console is this terminal. */
bool terminal_be_console(int root, int slave, struct failure *failure);
/* In the leader of a session that has none yet. */
bool terminal_control(int slave);
bool terminal_resize(int master, uint32_t rows, uint32_t columns);

#endif
