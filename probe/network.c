/* The network as a program in the guest uses it: echo requests, and bytes over TCP.
 *
 * No times: an emulated guest's clock may have a hand that moves every 4 ms. */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/icmp6.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ANSWER_MS = 5000, TALK_MS = 20000, LARGEST = 9000, HEADER = 8, CHUNK = 4096 };

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static struct addrinfo *resolve(struct answer *answer, const char *address, const char *port, int kind)
{
    const struct addrinfo hints = {
        .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_family = AF_UNSPEC, .ai_socktype = kind};
    struct addrinfo *found;
    errno = EINVAL;
    if (getaddrinfo(address, port, &hints, &found) == 0)
        return found;
    fail(answer, address);
    return NULL;
}

static bool close_and_fail(struct answer *answer, int fd, const char *what)
{
    fail(answer, what);
    if (fd >= 0)
        close(fd);
    return false;
}

/* --- ping --- */

struct ping {
    int fd;
    bool v6;
    size_t size; /* of a message, its header included */
    uint8_t message[HEADER + LARGEST];
};

static uint16_t checksum(const uint8_t *data, size_t size)
{
    uint32_t sum = 0;
    for (size_t i = 0; i + 1 < size; i += 2)
        sum += (uint32_t)(data[i] << 8 | data[i + 1]);
    if (size % 2 != 0)
        sum += (uint32_t)(data[size - 1] << 8);
    while (sum > 0xffff)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

static bool forbid_fragments(int fd, bool v6)
{
    const int probe = v6 ? IPV6_PMTUDISC_DO : IP_PMTUDISC_DO, yes = 1;
    if (v6)
        return setsockopt(fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, &probe, sizeof probe) == 0 &&
               setsockopt(fd, IPPROTO_IPV6, IPV6_DONTFRAG, &yes, sizeof yes) == 0;
    return setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &probe, sizeof probe) == 0;
}

static void write_request(struct ping *ping, unsigned turn)
{
    uint8_t *message = ping->message;
    const unsigned id = (unsigned)getpid();
    const uint8_t head[HEADER] = {
        ping->v6 ? ICMP6_ECHO_REQUEST : ICMP_ECHO, 0, 0, 0,
        (uint8_t)(id >> 8), (uint8_t)id, (uint8_t)(turn >> 8), (uint8_t)turn};
    memcpy(message, head, sizeof head);
    for (size_t i = HEADER; i < ping->size; i++)
        message[i] = (uint8_t)(i * 7 + turn);
    uint16_t sum = ping->v6 ? 0 : checksum(message, ping->size); /* of ICMPv6 the kernel makes it */
    message[2] = (uint8_t)(sum >> 8);
    message[3] = (uint8_t)sum;
}

/* Of IPv4 a raw socket gives the packet's header, too. */
static bool is_answer(const struct ping *ping, const uint8_t *packet, size_t size)
{
    size_t header = ping->v6 || size == 0 ? 0 : (size_t)(packet[0] & 15) * 4;
    if (size < header || size - header != ping->size)
        return false;
    packet += header;
    return packet[0] == (ping->v6 ? ICMP6_ECHO_REPLY : ICMP_ECHOREPLY) &&
           memcmp(packet + 4, ping->message + 4, ping->size - 4) == 0;
}

static bool wait_for_answer(const struct ping *ping)
{
    static uint8_t packet[LARGEST + 128];
    const int64_t deadline = now_ms() + ANSWER_MS;
    for (;;) {
        int64_t left = deadline - now_ms();
        struct pollfd ready = {.fd = ping->fd, .events = POLLIN};
        if (left <= 0 || poll(&ready, 1, (int)left) <= 0)
            return false;
        ssize_t size = recv(ping->fd, packet, sizeof packet, MSG_DONTWAIT);
        if (size > 0 && is_answer(ping, packet, (size_t)size))
            return true;
    }
}

bool probe_ping(struct answer *answer, char **words, int count)
{
    (void)count;
    static struct ping ping;
    struct addrinfo *there = resolve(answer, words[0], NULL, SOCK_RAW);
    if (there == NULL)
        return false;
    const unsigned long turns = strtoul(words[1], NULL, 10);
    ping.size = HEADER + strtoul(words[2], NULL, 10) % (LARGEST + 1);
    ping.v6 = there->ai_family == AF_INET6;
    ping.fd = socket(there->ai_family, SOCK_RAW | SOCK_CLOEXEC, ping.v6 ? (int)IPPROTO_ICMPV6 : (int)IPPROTO_ICMP);
    bool good = ping.fd >= 0 && forbid_fragments(ping.fd, ping.v6);
    unsigned long answered = 0;
    for (unsigned turn = 0; good && turn < turns; turn++) {
        write_request(&ping, turn);
        good = sendto(ping.fd, ping.message, ping.size, 0, there->ai_addr, there->ai_addrlen) == (ssize_t)ping.size;
        answered += good && wait_for_answer(&ping);
    }
    freeaddrinfo(there);
    if (!good)
        return close_and_fail(answer, ping.fd, "ping");
    close(ping.fd);
    return say(answer, "answered %lu\n", answered);
}

