/* Everything is edge-triggered. A virtio-serial port without a host polls as hung up for ever, so level-triggered
 * waiting would spin; its edges (a host came, a host went, bytes) are enough. In exchange `serve` must go on until the
 * kernel says EAGAIN, or ask for another turn with `again`.
 */
#define _GNU_SOURCE
#include "server.h"

#include "child.h"
#include "clock.h"
#include "hotplug.h"
#include "log.h"
#include "loop.h"
#include "ttrpc.h"

#include <sys/socket.h> /* before vm_sockets.h, which in older headers needs it and does not say so */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/un.h>
#include <unistd.h>

#define SUBSYSTEM "server"
#define PORT_NAME "agent.channel.0"
#define PORTS "/sys/class/virtio-ports"

#ifndef AGENT_HALF_FRAME_MS /* tests have less time */
#define AGENT_HALF_FRAME_MS 30000
#endif

enum {
    VSOCK_PORT = 1024,
    ENDPOINTS = 40,
    CONNECTIONS = 32, /* of them; the others wait with the kernel, and a port always finds room */
    DESERTED = 4096, /* bytes of answers that wait while nobody is there: more than a host's first calls get */
    TURNS = 32, /* reads in a row before the others get their turn */
    /* The kernel hands us a new host's bytes and the news of that host on different ways, so "bytes, but nobody
     * there" may be true for a moment. After this long it was a host that has gone again. */
    SETTLE_MS = 10,
    /* A frame on a socket may take so long from its first byte to its last; what takes longer keeps memory and a
     * place from the others. Not on a port: see below. */
    HALF_FRAME_MS = AGENT_HALF_FRAME_MS,
    IDLE_MS = 1000, /* with all places taken, who said nothing whole for so long makes way */
    LINGER_MS = 1000, /* for a refused host to read why, and not to be hit by a reset before */
    GRACE_MS = 50, /* for an answer that was written to be read by the host before the power goes */
    DRAIN_MS = 2000, /* for a host that does not read its answer at all */
};

/* When a port is out of step.
 *
 * Rule: bytes are taken for a header only if all that came since the host connected was whole frames; and only a
 * hang-up that the kernel shows - read() gives 0, or POLLHUP after SETTLE_MS - makes the next byte a first one.
 * So a half frame is never given up because of time. A host that was stopped or suspended in the middle goes on there
 * hours later, and were its payload taken for frames, a file that it copies could be a DestroySandbox. Where the step
 * is lost (an absurd length, no memory, answers nobody took), everything up to the hang-up is thrown away.
 *
 * Closing and opening the device instead would not help: QEMU keeps its host connected, holds back what that one
 * sends meanwhile, and hands us the rest of the payload afterwards. Nor would waiting for silence: that is how a
 * paused payload looks.
 *
 * What it costs: the kernel tells the state, not its changes. If one host leaves in the middle of a frame and another
 * one comes before we were run (some ms), they are one host to us: the second one's first bytes complete the frame.
 * It hears nothing, or an answer to a stream it did not ask on, and must hang up and stay away for 20 ms. */

enum kind { FREE, LISTENER, SOCKET, PORT, SIGNALS };

struct endpoint {
    struct watch watch;
    enum kind kind;
    bool again; /* the kernel may have more for us without another edge */
    bool ended; /* SOCKET: the host will send no more */
    bool shut; /* SOCKET: we will send no more */
    bool crowded; /* LISTENER: somebody waits for a place */
    int64_t heard_at; /* SOCKET: when bytes came last */
    int64_t half_at; /* SOCKET: when the frame that is half here began; 0: none is */
    uint32_t frames; /* SOCKET: how many there were before that one */
    bool up; /* PORT: a host is known to be there */
    int64_t settle_at; /* PORT: see SETTLE_MS; 0: not waiting */
    struct ttrpc_peer peer;
};

static struct endpoint endpoints[ENDPOINTS];
static struct endpoint *last_caller; /* whom DestroySandbox was answered to */
static uint8_t piece[TTRPC_PIECE]; /* what one read gave: only what came takes memory of a connection */
static bool stopping;
static bool stopped;
static int64_t stop_at;

