/* The loop: one thread, epoll, every transport the agent answers on. */
#ifndef AGENT_SERVER_H
#define AGENT_SERVER_H

#include <stdbool.h>

struct sockaddr_storage;

/* Block and collect the signals the loop wants to hear of; false when the kernel will not let us. */
bool server_begin(void);
bool server_listen_unix(const char *path);
/* Any CID, port 1024; false when the kernel has no vsock. */
bool server_listen_vsock(void);
/* The virtio-serial port agent.channel.0, now or whenever it turns up. */
void server_watch_ports(void);
/* Serve until DestroySandbox was answered and the answer has had time to arrive, or until SIGTERM. */
void server_run(void);

/* On vsock: a kernel that has its loopback carries also what containers say. They must get no answer. */
bool server_is_host(const struct sockaddr_storage *peer);

#endif
