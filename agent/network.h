/* Interfaces, routes and neighbours, by rtnetlink; for IPv4 and IPv6. */
#ifndef AGENT_NETWORK_H
#define AGENT_NETWORK_H

#include "ttrpc.h"

/* UpdateInterface, UpdateRoutes, ListInterfaces, ListRoutes, AddARPNeighbors. */
extern const struct ttrpc_method_row network_calls[];

#endif