/* --- TCP --- */

static uint8_t pattern(size_t at)
{
    return (uint8_t)(at * 31 + (at >> 8) * 17);
}

static bool send_more(int fd, size_t bytes, size_t *sent)
{
    uint8_t data[CHUNK];
    size_t length = bytes - *sent < sizeof data ? bytes - *sent : sizeof data;
    for (size_t i = 0; i < length; i++)
        data[i] = pattern(*sent + i);
    ssize_t size = send(fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    *sent += size > 0 ? (size_t)size : 0;
    return size >= 0 || errno == EAGAIN;
}

static bool take_more(int fd, size_t *got)
{
    uint8_t data[CHUNK];
    ssize_t size = recv(fd, data, sizeof data, MSG_DONTWAIT);
    if (size == 0)
        errno = ECONNRESET;
    for (ssize_t i = 0; i < size; i++) {
        if (data[i] != pattern(*got + (size_t)i)) {
            errno = EBADMSG;
            return false;
        }
    }
    *got += size > 0 ? (size_t)size : 0;
    return size > 0 || (size < 0 && errno == EAGAIN);
}

/* Sends and reads at once: neither end has room for all of it. */
static bool there_and_back(int fd, size_t bytes)
{
    const int64_t deadline = now_ms() + TALK_MS;
    size_t sent = 0, got = 0;
    while (got < bytes) {
        int64_t left = deadline - now_ms();
        struct pollfd ready = {.fd = fd, .events = (short)(sent < bytes ? POLLIN | POLLOUT : POLLIN)};
        errno = ETIMEDOUT;
        if (left <= 0 || poll(&ready, 1, (int)left) <= 0)
            return false;
        if ((ready.revents & POLLOUT) != 0 && !send_more(fd, bytes, &sent))
            return false;
        if ((ready.revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !take_more(fd, &got))
            return false;
    }
    return true;
}

bool probe_talk(struct answer *answer, char **words, int count)
{
    (void)count;
    struct addrinfo *there = resolve(answer, words[0], words[1], SOCK_STREAM);
    if (there == NULL)
        return false;
    const size_t bytes = strtoul(words[2], NULL, 10);
    int fd = socket(there->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool good = fd >= 0 && connect(fd, there->ai_addr, there->ai_addrlen) == 0;
    freeaddrinfo(there);
    if (!good)
        return close_and_fail(answer, fd, "connect");
    if (!there_and_back(fd, bytes))
        return close_and_fail(answer, fd, "talk");
    close(fd);
    return say(answer, "bytes %zu\n", bytes);
}

static void give_back(int fd)
{
    uint8_t data[CHUNK];
    ssize_t size;
    while ((size = recv(fd, data, sizeof data, 0)) > 0) {
        for (ssize_t at = 0; at < size;) {
            ssize_t sent = send(fd, data + at, (size_t)(size - at), MSG_NOSIGNAL);
            if (sent <= 0)
                return;
            at += sent;
        }
    }
}

static _Noreturn void serve(int fd, pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)  /* it was killed before we asked for that */
        _exit(1);
    for (;;) {
        int client = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0)
            continue;
        give_back(client);
        close(client);
    }
}

bool probe_serve(struct answer *answer, char **words, int count)
{
    (void)count;
    struct sockaddr_in6 here = {
        .sin6_family = AF_INET6, .sin6_port = htons((uint16_t)strtoul(words[0], NULL, 10))};
    socklen_t size = sizeof here;
    const int no = 0;
    int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no) != 0 ||
        bind(fd, (const struct sockaddr *)&here, sizeof here) != 0 || listen(fd, 8) != 0 ||
        getsockname(fd, (struct sockaddr *)&here, &size) != 0)
        return close_and_fail(answer, fd, "listen");
    const pid_t parent = getpid();
    pid_t child = fork();
    if (child == 0)
        serve(fd, parent);
    if (child < 0)
        return close_and_fail(answer, fd, "fork");
    close(fd);
    return say(answer, "port %u\n", (unsigned)ntohs(here.sin6_port));
}
