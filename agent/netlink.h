/* rtnetlink: requests to the kernel, and its answers, of which nothing is believed before it is measured.
 *
 *     0        4      6      8     12    16
 *     +--------+------+------+-----+-----+-----------+------------+
 *     | length | type | flags| seq | pid | a struct … | attributes |    native byte order
 *     +--------+------+------+-----+-----+-----------+------------+
 *     an attribute: length (2, with these 4), type (2), value, padding to a multiple of 4
 */
#ifndef AGENT_NETLINK_H
#define AGENT_NETLINK_H

#include "buffer.h"
#include "failure.h"

#include <linux/netlink.h>
#include <linux/rtnetlink.h>

enum { NETLINK_REQUEST_SIZE = 512, NETLINK_WORDS_SIZE = 128 };

struct netlink_request {
    union {
        struct nlmsghdr header;
        uint8_t bytes[NETLINK_REQUEST_SIZE];
    };
    bool full; /* something did not fit */
};

/* `body`: the struct that this type of message begins with. */
void netlink_begin(struct netlink_request *request, uint16_t type, uint16_t flags, const void *body, size_t size);
void netlink_put(struct netlink_request *request, uint16_t type, const void *value, size_t size);
void netlink_put_text(struct netlink_request *request, uint16_t type, const char *text);
void netlink_put_u32(struct netlink_request *request, uint16_t type, uint32_t value);
/* Attributes put until netlink_end lie within this one. */
size_t netlink_nest(struct netlink_request *request, uint16_t type);
void netlink_end(struct netlink_request *request, size_t nest);

/* A conversation: all zero but for the socket. */
struct netlink {
    int socket;
    uint32_t sequence;
    char words[NETLINK_WORDS_SIZE]; /* what the kernel said beside the error number, or "" */
};

/* False, and errno. */
bool netlink_open(struct netlink *netlink);
void netlink_close(struct netlink *netlink);

/* Is called with the content behind each message's header. False: enough memory is not there. */
typedef bool netlink_reader(void *context, uint16_t type, struct span body);

/* Send a request and hear its answers to the end: 0, or an errno. A dump that was not whole because something changed
 * is EAGAIN: what it read is to be forgotten. */
int netlink_call(struct netlink *netlink, struct netlink_request *request, netlink_reader *reader, void *context);

/* Always false: INTERNAL, and behind the text what the error number means and what the kernel said to it. */
__attribute__((format(printf, 4, 5))) bool netlink_explain(const struct netlink *netlink, int problem,
                                                           struct failure *failure, const char *format, ...);

/* The struct at the beginning of a message's body, whose attributes are then in `attributes`; NULL: it is shorter. */
const void *netlink_body(struct span body, size_t size, struct span *attributes);
/* The next attribute; false at the end, and where something is wrong. */
bool netlink_next(struct span *attributes, uint16_t *type, struct span *value);
/* 0 when it is no number of that size. */
uint32_t netlink_u32(struct span value);

#endif
