/* The numbers of the guest: what its kernel counts, under the names that Kata's agent gives them. */
#ifndef AGENT_METRICS_GUEST_H
#define AGENT_METRICS_GUEST_H

#include "metrics_text.h"

void metrics_put_guest(struct metrics *metrics);

#endif
