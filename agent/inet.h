/* Addresses as text and as bytes: IPv4, IPv6, and those of Ethernet. */
#ifndef AGENT_INET_H
#define AGENT_INET_H

#include <arpa/inet.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { INET_MAC = 6, INET_TEXT = INET6_ADDRSTRLEN + 4 /* "/128" */, INET_MAC_TEXT = 3 * INET_MAC };

struct inet {
    int family; /* AF_INET, AF_INET6 */
    uint8_t bytes[16]; /* in network order */
    uint8_t size; /* 4 or 16 */
    uint8_t prefix; /* bits */
};

/* "192.0.2.1", of which the prefix is the whole. */
bool inet_parse(const char *text, struct inet *inet);
/* "192.0.2.0/24", or without a length as above. */
bool inet_parse_network(const char *text, struct inet *inet);
/* The prefix: "24". */
bool inet_parse_mask(const char *text, struct inet *inet);
/* `bytes` as the kernel sends them; false when no address of that family has that size. */
bool inet_take(int family, const uint8_t *bytes, size_t size, unsigned prefix, struct inet *inet);
void inet_print(const struct inet *inet, char text[INET_TEXT]);
void inet_print_network(const struct inet *inet, char text[INET_TEXT]);

/* "02:00:5e:10:00:01" */
bool inet_parse_mac(const char *text, uint8_t mac[INET_MAC]);
void inet_print_mac(const uint8_t mac[INET_MAC], char text[INET_MAC_TEXT]);

#endif
