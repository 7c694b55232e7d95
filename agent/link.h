/* Network links and their addresses, as the kernel has them. What returns an int returns 0 or an errno. */
#ifndef AGENT_LINK_H
#define AGENT_LINK_H

#include "arena.h"
#include "inet.h"
#include "netlink.h"

#include <net/if.h>

struct link {
    struct link *next;
    int index;
    unsigned flags; /* IFF_… */
    uint32_t mtu;
    char name[IF_NAMESIZE]; /* bytes: not always UTF-8 */
    char kind[16]; /* "veth", …; "" for hardware */
    uint8_t mac[INET_MAC];
    bool has_mac;
};

struct link_address {
    struct link_address *next;
    int index; /* of its link */
    struct inet inet;
};

/* A name that a link can have. */
bool link_can_be_named(const char *name);
/* ENODEV: there is none. */
int link_find(struct netlink *netlink, const char *name, struct link *link);
int link_find_mac(struct netlink *netlink, const uint8_t mac[INET_MAC], struct arena *arena, struct link *link);
/* In the kernel's order. */
int link_list(struct netlink *netlink, struct arena *arena, struct link **first);
/* Of one link, or of all: 0. */
int link_list_addresses(struct netlink *netlink, int index, struct arena *arena, struct link_address **first);

struct link_change {
    const char *name; /* NULL: stays */
    const uint8_t *mac; /* NULL: stays */
    uint32_t mtu; /* 0: stays */
    unsigned flags;
    unsigned change; /* which of the flags */
};

int link_change(struct netlink *netlink, int index, const struct link_change *change);
int link_add_address(struct netlink *netlink, int index, const struct inet *inet);
int link_delete_address(struct netlink *netlink, const struct link_address *address);

#endif