static void warn(const char *message)
{
    int number = errno;
    LOG(LOG_WARN, SUBSYSTEM, message, LOG_ERRNO(number));
}

/* --- endpoints --- */

static size_t count(enum kind kind)
{
    size_t found = 0;
    for (size_t i = 0; i < ENDPOINTS; i++)
        found += endpoints[i].kind == kind;
    return found;
}

static void endpoint_ready(struct watch *watch, uint32_t events);

static struct endpoint *add(enum kind kind, int fd, uint32_t events)
{
    for (size_t i = 0; i < ENDPOINTS; i++) {
        struct endpoint *endpoint = &endpoints[i];
        if (endpoint->kind != FREE)
            continue;
        *endpoint = (struct endpoint){.kind = kind, .watch = {.fd = fd, .ready = endpoint_ready}};
        if (loop_watch(&endpoint->watch, events))
            return endpoint;
        *endpoint = (struct endpoint){.kind = FREE};
        return NULL;
    }
    errno = EMFILE;
    return NULL;
}

static struct endpoint *add_stream(enum kind kind, int fd)
{
    return add(kind, fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
}

static void drop(struct endpoint *endpoint)
{
    if (endpoint == last_caller) {
        last_caller = NULL;
        stop_at = clock_ms(); /* nobody is waiting for the answer any more */
    }
    loop_forget(&endpoint->watch);
    close(endpoint->watch.fd);
    ttrpc_reset(&endpoint->peer);
    *endpoint = (struct endpoint){.kind = FREE, .watch = {.fd = -1}};
    for (size_t i = 0; i < ENDPOINTS; i++)
        if (endpoints[i].kind == LISTENER)
            endpoints[i].again = true; /* somebody may have waited for the place */
}

/* --- streams --- */

/* The host has closed a port: what it left is nobody's, the next one begins afresh. */
static void hang_up(struct endpoint *port)
{
    ttrpc_reset(&port->peer);
    port->up = false;
    port->settle_at = 0;
    LOG(LOG_DEBUG, SUBSYSTEM, "host disconnected");
    if (port == last_caller)
        stop_at = clock_ms();
}

static void note_up(struct endpoint *endpoint)
{
    endpoint->up = true;
    endpoint->settle_at = 0;
}

/* False: the endpoint is gone. */
static bool flush(struct endpoint *endpoint)
{
    struct buffer *out = &endpoint->peer.out;
    while (out->size > 0) {
        struct span content = buffer_content(out);
        ssize_t wrote = write(endpoint->watch.fd, content.data, content.size);
        if (wrote > 0) {
            ttrpc_written(&endpoint->peer, (size_t)wrote);
            note_up(endpoint);
        } else if (wrote == 0 || errno == EAGAIN) {
            break;
        } else if (errno != EINTR) {
            drop(endpoint);
            return false;
        }
    }
    return true;
}

static void nobody_there(struct endpoint *port)
{
    struct ttrpc_peer *peer = &port->peer;
    if (port->up && peer->opened) {
        /* Perhaps the next host's first call has overtaken the news of that host. What came before it was for the
         * last one. */
        ttrpc_written(peer, peer->opening);
        port->up = false;
    }
    if (port->up)
        hang_up(port);
    else if (!ttrpc_idle(peer) && port->settle_at == 0)
        port->settle_at = clock_ms() + SETTLE_MS;
}

/* True: bytes came. False: there are none for now, or the endpoint is gone. */
static bool fill(struct endpoint *endpoint)
{
    ssize_t got;
    do
        got = read(endpoint->watch.fd, piece, sizeof piece);
    while (got < 0 && errno == EINTR);
    if (got > 0) {
        endpoint->heard_at = clock_ms();
        ttrpc_receive(&endpoint->peer, (struct span){piece, (size_t)got}, endpoint->kind == PORT);
        return true;
    }
    if (got == 0 && endpoint->kind == PORT)
        nobody_there(endpoint);
    else if (got == 0)
        endpoint->ended = true;
    else if (errno == EAGAIN)
        note_up(endpoint);
    else
        drop(endpoint);
    return endpoint->ended; /* one more turn, to close it */
}

static void begin_stopping(struct endpoint *caller)
{
    stopping = true;
    last_caller = caller;
    stop_at = clock_ms() + DRAIN_MS;
}

/* Whatever this host has still to say is thrown away; the hang-up is yet to be read. */
static void lose(struct endpoint *port)
{
    ttrpc_lose(&port->peer);
    port->up = true;
}

static void end_broken(struct endpoint *endpoint)
{
    LOG(LOG_ERROR, SUBSYSTEM, "no memory for a connection: it is given up");
    if (endpoint->kind == PORT)
        lose(endpoint);
    else
        drop(endpoint);
}

static bool hung_up(const struct endpoint *port)
{
    struct pollfd state = {.fd = port->watch.fd};
    return poll(&state, 1, 0) == 1 && (state.revents & POLLHUP) != 0;
}

/* The host has left, and its calls are still coming out of the kernel: they must be out of it before the next host is
 * there. A few answers may be that one's, whose first calls have overtaken the news of it: see nobody_there. */
static bool deserted(const struct endpoint *endpoint)
{
    return endpoint->kind == PORT && endpoint->peer.out.size >= DESERTED && hung_up(endpoint);
}

static void shut(struct endpoint *socket)
{
    socket->shut = true;
    shutdown(socket->watch.fd, SHUT_WR);
}

static void converse(struct endpoint *endpoint)
{
    struct ttrpc_peer *peer = &endpoint->peer;
    endpoint->again = false;
    for (int turn = 0; turn < TURNS; turn++) {
        bool more = ttrpc_process(peer);
        if (ttrpc_broken(peer)) {
            end_broken(endpoint);
            if (endpoint->kind == FREE)
                return;
        }
        if (peer->ending && !stopping)
            begin_stopping(endpoint);
        if (!flush(endpoint))
            return;
        if (endpoint == last_caller && peer->out.size == 0 && stop_at > clock_ms() + GRACE_MS)
            stop_at = clock_ms() + GRACE_MS;
        if (endpoint->kind == SOCKET && peer->lost && peer->out.size == 0 && !endpoint->shut)
            shut(endpoint);
        if (deserted(endpoint)) {
            lose(endpoint);
            continue;
        }
        if (ttrpc_congested(peer) || (endpoint->ended && peer->out.size > 0))
            return; /* the edge of EPOLLOUT brings us back */
        if (more)
            continue;
        if (endpoint->ended) {
            drop(endpoint);
            return;
        }
        if (!fill(endpoint))
            return;
    }
    endpoint->again = true;
}

/* While answers wait to be read, the frame behind them is not late. */
static void watch_the_clock(struct endpoint *socket)
{
    const struct ttrpc_peer *peer = &socket->peer;
    if (!peer->lost && (!ttrpc_half_way(peer) || ttrpc_congested(peer)))
        socket->half_at = 0;
    else if (socket->half_at == 0 || socket->frames != peer->frames)
        socket->half_at = clock_ms();
    socket->frames = peer->frames;
}

static void serve(struct endpoint *endpoint)
{
    converse(endpoint);
    if (endpoint->kind == SOCKET)
        watch_the_clock(endpoint);
}

static void settle(struct endpoint *port)
{
    port->settle_at = 0;
    if (hung_up(port))
        hang_up(port);
}

/* When a socket is given up for having been half way too long; INT64_MAX: it is not. */
static int64_t late_at(const struct endpoint *endpoint)
{
    if (endpoint->kind != SOCKET || endpoint->half_at == 0)
        return INT64_MAX;
    return endpoint->half_at + (endpoint->peer.lost ? LINGER_MS : HALF_FRAME_MS);
}

static void give_up(struct endpoint *socket)
{
    LOG(LOG_WARN, SUBSYSTEM, "a host was half way through a frame for too long: disconnected");
    drop(socket);
}

/* --- listeners --- */

static bool listening(int fd, const char *address)
{
    if (listen(fd, SOMAXCONN) != 0 || add(LISTENER, fd, EPOLLIN | EPOLLET) == NULL) {
        warn("cannot listen");
        close(fd);
        return false;
    }
    LOG(LOG_INFO, SUBSYSTEM, "listening", LOG_STRING("address", address));
    return true;
}

/* When a socket may be dropped for somebody who waits; INT64_MAX: it is in good use. */
static int64_t spare_at(const struct endpoint *endpoint)
{
    if (endpoint->kind != SOCKET || (endpoint->frames > 0 && endpoint->half_at == 0))
        return INT64_MAX;
    return endpoint->heard_at + IDLE_MS;
}

static struct endpoint *most_spare(void)
{
    struct endpoint *found = &endpoints[0];
    for (size_t i = 1; i < ENDPOINTS; i++)
        if (spare_at(&endpoints[i]) < spare_at(found))
            found = &endpoints[i];
    return found;
}

static bool make_room(void)
{
    struct endpoint *spare = most_spare();
    if (spare_at(spare) > clock_ms())
        return false;
    LOG(LOG_WARN, SUBSYSTEM, "too many connections: one that said nothing whole made way");
    drop(spare);
    return true;
}

static bool somebody_waits(const struct endpoint *listener)
{
    struct pollfd state = {.fd = listener->watch.fd, .events = POLLIN};
    return poll(&state, 1, 0) == 1;
}

/* A container reaches vsock too, and with vsock_loopback us: who may call may do everything. */
bool server_is_host(const struct sockaddr_storage *peer)
{
    struct sockaddr_vm address;
    if (peer->ss_family != AF_VSOCK)
        return true; /* a test's unix socket */
    memcpy(&address, peer, sizeof address);
    return address.svm_cid == VMADDR_CID_HOST;
}

static void welcome(int fd)
{
    struct endpoint *added = add_stream(SOCKET, fd);
    if (added == NULL) {
        warn("cannot keep a connection");
        close(fd);
    } else {
        added->heard_at = clock_ms();
    }
}

static void accept_all(struct endpoint *listener)
{
    struct sockaddr_storage peer = {0};
    listener->again = false;
    listener->crowded = false;
    for (;;) {
        if (count(SOCKET) >= CONNECTIONS) {
            if (!somebody_waits(listener))
                return;
            if (!make_room()) {
                listener->crowded = true;
                return;
            }
        }
        socklen_t size = sizeof peer;
        int fd = accept4(listener->watch.fd, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED))
            continue;
        if (fd < 0) {
            if (errno != EAGAIN)
                warn("cannot accept a connection");
            return;
        }
        if (server_is_host(&peer)) {
            welcome(fd);
        } else {
            LOG(LOG_WARN, SUBSYSTEM, "somebody who is not the host was turned away");
            close(fd);
        }
    }
}

