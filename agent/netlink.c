#define _GNU_SOURCE
#include "netlink.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum {
    ANSWER_SIZE = 64 * 1024, /* the kernel makes no piece of a dump larger than 32 KiB */
    PATIENCE_SECONDS = 2, /* the kernel answers before sendto returns: this is for the unforeseen */
    HEADER = sizeof(struct nlmsghdr),
    ATTRIBUTE = sizeof(struct nlattr), /* the header of one */
    TYPE = 0x3fff, /* of an attribute's type; the other bits are flags */
    NESTED = 0x8000,
};

static size_t aligned(size_t size)
{
    return (size + 3) & ~(size_t)3;
}

static size_t least(size_t left, size_t right)
{
    return left < right ? left : right;
}

/* --- requests --- */

void netlink_begin(struct netlink_request *request, uint16_t type, uint16_t flags, const void *body, size_t size)
{
    memset(request, 0, sizeof *request);
    request->header = (struct nlmsghdr){.nlmsg_len = (uint32_t)(HEADER + size), .nlmsg_type = type,
                                        .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags)};
    memcpy(request->bytes + HEADER, body, size);
}

void netlink_put(struct netlink_request *request, uint16_t type, const void *value, size_t size)
{
    size_t at = aligned(request->header.nlmsg_len);
    if (size > NETLINK_REQUEST_SIZE || at + ATTRIBUTE + aligned(size) > NETLINK_REQUEST_SIZE) {
        request->full = true;
        return;
    }
    struct nlattr attribute = {.nla_len = (uint16_t)(ATTRIBUTE + size), .nla_type = type};
    memcpy(request->bytes + at, &attribute, sizeof attribute);
    if (size > 0)
        memcpy(request->bytes + at + ATTRIBUTE, value, size);
    request->header.nlmsg_len = (uint32_t)(at + ATTRIBUTE + size);
}

void netlink_put_text(struct netlink_request *request, uint16_t type, const char *text)
{
    netlink_put(request, type, text, strlen(text) + 1);
}

void netlink_put_u32(struct netlink_request *request, uint16_t type, uint32_t value)
{
    netlink_put(request, type, &value, sizeof value);
}

size_t netlink_nest(struct netlink_request *request, uint16_t type)
{
    size_t at = aligned(request->header.nlmsg_len);
    netlink_put(request, (uint16_t)(type | NESTED), NULL, 0);
    return at;
}

void netlink_end(struct netlink_request *request, size_t nest)
{
    uint16_t size = (uint16_t)(request->header.nlmsg_len - nest);
    if (!request->full)
        memcpy(request->bytes + nest, &size, sizeof size); /* nla_len comes first */
}

/* --- answers --- */

const void *netlink_body(struct span body, size_t size, struct span *attributes)
{
    if (body.size < size)
        return NULL;
    size_t begin = least(aligned(size), body.size);
    *attributes = (struct span){body.data + begin, body.size - begin};
    return body.data;
}

bool netlink_next(struct span *attributes, uint16_t *type, struct span *value)
{
    struct nlattr attribute;
    if (attributes->size < sizeof attribute)
        return false;
    memcpy(&attribute, attributes->data, sizeof attribute);
    if (attribute.nla_len < sizeof attribute || attribute.nla_len > attributes->size)
        return false;
    *type = attribute.nla_type & TYPE;
    *value = (struct span){attributes->data + ATTRIBUTE, attribute.nla_len - sizeof attribute};
    size_t step = least(aligned(attribute.nla_len), attributes->size); /* the last one may lack its padding */
    attributes->data += step;
    attributes->size -= step;
    return true;
}

uint32_t netlink_u32(struct span value)
{
    uint32_t number = 0;
    if (value.size == sizeof number)
        memcpy(&number, value.data, sizeof number);
    return number;
}

/* --- the conversation --- */

bool netlink_open(struct netlink *netlink)
{
    *netlink = (struct netlink){.socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE)};
    if (netlink->socket < 0)
        return false;
    /* Kernels that know an option not are older, and do without. */
    int yes = 1;
    struct timeval patience = {.tv_sec = PATIENCE_SECONDS};
    setsockopt(netlink->socket, SOL_NETLINK, NETLINK_EXT_ACK, &yes, sizeof yes);
    setsockopt(netlink->socket, SOL_NETLINK, NETLINK_CAP_ACK, &yes, sizeof yes);
    setsockopt(netlink->socket, SOL_NETLINK, NETLINK_GET_STRICT_CHK, &yes, sizeof yes);
    setsockopt(netlink->socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return true;
}

void netlink_close(struct netlink *netlink)
{
    close(netlink->socket);
}

static int send_request(struct netlink *netlink, struct netlink_request *request)
{
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    if (request->full)
        return EMSGSIZE;
    request->header.nlmsg_seq = ++netlink->sequence;
    ssize_t sent;
    do
        sent = sendto(netlink->socket, request->bytes, request->header.nlmsg_len, 0, (struct sockaddr *)&kernel,
                      sizeof kernel);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? errno : 0;
}

