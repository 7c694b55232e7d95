#define _GNU_SOURCE
#include "network.h"

#include "device.h"
#include "inet.h"
#include "link.h"
#include "place.h"
#include "route.h"
#include "storage.h"
#include "wire.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/neighbour.h>

#define LINKS "/sys/class/net/"

enum {
    FAMILY_V4 = 0, /* types.IPFamily */
    FAMILY_V6 = 1,
    /* The loop stands still meanwhile: some 0.2 s for as many as this. */
    MOST_ROUTES = 10000,
    MOST_NEIGHBORS = 10000,
    MOST_ADDRESSES = 1000,
};

static bool too_many(struct ttrpc_call *call, size_t count, size_t most, const char *what)
{
    return count > most &&
           !failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "%zu %s in one request; %zu may be", count, what, most);
}

/* A method with a socket of its own: what one leaves behind no other one finds. */
static enum ttrpc_status converse(struct ttrpc_call *call, const void *request,
                                  bool (*talk)(struct netlink *netlink, struct ttrpc_call *call, const void *request))
{
    struct netlink netlink;
    if (!netlink_open(&netlink)) {
        failure_errno(&call->failure, "cannot talk to the kernel's network");
        return call->failure.status;
    }
    bool good = talk(&netlink, call, request);
    netlink_close(&netlink);
    return good ? TTRPC_OK : call->failure.status;
}

/* --- UpdateInterface --- */

/* An interface of a request, understood. */
struct wanted {
    const struct interface *interface;
    bool has_mac;
    uint8_t mac[INET_MAC];
    struct inet *addresses;
    char plugged[IF_NAMESIZE]; /* the link of the PCI device that is named; "": none is */
};

static bool parse_addresses(struct ttrpc_call *call, struct wanted *wanted)
{
    size_t count = wanted->interface->addresses.count;
    if (too_many(call, count, MOST_ADDRESSES, "addresses"))
        return false;
    wanted->addresses = arena_take(&call->arena, count * sizeof *wanted->addresses + 1);
    if (wanted->addresses == NULL)
        return failure_set(&call->failure, TTRPC_RESOURCE_EXHAUSTED, "too many addresses");
    for (size_t i = 0; i < count; i++) {
        const struct ip_address *address = &wanted->interface->addresses.items[i];
        if (!inet_parse(address->address, &wanted->addresses[i]))
            return failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "\"%.100s\" is no IP address",
                               address->address);
        if (!inet_parse_mask(address->mask, &wanted->addresses[i]))
            return failure_set(&call->failure, TTRPC_INVALID_ARGUMENT,
                               "\"%.100s\" is no prefix length of the address %.100s", address->mask,
                               address->address);
    }
    return true;
}

static bool parse_interface(struct ttrpc_call *call, struct wanted *wanted)
{
    const struct interface *interface = wanted->interface;
    if (!link_can_be_named(interface->name))
        return failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "\"%.100s\" cannot be the name of an interface",
                           interface->name);
    if (interface->mtu == 0 || interface->mtu > INT32_MAX)
        return failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "%llu is no MTU of an interface",
                           (unsigned long long)interface->mtu);
    wanted->has_mac = interface->hw_addr[0] != '\0';
    if (wanted->has_mac && !inet_parse_mac(interface->hw_addr, wanted->mac))
        return failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "\"%.100s\" is no hardware address",
                           interface->hw_addr);
    return parse_addresses(call, wanted);
}

/* The link whose device lies in that directory of /sys. */
static bool find_plugged(const char *directory, char name[IF_NAMESIZE])
{
    DIR *links = opendir(LINKS);
    bool found = false;
    if (links == NULL)
        return false;
    for (const struct dirent *entry; !found && (entry = readdir(links)) != NULL;) {
        char path[sizeof LINKS + sizeof entry->d_name];
        snprintf(path, sizeof path, LINKS "%s", entry->d_name);
        char *real = realpath(path, NULL);
        found = real != NULL && strlen(entry->d_name) < IF_NAMESIZE && place_is_below(real, directory) &&
                entry->d_name[0] != '.';
        if (found)
            snprintf(name, IF_NAMESIZE, "%.*s", IF_NAMESIZE - 1, entry->d_name);
        free(real);
    }
    closedir(links);
    return found;
}

