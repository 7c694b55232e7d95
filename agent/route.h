/* Routes of the main table, as requests and the kernel have them. */
#ifndef AGENT_ROUTE_H
#define AGENT_ROUTE_H

#include "arena.h"
#include "buffer.h"
#include "failure.h"
#include "messages.h"
#include "netlink.h"

/* Everything that can be said without the kernel is: INVALID_ARGUMENT. */
bool route_check(const struct route *route, struct failure *failure);
/* Add or replace; one that is there already is no failure. IPv6 where there is none is left out. */
bool route_set(struct netlink *netlink, const struct route *route, struct failure *failure);
/* grpc.Routes, appended to `out`. */
bool route_put_list(struct netlink *netlink, struct arena *arena, struct buffer *out, struct failure *failure);

/* The guest, or one of its links ("all": every one), does without IPv6. */
bool route_has_no_ipv6(const char *link);

#endif
