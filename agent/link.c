#define _GNU_SOURCE
#include "link.h"

#include <errno.h>
#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

enum { WHOLE_TRIES = 5 /* for a list while somebody changes what is listed */ };

bool link_can_be_named(const char *name)
{
    size_t size = strlen(name);
    if (size == 0 || size >= IF_NAMESIZE || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return false;
    return strcspn(name, "/: \t\n\v\f\r%") == size; /* the kernel fills in a number for % */
}

/* --- reading --- */

static void take_text(char *text, size_t size, struct span value)
{
    size_t length = strnlen((const char *)value.data, value.size);
    snprintf(text, size, "%.*s", (int)length, (const char *)value.data);
}

static void take_info(struct span attributes, struct link *link)
{
    uint16_t type;
    struct span value;
    while (netlink_next(&attributes, &type, &value))
        if (type == IFLA_INFO_KIND)
            take_text(link->kind, sizeof link->kind, value);
}

static bool take_link(struct span body, struct link *link)
{
    struct ifinfomsg message;
    struct span attributes;
    const void *at = netlink_body(body, sizeof message, &attributes);
    if (at == NULL)
        return false;
    memcpy(&message, at, sizeof message);
    link->index = message.ifi_index;
    link->flags = message.ifi_flags;
    uint16_t type;
    struct span value;
    while (netlink_next(&attributes, &type, &value)) {
        if (type == IFLA_IFNAME)
            take_text(link->name, sizeof link->name, value);
        if (type == IFLA_MTU)
            link->mtu = netlink_u32(value);
        if (type == IFLA_LINKINFO)
            take_info(value, link);
        if (type == IFLA_ADDRESS && value.size == INET_MAC) {
            memcpy(link->mac, value.data, INET_MAC);
            link->has_mac = true;
        }
    }
    return link->index > 0;
}

static bool read_link(void *context, uint16_t type, struct span body)
{
    if (type == RTM_NEWLINK)
        take_link(body, context);
    return true;
}

int link_find(struct netlink *netlink, const char *name, struct link *link)
{
    struct netlink_request request;
    const struct ifinfomsg message = {.ifi_family = AF_UNSPEC};
    memset(link, 0, sizeof *link);
    if (!link_can_be_named(name))
        return ENODEV;
    netlink_begin(&request, RTM_GETLINK, 0, &message, sizeof message);
    netlink_put_text(&request, IFLA_IFNAME, name);
    int problem = netlink_call(netlink, &request, read_link, link);
    return problem == 0 && link->index == 0 ? ENODEV : problem;
}

/* Stands for the `next` that every item begins with. */
typedef void *__attribute__((may_alias)) any_pointer;

struct listing {
    struct arena *arena;
    any_pointer first;
    any_pointer *last; /* where the next one is hung up */
};

static void *add(struct listing *listing, size_t size)
{
    any_pointer *item = arena_take(listing->arena, size);
    if (item == NULL)
        return NULL;
    *listing->last = item;
    listing->last = item;
    return item;
}

static int list(struct netlink *netlink, struct netlink_request *request, netlink_reader *reader, struct arena *arena,
                void **first)
{
    int problem = EAGAIN;
    for (int i = 0; i < WHOLE_TRIES && problem == EAGAIN; i++) {
        struct listing listing = {.arena = arena};
        listing.last = &listing.first;
        problem = netlink_call(netlink, request, reader, &listing);
        *first = listing.first;
    }
    return problem;
}

static bool read_links(void *context, uint16_t type, struct span body)
{
    struct link found = {0};
    if (type != RTM_NEWLINK || !take_link(body, &found))
        return true;
    struct link *link = add(context, sizeof *link);
    if (link == NULL)
        return false;
    *link = found;
    return true;
}

int link_list(struct netlink *netlink, struct arena *arena, struct link **first)
{
    struct netlink_request request;
    const struct ifinfomsg message = {.ifi_family = AF_UNSPEC};
    void *items = NULL;
    netlink_begin(&request, RTM_GETLINK, NLM_F_DUMP, &message, sizeof message);
    netlink_put_u32(&request, IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    int problem = list(netlink, &request, read_links, arena, &items);
    *first = items;
    return problem;
}

int link_find_mac(struct netlink *netlink, const uint8_t mac[INET_MAC], struct arena *arena, struct link *link)
{
    struct link *first;
    int problem = link_list(netlink, arena, &first);
    if (problem != 0)
        return problem;
    for (const struct link *at = first; at != NULL; at = at->next)
        if (at->has_mac && memcmp(at->mac, mac, INET_MAC) == 0) {
            *link = *at;
            return 0;
        }
    return ENODEV;
}

static bool take_address(struct span body, struct link_address *address)
{
    struct ifaddrmsg message;
    struct span attributes;
    const void *at = netlink_body(body, sizeof message, &attributes);
    if (at == NULL)
        return false;
    memcpy(&message, at, sizeof message);
    address->index = (int)message.ifa_index;
    struct span local = {0};
    uint16_t type;
    struct span value;
    /* IFA_ADDRESS is the other end's where there is one; IFA_LOCAL is ours, and IPv6 mostly goes without it. */
    while (netlink_next(&attributes, &type, &value))
        if (type == IFA_LOCAL || (type == IFA_ADDRESS && local.data == NULL))
            local = value;
    return inet_take(message.ifa_family, local.data, local.size, message.ifa_prefixlen, &address->inet);
}

static bool read_addresses(void *context, uint16_t type, struct span body)
{
    struct link_address found = {0};
    if (type != RTM_NEWADDR || !take_address(body, &found))
        return true;
    struct link_address *address = add(context, sizeof *address);
    if (address == NULL)
        return false;
    *address = found;
    return true;
}

int link_list_addresses(struct netlink *netlink, int index, struct arena *arena, struct link_address **first)
{
    struct netlink_request request;
    const struct ifaddrmsg message = {.ifa_family = AF_UNSPEC, .ifa_index = (unsigned)index};
    void *items = NULL;
    netlink_begin(&request, RTM_GETADDR, NLM_F_DUMP, &message, sizeof message);
    int problem = list(netlink, &request, read_addresses, arena, &items);
    *first = items;
    /* A kernel that filters not sends all. */
    for (struct link_address **at = first; *at != NULL;)
        if (index != 0 && (*at)->index != index)
            *at = (*at)->next;
        else
            at = &(*at)->next;
    return problem;
}

/* --- changing --- */

int link_change(struct netlink *netlink, int index, const struct link_change *change)
{
    struct netlink_request request;
    const struct ifinfomsg message = {.ifi_index = index, .ifi_flags = change->flags, .ifi_change = change->change};
    netlink_begin(&request, RTM_NEWLINK, 0, &message, sizeof message);
    if (change->name != NULL)
        netlink_put_text(&request, IFLA_IFNAME, change->name);
    if (change->mac != NULL)
        netlink_put(&request, IFLA_ADDRESS, change->mac, INET_MAC);
    if (change->mtu != 0)
        netlink_put_u32(&request, IFLA_MTU, change->mtu);
    return netlink_call(netlink, &request, NULL, NULL);
}

static struct ifaddrmsg address_message(int index, const struct inet *inet)
{
    return (struct ifaddrmsg){.ifa_family = (uint8_t)inet->family, .ifa_prefixlen = inet->prefix,
                              .ifa_index = (unsigned)index};
}

/* All ones behind the prefix; networks of one or two addresses have none. */
static void put_broadcast(struct netlink_request *request, const struct inet *inet)
{
    enum { LONGEST = 30 };
    if (inet->family != AF_INET || inet->prefix > LONGEST)
        return;
    uint8_t bytes[4];
    uint32_t host = inet->prefix == 0 ? UINT32_MAX : (1u << (32 - inet->prefix)) - 1;
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint8_t)(inet->bytes[i] | host >> (24 - 8 * i));
    netlink_put(request, IFA_BROADCAST, bytes, sizeof bytes);
}

int link_add_address(struct netlink *netlink, int index, const struct inet *inet)
{
    struct netlink_request request;
    struct ifaddrmsg message = address_message(index, inet);
    /* The host has given out the address, and may hold it itself on the other end of the wire: asking the neighbours
     * whether it is free would take a second, and could be answered no. */
    if (inet->family == AF_INET6)
        message.ifa_flags = IFA_F_NODAD;
    netlink_begin(&request, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &message, sizeof message);
    netlink_put(&request, IFA_LOCAL, inet->bytes, inet->size);
    netlink_put(&request, IFA_ADDRESS, inet->bytes, inet->size);
    put_broadcast(&request, inet);
    return netlink_call(netlink, &request, NULL, NULL);
}

int link_delete_address(struct netlink *netlink, const struct link_address *address)
{
    struct netlink_request request;
    const struct ifaddrmsg message = address_message(address->index, &address->inet);
    netlink_begin(&request, RTM_DELADDR, 0, &message, sizeof message);
    netlink_put(&request, IFA_LOCAL, address->inet.bytes, address->inet.size);
    int problem = netlink_call(netlink, &request, NULL, NULL);
    /* Gone with the one before it, which was the first of its network. */
    return problem == EADDRNOTAVAIL ? 0 : problem;
}
