/* One JSON object per line, as Kata's tools read them. */
#ifndef AGENT_LOG_H
#define AGENT_LOG_H

#include "buffer.h"

enum log_level { LOG_CRITICAL, LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG, LOG_TRACE };

struct log_field {
    const char *key;
    enum { LOG_TEXT, LOG_BARE } kind; /* bare: a number or a boolean, already spelled */
    struct span value;
};

#define LOG_SPAN(name, span) {(name), LOG_TEXT, (span)}
#define LOG_STRING(name, text) {(name), LOG_TEXT, log_span(text)}
#define LOG_RAW(name, text) {(name), LOG_BARE, log_span(text)}
#define LOG_BOOL(name, truth) {(name), LOG_BARE, log_span((truth) ? "true" : "false")}
#define LOG_ERRNO(number) LOG_STRING("error", strerror(number))

/* LOG(LOG_INFO, "ttrpc", "listening", LOG_STRING("address", where)) */
#define LOG(level, subsystem, ...) LOG_FIELDS(level, subsystem, __VA_ARGS__, {NULL, LOG_TEXT, {NULL, 0}})
#define LOG_FIELDS(level, subsystem, message, ...) \
    log_write((level), (subsystem), (message), (const struct log_field[]){__VA_ARGS__})

struct span log_span(const char *text);
void log_write(enum log_level level, const char *subsystem, const char *message, const struct log_field *fields);
/* By the words of agent.log=; false for a word that is none of them. */
bool log_set_level(const char *word);
/* Lines go here from now on; kernel: each write is one record of the kernel's log. */
void log_to(int descriptor, bool kernel);
/* And each line also to `also`, which must not block. */
void log_tee(void (*also)(struct span line));

#endif
