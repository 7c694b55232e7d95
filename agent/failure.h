/* Why something did not work: a ttRPC status and one line, filled in where it is known best. */
#ifndef AGENT_FAILURE_H
#define AGENT_FAILURE_H

#include <stdbool.h>

enum ttrpc_status {
    TTRPC_LATER = -1, /* never on the wire: not yet, call the method again (see struct ttrpc_call) */
    TTRPC_OK = 0,
    TTRPC_UNKNOWN = 2,
    TTRPC_INVALID_ARGUMENT = 3,
    TTRPC_DEADLINE_EXCEEDED = 4,
    TTRPC_NOT_FOUND = 5,
    TTRPC_ALREADY_EXISTS = 6,
    TTRPC_PERMISSION_DENIED = 7,
    TTRPC_RESOURCE_EXHAUSTED = 8,
    TTRPC_FAILED_PRECONDITION = 9,
    TTRPC_UNIMPLEMENTED = 12,
    TTRPC_INTERNAL = 13,
    TTRPC_UNAVAILABLE = 14,
};

struct failure {
    enum ttrpc_status status; /* TTRPC_OK: nothing failed */
    char reason[320]; /* UTF-8, cut where a character ends; names from outside are cut to 100 bytes by %.100s */
};

/* Always false, so that `return failure_set(failure, TTRPC_NOT_FOUND, "no container %.100s", id);` reads well. */
__attribute__((format(printf, 3, 4))) bool failure_set(struct failure *failure, enum ttrpc_status status,
                                                       const char *format, ...);
/* INTERNAL, and ": " and the text of errno behind it. */
__attribute__((format(printf, 2, 3))) bool failure_errno(struct failure *failure, const char *format, ...);

#endif