static enum ttrpc_status wait_for_device(struct ttrpc_call *call, struct wanted *wanted)
{
    char directory[PLACE_SIZE];
    const char *path = wanted->interface->device_path;
    if (path[0] == '\0')
        return TTRPC_OK;
    enum ttrpc_status status = device_find_pci(path, directory, &call->failure);
    if (status == TTRPC_OK && !find_plugged(directory, wanted->plugged)) {
        failure_set(&call->failure, TTRPC_INTERNAL, "waited in vain for a network device on PCI at %.100s", path);
        status = TTRPC_LATER;
    }
    return status == TTRPC_LATER ? storage_later(call) : status;
}

static bool find_wanted(struct netlink *netlink, struct ttrpc_call *call, const struct wanted *wanted,
                        struct link *link)
{
    const char *name = wanted->interface->name;
    int problem = ENODEV;
    if (wanted->has_mac)
        problem = link_find_mac(netlink, wanted->mac, &call->arena, link);
    if (problem == ENODEV && wanted->plugged[0] != '\0')
        problem = link_find(netlink, wanted->plugged, link);
    if (problem == ENODEV)
        problem = link_find(netlink, name, link);
    if (problem == 0)
        return true;
    if (problem != ENODEV)
        return netlink_explain(netlink, problem, &call->failure, "cannot look for interface %s", name);
    /* Kata's runtime tries again when it reads the first three words: a device may be on its way. */
    return failure_set(&call->failure, TTRPC_INTERNAL, "Link not found (Address: %.20s, Name: %s)",
                       wanted->interface->hw_addr, name);
}

static bool replace_addresses(struct netlink *netlink, struct ttrpc_call *call, const struct wanted *wanted,
                              const struct link *link)
{
    struct link_address *old;
    char text[INET_TEXT];
    int problem = link_list_addresses(netlink, link->index, &call->arena, &old);
    if (problem != 0)
        return netlink_explain(netlink, problem, &call->failure, "cannot list the addresses of %s", link->name);
    for (; old != NULL; old = old->next) {
        problem = link_delete_address(netlink, old);
        inet_print_network(&old->inet, text);
        if (problem != 0)
            return netlink_explain(netlink, problem, &call->failure, "cannot take %s from %s", text, link->name);
    }
    bool no_ipv6 = route_has_no_ipv6("all") || route_has_no_ipv6(link->name);
    for (size_t i = 0; i < wanted->interface->addresses.count; i++) {
        const struct inet *inet = &wanted->addresses[i];
        if (inet->family == AF_INET6 && no_ipv6)
            continue;
        problem = link_add_address(netlink, link->index, inet);
        inet_print_network(inet, text);
        if (problem != 0)
            return netlink_explain(netlink, problem, &call->failure, "cannot give %s to %s", text, link->name);
    }
    return true;
}

/* Kernels before 6.2 rename only what is down. */
static int rename_link(struct netlink *netlink, const struct link *link, const char *name)
{
    const struct link_change change = {.name = name};
    int problem = link_change(netlink, link->index, &change);
    if (problem != EBUSY)
        return problem;
    const struct link_change down = {.name = name, .change = IFF_UP};
    const struct link_change up = {.flags = IFF_UP, .change = IFF_UP};
    problem = link_change(netlink, link->index, &(struct link_change){.change = IFF_UP});
    if (problem == 0)
        problem = link_change(netlink, link->index, &down);
    link_change(netlink, link->index, &up);
    return problem;
}

