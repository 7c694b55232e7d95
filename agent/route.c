#define _GNU_SOURCE
#include "route.h"

#include "inet.h"
#include "link.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FAMILY_V6 = 1 /* types.IPFamily */ };

/* A route of a request, understood. */
struct parsed {
    int family;
    struct inet destination;
    struct inet gateway;
    struct inet source;
    bool has_gateway;
    bool has_source;
    bool source_selects; /* only packets that come from there take the route */
};

bool route_has_no_ipv6(const char *link)
{
    char path[96];
    char word = '1';
    snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/disable_ipv6", link);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return true; /* a kernel without it, or ipv6.disable=1 */
    bool off = read(file, &word, 1) == 1 && word == '1';
    close(file);
    return off;
}

/* Runtimes of Kata 1.x name no family: the addresses tell. */
static int family_of(const struct route *route)
{
    bool six = route->family == FAMILY_V6 || strchr(route->dest, ':') != NULL ||
               strchr(route->gateway, ':') != NULL || strchr(route->source, ':') != NULL;
    return six ? AF_INET6 : AF_INET;
}

static bool refuse(struct failure *failure, const char *what, const char *text, int family)
{
    return failure_set(failure, TTRPC_INVALID_ARGUMENT, "\"%.100s\" is no %s of an IPv%d route", text, what,
                       family == AF_INET6 ? 6 : 4);
}

static bool parse_destination(const struct route *route, struct parsed *parsed, struct failure *failure)
{
    struct inet everything = {.family = parsed->family, .size = parsed->family == AF_INET6 ? 16 : 4};
    parsed->destination = everything;
    if (route->dest[0] == '\0')
        return true;
    if (inet_parse_network(route->dest, &parsed->destination) && parsed->destination.family == parsed->family)
        return true;
    return refuse(failure, "destination", route->dest, parsed->family);
}

/* With a prefix length it selects by source, which the kernel can for IPv6 only; for IPv4 it would say nothing and
 * ignore it. Without one it is the address that packets leave with. */
static bool parse_source(const struct route *route, struct parsed *parsed, struct failure *failure)
{
    parsed->has_source = route->source[0] != '\0';
    if (!parsed->has_source)
        return true;
    if (!inet_parse_network(route->source, &parsed->source) || parsed->source.family != parsed->family)
        return refuse(failure, "source", route->source, parsed->family);
    parsed->source_selects = strchr(route->source, '/') != NULL && parsed->source.prefix > 0;
    if (parsed->source_selects && parsed->family == AF_INET) {
        if (parsed->source.prefix < 32)
            return refuse(failure, "source", route->source, parsed->family);
        parsed->source_selects = false;
    }
    return true;
}

static bool parse(const struct route *route, struct parsed *parsed, struct failure *failure)
{
    *parsed = (struct parsed){.family = family_of(route), .has_gateway = route->gateway[0] != '\0'};
    if (route->scope > UINT8_MAX)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%u is no scope of a route", route->scope);
    if (parsed->has_gateway &&
        (!inet_parse(route->gateway, &parsed->gateway) || parsed->gateway.family != parsed->family))
        return refuse(failure, "gateway", route->gateway, parsed->family);
    return parse_destination(route, parsed, failure) && parse_source(route, parsed, failure);
}

bool route_check(const struct route *route, struct failure *failure)
{
    struct parsed parsed;
    return parse(route, &parsed, failure);
}

static void put_inet(struct netlink_request *request, uint16_t type, const struct inet *inet)
{
    netlink_put(request, type, inet->bytes, inet->size);
}

static void build(struct netlink_request *request, const struct route *route, const struct parsed *parsed, int link)
{
    const struct rtmsg message = {
        .rtm_family = (uint8_t)parsed->family,
        .rtm_dst_len = parsed->destination.prefix,
        .rtm_src_len = parsed->source_selects ? parsed->source.prefix : 0,
        .rtm_table = RT_TABLE_MAIN,
        .rtm_protocol = RTPROT_BOOT,
        .rtm_scope = (uint8_t)route->scope,
        .rtm_type = RTN_UNICAST,
        .rtm_flags = route->flags,
    };
    netlink_begin(request, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &message, sizeof message);
    if (parsed->destination.prefix > 0)
        put_inet(request, RTA_DST, &parsed->destination);
    if (parsed->has_gateway)
        put_inet(request, RTA_GATEWAY, &parsed->gateway);
    if (parsed->has_source)
        put_inet(request, parsed->source_selects ? RTA_SRC : RTA_PREFSRC, &parsed->source);
    netlink_put_u32(request, RTA_OIF, (uint32_t)link);
    if (route->mtu != 0) {
        size_t metrics = netlink_nest(request, RTA_METRICS);
        netlink_put_u32(request, RTAX_MTU, route->mtu);
        netlink_end(request, metrics);
    }
}

bool route_set(struct netlink *netlink, const struct route *route, struct failure *failure)
{
    struct parsed parsed;
    struct netlink_request request;
    struct link link;
    if (!parse(route, &parsed, failure))
        return false;
    if (parsed.family == AF_INET6 && route_has_no_ipv6("all"))
        return true;
    int problem = link_find(netlink, route->device, &link);
    if (problem == ENODEV)
        return failure_set(failure, TTRPC_INTERNAL, "Link not found (Name: %.100s)", route->device);
    if (problem == 0) {
        build(&request, route, &parsed, link.index);
        problem = netlink_call(netlink, &request, NULL, NULL);
    }
    if (problem == 0 || problem == EEXIST)
        return true;
    return netlink_explain(netlink, problem, failure, "cannot set the route to %.43s by %.39s on %.16s",
                           route->dest[0] != '\0' ? route->dest : "everywhere",
                           parsed.has_gateway ? route->gateway : "no gateway", route->device);
}