bool server_listen_unix(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char text[sizeof address.sun_path + 8];
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        warn("cannot listen");
        return false;
    }
    memcpy(address.sun_path, path, strlen(path) + 1);
    snprintf(text, sizeof text, "unix:%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (const struct sockaddr *)&address, sizeof address) != 0) {
        warn("cannot listen");
        if (fd >= 0)
            close(fd);
        return false;
    }
    return listening(fd, text);
}

bool server_listen_vsock(void)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = VSOCK_PORT};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (const struct sockaddr *)&address, sizeof address) != 0) {
        int number = errno;
        LOG(LOG_INFO, SUBSYSTEM, "no vsock", LOG_ERRNO(number));
        if (fd >= 0)
            close(fd);
        return false;
    }
    return listening(fd, "vsock://-1:1024");
}

/* --- the virtio-serial port --- */

static bool has_our_name(const char *device)
{
    char path[320];
    char name[sizeof PORT_NAME + 1] = {0};
    snprintf(path, sizeof path, PORTS "/%s/name", device);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    ssize_t size = read(file, name, sizeof name - 1);
    close(file);
    return size > 0 && (strcmp(name, PORT_NAME) == 0 || strcmp(name, PORT_NAME "\n") == 0);
}

static void open_port(const char *device)
{
    char path[320];
    char text[400];
    snprintf(path, sizeof path, "/dev/%s", device);
    int fd = open(path, O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || add_stream(PORT, fd) == NULL) {
        warn("cannot open the port " PORT_NAME);
        if (fd >= 0)
            close(fd);
        return;
    }
    snprintf(text, sizeof text, "virtio-serial:%s", path);
    LOG(LOG_INFO, SUBSYSTEM, "listening", LOG_STRING("address", text));
}