/* Out of the way of a link that is to have its name, until that one's own is free. */
static bool step_aside(struct netlink *netlink, struct ttrpc_call *call, const struct link *other)
{
    enum { KEPT = IF_NAMESIZE - 1 - 5 /* "_temp" */ };
    char name[IF_NAMESIZE];
    snprintf(name, sizeof name, "%.*s_temp", KEPT, other->name);
    int problem = rename_link(netlink, other, name);
    return problem == 0 ||
           netlink_explain(netlink, problem, &call->failure, "cannot rename %s to %s", other->name, name);
}

static bool apply(struct netlink *netlink, struct ttrpc_call *call, const struct wanted *wanted,
                  const struct link *link)
{
    const struct interface *interface = wanted->interface;
    struct link_change change = {
        .mtu = (uint32_t)interface->mtu,
        .flags = IFF_UP | (interface->raw_flags & IFF_NOARP),
        .change = IFF_UP | IFF_NOARP,
    };
    if (strcmp(link->name, interface->name) != 0)
        change.name = interface->name;
    if (wanted->has_mac && !(link->has_mac && memcmp(link->mac, wanted->mac, INET_MAC) == 0))
        change.mac = wanted->mac;
    int problem = link_change(netlink, link->index, &change);
    return problem == 0 || netlink_explain(netlink, problem, &call->failure, "cannot set up %s as %s", link->name,
                                           interface->name);
}

static bool update_link(struct netlink *netlink, struct ttrpc_call *call, const struct wanted *wanted,
                        const struct link *link)
{
    const struct link_change down = {.change = IFF_UP};
    int problem = (link->flags & IFF_UP) != 0 ? link_change(netlink, link->index, &down) : 0;
    if (problem != 0)
        return netlink_explain(netlink, problem, &call->failure, "cannot take down %s", link->name);
    if (!replace_addresses(netlink, call, wanted, link))
        return false;
    struct link other = {0};
    if (strcmp(link->name, wanted->interface->name) != 0)
        problem = link_find(netlink, wanted->interface->name, &other);
    if (problem != 0 && problem != ENODEV)
        return netlink_explain(netlink, problem, &call->failure, "cannot look for %s", wanted->interface->name);
    if (other.index == 0)
        return apply(netlink, call, wanted, link);
    if (!step_aside(netlink, call, &other))
        return false;
    bool good = apply(netlink, call, wanted, link);
    const char *free_name = good ? link->name : other.name;
    problem = rename_link(netlink, &other, free_name);
    if (good && problem != 0)
        return netlink_explain(netlink, problem, &call->failure, "cannot rename %s to %s", other.name, free_name);
    return good;
}

static bool talk_interface(struct netlink *netlink, struct ttrpc_call *call, const void *request)
{
    const struct wanted *wanted = request;
    struct link link;
    return find_wanted(netlink, call, wanted, &link) && update_link(netlink, call, wanted, &link);
}

/* The answer is the interface of the request. One that came in two parts is, as a message, both behind each other. */
static void repeat_interface(struct ttrpc_call *call)
{
    struct wire_reader reader = wire_read(call->request);
    struct wire_field field;
    while (wire_next(&reader, &field))
        if (field.tag == WIRE_TAG(1, WIRE_BYTES))
            buffer_append(&call->reply, field.bytes.data, field.bytes.size);
}

static enum ttrpc_status update_interface(struct ttrpc_call *call)
{
    struct update_interface_request request;
    if (!ttrpc_decode(call, &message_update_interface_request, &request))
        return call->failure.status;
    struct wanted wanted = {.interface = request.interface};
    if (wanted.interface == NULL) {
        failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "there is no interface in the request");
        return call->failure.status;
    }
    if (!parse_interface(call, &wanted))
        return call->failure.status;
    enum ttrpc_status status = wait_for_device(call, &wanted);
    if (status == TTRPC_OK)
        status = converse(call, &wanted, talk_interface);
    if (status == TTRPC_OK)
        repeat_interface(call);
    return status;
}

/* --- ListInterfaces --- */

