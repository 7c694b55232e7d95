/* What the methods may know of the process they run in. */
#ifndef AGENT_SERVICES_H
#define AGENT_SERVICES_H

#include <stdbool.h>

void services_set_init(bool init);

#endif
