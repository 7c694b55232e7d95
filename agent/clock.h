/* The clock that everything which waits goes by. */
#ifndef AGENT_CLOCK_H
#define AGENT_CLOCK_H

#include <stdint.h>

#define CLOCK_NEVER INT64_MAX

/* Milliseconds; monotonic. */
int64_t clock_ms(void);

#endif
