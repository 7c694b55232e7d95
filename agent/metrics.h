/* GetMetrics: agent and guest in Prometheus's text format. */
#ifndef AGENT_METRICS_H
#define AGENT_METRICS_H

#include "ttrpc.h"

extern const struct ttrpc_method_row metrics_calls[];

#endif