static void put_address(struct buffer *out, const struct inet *inet)
{
    struct buffer message = {0};
    char text[INET_TEXT];
    char mask[8];
    inet_print(inet, text);
    snprintf(mask, sizeof mask, "%u", inet->prefix);
    wire_put_uint(&message, 1, inet->family == AF_INET6 ? FAMILY_V6 : FAMILY_V4);
    wire_put_text(&message, 2, text);
    wire_put_text(&message, 3, mask);
    wire_put_message(out, 3, &message);
    buffer_reset(&message);
}

/* The kernel takes names that are no text, and clients take no answer that holds them. */
static void put_name(struct buffer *out, uint32_t number, const char *name)
{
    bool is_text = wire_is_utf8((struct span){(const uint8_t *)name, strlen(name)});
    wire_put_text(out, number, is_text ? name : "?");
}

static void put_link(struct buffer *out, const struct link *link, const struct link_address *addresses)
{
    struct buffer message = {0};
    char mac[INET_MAC_TEXT];
    put_name(&message, 1, link->name);
    put_name(&message, 2, link->name);
    for (; addresses != NULL; addresses = addresses->next)
        if (addresses->index == link->index)
            put_address(&message, &addresses->inet);
    wire_put_uint(&message, 4, link->mtu);
    inet_print_mac(link->mac, mac);
    wire_put_text(&message, 5, link->has_mac ? mac : "");
    wire_put_text(&message, 7, link->kind);
    wire_put_uint(&message, 8, link->flags & IFF_NOARP);
    wire_put_message(out, 1, &message);
    buffer_reset(&message);
}

static bool talk_list(struct netlink *netlink, struct ttrpc_call *call, const void *request)
{
    struct link *links;
    struct link_address *addresses;
    (void)request;
    int problem = link_list(netlink, &call->arena, &links);
    if (problem == 0)
        problem = link_list_addresses(netlink, 0, &call->arena, &addresses);
    if (problem != 0)
        return netlink_explain(netlink, problem, &call->failure, "cannot list the interfaces");
    for (; links != NULL; links = links->next)
        put_link(&call->reply, links, addresses);
    return true;
}

static enum ttrpc_status list_interfaces(struct ttrpc_call *call)
{
    struct empty request;
    if (!ttrpc_decode(call, &message_empty, &request))
        return call->failure.status;
    return converse(call, NULL, talk_list);
}

/* --- routes --- */

static bool talk_list_routes(struct netlink *netlink, struct ttrpc_call *call, const void *request)
{
    (void)request;
    return route_put_list(netlink, &call->arena, &call->reply, &call->failure);
}

static bool set_routes(struct netlink *netlink, struct ttrpc_call *call, const struct routes *routes, bool by_gateway)
{
    for (size_t i = 0; i < routes->routes.count; i++) {
        const struct route *route = &routes->routes.items[i];
        if ((route->gateway[0] != '\0') == by_gateway && !route_set(netlink, route, &call->failure))
            return false;
    }
    return true;
}

/* A gateway has to be reachable by a route that is there. */
static bool talk_routes(struct netlink *netlink, struct ttrpc_call *call, const void *request)
{
    const struct routes *routes = request;
    return set_routes(netlink, call, routes, false) && set_routes(netlink, call, routes, true) &&
           talk_list_routes(netlink, call, NULL);
}

static enum ttrpc_status update_routes(struct ttrpc_call *call)
{
    struct update_routes_request request;
    if (!ttrpc_decode(call, &message_update_routes_request, &request))
        return call->failure.status;
    if (request.routes == NULL) {
        failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "there are no routes in the request");
        return call->failure.status;
    }
    if (too_many(call, request.routes->routes.count, MOST_ROUTES, "routes"))
        return call->failure.status;
    for (size_t i = 0; i < request.routes->routes.count; i++)
        if (!route_check(&request.routes->routes.items[i], &call->failure))
            return call->failure.status;
    return converse(call, request.routes, talk_routes);
}

static enum ttrpc_status list_routes(struct ttrpc_call *call)
{
    struct empty request;
    if (!ttrpc_decode(call, &message_empty, &request))
        return call->failure.status;
    return converse(call, NULL, talk_list_routes);
}