/* --- the list --- */

/* A route of the kernel's. */
struct known {
    struct known *next;
    struct rtmsg message;
    struct inet destination;
    struct inet gateway;
    struct inet source;
    struct inet preferred;
    bool has_destination;
    bool has_gateway;
    bool has_source;
    bool has_preferred;
    uint32_t table;
    uint32_t link;
    uint32_t mtu;
};

struct reading {
    struct arena *arena;
    struct known *first;
    struct known **last;
};

static uint32_t take_mtu(struct span metrics)
{
    uint16_t type;
    struct span value;
    while (netlink_next(&metrics, &type, &value))
        if (type == RTAX_MTU)
            return netlink_u32(value);
    return 0;
}

static void take_attribute(struct known *route, uint16_t type, struct span value)
{
    const struct rtmsg *message = &route->message;
    unsigned whole = message->rtm_family == AF_INET6 ? 128 : 32;
    const uint8_t *at = value.data;
    switch (type) {
    case RTA_DST:
        route->has_destination =
            inet_take(message->rtm_family, at, value.size, message->rtm_dst_len, &route->destination);
        break;
    case RTA_SRC:
        route->has_source = inet_take(message->rtm_family, at, value.size, message->rtm_src_len, &route->source);
        break;
    case RTA_PREFSRC:
        route->has_preferred = inet_take(message->rtm_family, at, value.size, whole, &route->preferred);
        break;
    case RTA_GATEWAY:
        route->has_gateway = inet_take(message->rtm_family, at, value.size, whole, &route->gateway);
        break;
    case RTA_OIF:
        route->link = netlink_u32(value);
        break;
    case RTA_TABLE:
        route->table = netlink_u32(value);
        break;
    case RTA_METRICS:
        route->mtu = take_mtu(value);
        break;
    default:
        break;
    }
}

static bool read_route(void *context, uint16_t type, struct span body)
{
    struct reading *reading = context;
    struct known found = {0};
    struct span attributes;
    const void *at = netlink_body(body, sizeof found.message, &attributes);
    if (type != RTM_NEWROUTE || at == NULL)
        return true;
    memcpy(&found.message, at, sizeof found.message);
    found.table = found.message.rtm_table;
    uint16_t kind;
    struct span value;
    while (netlink_next(&attributes, &kind, &value))
        take_attribute(&found, kind, value);
    if (found.table != RT_TABLE_MAIN || (found.message.rtm_flags & RTM_F_CLONED) != 0)
        return true;
    if (!found.has_destination && found.message.rtm_dst_len != 0)
        return true;
    struct known *route = arena_take(reading->arena, sizeof *route);
    if (route == NULL)
        return false;
    *route = found;
    *reading->last = route;
    reading->last = &route->next;
    return true;
}

static int read_routes(struct netlink *netlink, int family, struct reading *reading)
{
    enum { WHOLE_TRIES = 5 };
    struct known **before = reading->last;
    struct netlink_request request;
    const struct rtmsg message = {.rtm_family = (uint8_t)family};
    int problem = EAGAIN;
    for (int i = 0; i < WHOLE_TRIES && problem == EAGAIN; i++) {
        *before = NULL;
        reading->last = before;
        netlink_begin(&request, RTM_GETROUTE, NLM_F_DUMP, &message, sizeof message);
        problem = netlink_call(netlink, &request, read_route, reading);
    }
    return problem;
}

static const char *name_of(const struct link *links, uint32_t index)
{
    for (const struct link *link = links; link != NULL; link = link->next)
        if ((uint32_t)link->index == index)
            return wire_is_utf8((struct span){(const uint8_t *)link->name, strlen(link->name)}) ? link->name : "?";
    return "";
}

/* How Kata's agent writes a route to everywhere. */
static const char *everywhere(int family)
{
    return family == AF_INET6 ? "::1" : "0.0.0.0";
}

static void put_route(struct buffer *out, const struct known *known, const struct link *links)
{
    struct buffer route = {0};
    char text[INET_TEXT];
    if (known->has_destination)
        inet_print_network(&known->destination, text);
    wire_put_text(&route, 1, known->has_destination ? text : everywhere(known->message.rtm_family));
    if (known->has_gateway) {
        inet_print(&known->gateway, text);
        wire_put_text(&route, 2, text);
    }
    wire_put_text(&route, 3, name_of(links, known->link));
    if (known->has_source) {
        inet_print_network(&known->source, text);
        wire_put_text(&route, 4, text);
    } else if (known->has_preferred) {
        inet_print(&known->preferred, text);
        wire_put_text(&route, 4, text);
    }
    wire_put_uint(&route, 5, known->message.rtm_scope);
    wire_put_uint(&route, 6, known->message.rtm_family == AF_INET6 ? FAMILY_V6 : 0);
    wire_put_uint(&route, 7, known->message.rtm_flags & RTNH_F_ONLINK);
    wire_put_uint(&route, 8, known->mtu);
    wire_put_message(out, 1, &route);
    buffer_reset(&route);
}

bool route_put_list(struct netlink *netlink, struct arena *arena, struct buffer *out, struct failure *failure)
{
    struct reading reading = {.arena = arena};
    struct link *links = NULL;
    reading.last = &reading.first;
    int problem = link_list(netlink, arena, &links);
    if (problem == 0)
        problem = read_routes(netlink, AF_INET, &reading);
    if (problem == 0 && !route_has_no_ipv6("all"))
        problem = read_routes(netlink, AF_INET6, &reading);
    if (problem != 0)
        return netlink_explain(netlink, problem, failure, "cannot list the routes");
    for (const struct known *known = reading.first; known != NULL; known = known->next)
        put_route(out, known, links);
    return true;
}