static void look_for_port(void)
{
    if (count(PORT) > 0)
        return;
    DIR *ports = opendir(PORTS);
    if (ports == NULL)
        return;
    for (const struct dirent *entry; count(PORT) == 0 && (entry = readdir(ports)) != NULL;)
        if (entry->d_name[0] != '.' && has_our_name(entry->d_name))
            open_port(entry->d_name);
    closedir(ports);
}

/* A port gets its name some time after its driver started, and may be plugged in hours later: the kernel tells. */
void server_watch_ports(void)
{
    hotplug_begin(look_for_port);
    look_for_port();
}

/* --- signals and the loop --- */

bool server_begin(void)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    signal(SIGPIPE, SIG_IGN);
    if (!loop_begin() || sigprocmask(SIG_BLOCK, &signals, NULL) != 0) {
        warn("cannot begin");
        return false;
    }
    int fd = signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC);
    if (fd < 0 || add(SIGNALS, fd, EPOLLIN) == NULL) {
        warn("cannot hear signals");
        return false;
    }
    return true;
}

static void read_signals(const struct endpoint *endpoint)
{
    struct signalfd_siginfo info;
    while (read(endpoint->watch.fd, &info, sizeof info) == sizeof info)
        if (info.ssi_signo != SIGCHLD && getpid() != 1)
            stopped = true;
    child_reap();
}

