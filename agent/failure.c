#include "failure.h"

#include "wire.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* What came from outside may be no UTF-8, and a cut may have left half a character: clients refuse such a status. */
static void make_utf8(char *text)
{
    for (size_t at = 0, size = strlen(text); at < size;) {
        size_t length = wire_utf8_length((struct span){(const uint8_t *)text + at, size - at});
        if (length == 0) {
            text[at] = '?';
            length = 1;
        }
        at += length;
    }
}

static void describe(struct failure *failure, const char *format, va_list arguments)
{
    vsnprintf(failure->reason, sizeof failure->reason, format, arguments);
    make_utf8(failure->reason);
}

bool failure_set(struct failure *failure, enum ttrpc_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    failure->status = status;
    describe(failure, format, arguments);
    va_end(arguments);
    return false;
}

bool failure_errno(struct failure *failure, const char *format, ...)
{
    int number = errno;
    va_list arguments;
    va_start(arguments, format);
    failure->status = TTRPC_INTERNAL;
    describe(failure, format, arguments);
    va_end(arguments);
    size_t used = strlen(failure->reason);
    snprintf(failure->reason + used, sizeof failure->reason - used, ": %s", strerror(number));
    return false;
}
