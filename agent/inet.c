#include "inet.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

bool inet_parse(const char *text, struct inet *inet)
{
    memset(inet, 0, sizeof *inet);
    inet->family = strchr(text, ':') != NULL ? AF_INET6 : AF_INET;
    inet->size = inet->family == AF_INET6 ? 16 : 4;
    inet->prefix = (uint8_t)(8 * inet->size);
    return inet_pton(inet->family, text, inet->bytes) == 1;
}

bool inet_parse_mask(const char *text, struct inet *inet)
{
    size_t digits = strspn(text, "0123456789");
    unsigned value = 0;
    if (digits == 0 || digits > 3 || text[digits] != '\0')
        return false;
    for (size_t i = 0; i < digits; i++)
        value = 10 * value + (unsigned)(text[i] - '0');
    inet->prefix = (uint8_t)value;
    return value <= 8u * inet->size;
}

bool inet_parse_network(const char *text, struct inet *inet)
{
    char address[INET6_ADDRSTRLEN];
    const char *slash = strchr(text, '/');
    if (slash == NULL)
        return inet_parse(text, inet);
    size_t size = (size_t)(slash - text);
    if (size >= sizeof address)
        return false;
    memcpy(address, text, size);
    address[size] = '\0';
    return inet_parse(address, inet) && inet_parse_mask(slash + 1, inet);
}

bool inet_take(int family, const uint8_t *bytes, size_t size, unsigned prefix, struct inet *inet)
{
    size_t right = family == AF_INET ? 4 : family == AF_INET6 ? 16 : 0;
    if (right == 0 || size != right || prefix > 8 * right)
        return false;
    *inet = (struct inet){.family = family, .size = (uint8_t)size, .prefix = (uint8_t)prefix};
    memcpy(inet->bytes, bytes, size);
    return true;
}

void inet_print(const struct inet *inet, char text[INET_TEXT])
{
    if (inet_ntop(inet->family, inet->bytes, text, INET_TEXT) == NULL)
        text[0] = '\0';
}

void inet_print_network(const struct inet *inet, char text[INET_TEXT])
{
    inet_print(inet, text);
    size_t used = strlen(text);
    snprintf(text + used, INET_TEXT - used, "/%u", inet->prefix);
}

static int digit(char letter)
{
    static const char digits[] = "0123456789abcdef";
    const char *at = letter == '\0' ? NULL : strchr(digits, letter | ('A' <= letter && letter <= 'F' ? 0x20 : 0));
    return at == NULL ? -1 : (int)(at - digits);
}

bool inet_parse_mac(const char *text, uint8_t mac[INET_MAC])
{
    if (strlen(text) != INET_MAC_TEXT - 1)
        return false;
    for (int i = 0; i < INET_MAC; i++) {
        const char *at = text + 3 * i;
        int high = digit(at[0]);
        int low = digit(at[1]);
        if (high < 0 || low < 0 || (i < INET_MAC - 1 && at[2] != ':'))
            return false;
        mac[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

void inet_print_mac(const uint8_t mac[INET_MAC], char text[INET_MAC_TEXT])
{
    /* In capitals, as Kata's agent does. */
    snprintf(text, INET_MAC_TEXT, "%02X:%02X:%02X:%02X:%02X:%02X", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]);
}