static int receive(const struct netlink *netlink, uint8_t *answer, struct span *bytes)
{
    struct sockaddr_nl sender;
    struct iovec place = {.iov_base = answer, .iov_len = ANSWER_SIZE};
    for (;;) {
        struct msghdr message = {.msg_name = &sender, .msg_namelen = sizeof sender, .msg_iov = &place,
                                 .msg_iovlen = 1};
        ssize_t got = recvmsg(netlink->socket, &message, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno == EAGAIN ? ETIMEDOUT : errno;
        /* A container of the same network that may use netlink could send us anything. */
        if (message.msg_namelen != sizeof sender || sender.nl_pid != 0)
            continue;
        if ((message.msg_flags & MSG_TRUNC) != 0)
            return EMSGSIZE;
        *bytes = (struct span){answer, (size_t)got};
        return 0;
    }
}

/* The kernel's own words, which stand as attributes behind an error. */
static void keep_words(struct netlink *netlink, struct span attributes)
{
    uint16_t type;
    struct span value;
    while (netlink_next(&attributes, &type, &value))
        if (type == NLMSGERR_ATTR_MSG && value.size > 0)
            snprintf(netlink->words, sizeof netlink->words, "%.*s", (int)value.size, (const char *)value.data);
}

static int read_error(struct netlink *netlink, uint16_t flags, struct span body)
{
    int32_t number;
    size_t before = sizeof(struct nlmsgerr);
    if (body.size < before)
        return EBADMSG;
    memcpy(&number, body.data, sizeof number);
    if ((flags & NLM_F_CAPPED) == 0) { /* all of the request is repeated, of which the struct holds the header */
        struct nlmsghdr request;
        memcpy(&request, body.data + sizeof number, sizeof request);
        before += request.nlmsg_len > sizeof request ? aligned(request.nlmsg_len - sizeof request) : 0;
    }
    if ((flags & NLM_F_ACK_TLVS) != 0 && before < body.size)
        keep_words(netlink, (struct span){body.data + before, body.size - before});
    return number > 0 ? EBADMSG : -number;
}

static int read_done(struct netlink *netlink, struct span body)
{
    int32_t number;
    if (body.size < sizeof number)
        return 0;
    memcpy(&number, body.data, sizeof number);
    keep_words(netlink, (struct span){body.data + sizeof number, body.size - sizeof number});
    return number < 0 ? -number : 0;
}

struct hearing {
    netlink_reader *reader;
    void *context;
    bool over;
    bool inconsistent;
};

static int hear(struct netlink *netlink, struct hearing *hearing, const struct nlmsghdr *header, struct span body)
{
    hearing->inconsistent |= (header->nlmsg_flags & NLM_F_DUMP_INTR) != 0;
    switch (header->nlmsg_type) {
    case NLMSG_NOOP:
        return 0;
    case NLMSG_OVERRUN:
        return ENOBUFS;
    case NLMSG_ERROR:
        hearing->over = true;
        return read_error(netlink, header->nlmsg_flags, body);
    case NLMSG_DONE:
        hearing->over = true;
        return read_done(netlink, body);
    default:
        return hearing->reader == NULL || hearing->reader(hearing->context, header->nlmsg_type, body) ? 0 : ENOMEM;
    }
}

static int hear_all(struct netlink *netlink, struct hearing *hearing, struct span bytes)
{
    while (bytes.size > 0 && !hearing->over) {
        struct nlmsghdr header;
        if (bytes.size < sizeof header)
            return EBADMSG;
        memcpy(&header, bytes.data, sizeof header);
        if (header.nlmsg_len < sizeof header || header.nlmsg_len > bytes.size)
            return EBADMSG;
        if (header.nlmsg_seq == netlink->sequence) {
            struct span body = {bytes.data + HEADER, header.nlmsg_len - sizeof header};
            int problem = hear(netlink, hearing, &header, body);
            if (problem != 0)
                return problem;
        }
        size_t step = least(aligned(header.nlmsg_len), bytes.size);
        bytes.data += step;
        bytes.size -= step;
    }
    return 0;
}

int netlink_call(struct netlink *netlink, struct netlink_request *request, netlink_reader *reader, void *context)
{
    static uint8_t answer[ANSWER_SIZE] __attribute__((aligned(8)));
    struct hearing hearing = {.reader = reader, .context = context};
    netlink->words[0] = '\0';
    int problem = send_request(netlink, request);
    while (problem == 0 && !hearing.over) {
        struct span bytes = {0};
        problem = receive(netlink, answer, &bytes);
        if (problem == 0)
            problem = hear_all(netlink, &hearing, bytes);
    }
    return problem == 0 && hearing.inconsistent ? EAGAIN : problem;
}

bool netlink_explain(const struct netlink *netlink, int problem, struct failure *failure, const char *format, ...)
{
    char what[160];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    const char *words = netlink->words;
    return failure_set(failure, TTRPC_INTERNAL, "%s: %s%s%s", what, strerror(problem), words[0] != '\0' ? ": " : "",
                       words);
}