/* --- AddARPNeighbors --- */

/* A neighbour of a request, understood. */
struct parsed_neighbor {
    struct inet inet;
    bool has_mac;
    uint8_t mac[INET_MAC];
};

static bool parse_neighbor(const struct arp_neighbor *neighbor, struct parsed_neighbor *parsed,
                           struct failure *failure)
{
    const char *address = neighbor->to != NULL ? neighbor->to->address : "";
    parsed->has_mac = neighbor->lladdr[0] != '\0';
    if (!inet_parse(address, &parsed->inet))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "\"%.100s\" is no IP address of a neighbour", address);
    if (parsed->has_mac && !inet_parse_mac(neighbor->lladdr, parsed->mac))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "\"%.100s\" is no hardware address", neighbor->lladdr);
    if (neighbor->state < 0 || neighbor->state > UINT16_MAX || neighbor->flags < 0 || neighbor->flags > UINT8_MAX)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "neighbour %.100s: state %d, flags %d are none", address,
                           neighbor->state, neighbor->flags);
    return true;
}

static bool add_neighbor(struct netlink *netlink, const struct arp_neighbor *neighbor, struct failure *failure)
{
    struct parsed_neighbor parsed;
    struct netlink_request request;
    struct link link;
    if (!parse_neighbor(neighbor, &parsed, failure))
        return false;
    if (parsed.inet.family == AF_INET6 && route_has_no_ipv6("all"))
        return true;
    int problem = link_find(netlink, neighbor->device, &link);
    if (problem == ENODEV)
        return failure_set(failure, TTRPC_INTERNAL, "Link not found (Name: %.100s)", neighbor->device);
    const struct ndmsg message = {
        .ndm_family = (uint8_t)parsed.inet.family,
        .ndm_ifindex = link.index,
        .ndm_state = neighbor->state != 0 ? (uint16_t)neighbor->state : NUD_PERMANENT,
        .ndm_flags = (uint8_t)neighbor->flags,
    };
    netlink_begin(&request, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &message, sizeof message);
    netlink_put(&request, NDA_DST, parsed.inet.bytes, parsed.inet.size);
    if (parsed.has_mac)
        netlink_put(&request, NDA_LLADDR, parsed.mac, INET_MAC);
    if (problem == 0)
        problem = netlink_call(netlink, &request, NULL, NULL);
    return problem == 0 || netlink_explain(netlink, problem, failure, "cannot add the neighbour %.45s on %.16s",
                                           neighbor->to->address, neighbor->device);
}

static bool talk_neighbors(struct netlink *netlink, struct ttrpc_call *call, const void *request)
{
    const struct arp_neighbors *neighbors = request;
    for (size_t i = 0; i < neighbors->neighbors.count; i++)
        if (!add_neighbor(netlink, &neighbors->neighbors.items[i], &call->failure))
            return false;
    return true;
}

static enum ttrpc_status add_arp_neighbors(struct ttrpc_call *call)
{
    struct add_arp_neighbors_request request;
    struct parsed_neighbor parsed;
    if (!ttrpc_decode(call, &message_add_arp_neighbors_request, &request))
        return call->failure.status;
    if (request.neighbors == NULL) {
        failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "there are no neighbours in the request");
        return call->failure.status;
    }
    if (too_many(call, request.neighbors->neighbors.count, MOST_NEIGHBORS, "neighbours"))
        return call->failure.status;
    for (size_t i = 0; i < request.neighbors->neighbors.count; i++)
        if (!parse_neighbor(&request.neighbors->neighbors.items[i], &parsed, &call->failure))
            return call->failure.status;
    return converse(call, request.neighbors, talk_neighbors);
}

const struct ttrpc_method_row network_calls[] = {
    {"UpdateInterface", update_interface}, {"UpdateRoutes", update_routes},
    {"ListInterfaces", list_interfaces},   {"ListRoutes", list_routes},
    {"AddARPNeighbors", add_arp_neighbors}, {NULL, NULL},
};