static void dispatch(struct endpoint *endpoint)
{
    switch (endpoint->kind) {
    case LISTENER:
        accept_all(endpoint);
        break;
    case SOCKET:
    case PORT:
        serve(endpoint);
        break;
    case SIGNALS:
        read_signals(endpoint);
        break;
    case FREE:
        break;
    }
}

static void endpoint_ready(struct watch *watch, uint32_t events)
{
    (void)events; /* edges: what there is to do is found out by trying */
    dispatch(LOOP_OWNER(watch, struct endpoint, watch));
}

static void earliest(int64_t *next, int64_t when)
{
    if (when < *next)
        *next = when;
}

/* Milliseconds until something is due; -1: nothing is. */
static int due(void)
{
    int64_t next = ttrpc_next_try();
    if (stopping)
        earliest(&next, stop_at);
    for (size_t i = 0; i < ENDPOINTS; i++) {
        const struct endpoint *endpoint = &endpoints[i];
        if (endpoint->again)
            return 0;
        if (endpoint->settle_at != 0)
            earliest(&next, endpoint->settle_at);
        if (endpoint->crowded)
            earliest(&next, spare_at(most_spare()));
        earliest(&next, late_at(endpoint));
    }
    if (next == INT64_MAX)
        return -1;
    int64_t wait = next - clock_ms();
    return wait <= 0 ? 0 : wait > DRAIN_MS ? DRAIN_MS : (int)wait;
}

static void do_what_is_due(void)
{
    for (size_t i = 0; i < ENDPOINTS; i++) {
        struct endpoint *endpoint = &endpoints[i];
        if (endpoint->again || endpoint->crowded || ttrpc_has_tries(&endpoint->peer))
            dispatch(endpoint);
        if (endpoint->settle_at != 0 && endpoint->settle_at <= clock_ms())
            settle(endpoint);
        if (late_at(endpoint) <= clock_ms())
            give_up(endpoint);
    }
    if (stopping && stop_at <= clock_ms())
        stopped = true;
}

void server_run(void)
{
    while (!stopped) {
        loop_turn(due());
        do_what_is_due();
    }
}
