#define _GNU_SOURCE
#include "log.h"

#include "version.h"
#include "wire.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define KERNEL_PREFIX "<6>" /* the level of what follows, in the kernel's log */

enum {
    /* PIPE_BUF: a pipe that polls writable takes this much without blocking. */
    LINE_SIZE = 4096,
    CLOSING = 8, /* kept for the quote, the brace and the newline */
    PATIENCE_MS = 100, /* for a console that is full; then the line is dropped */
    /* A host that sends nonsense must not fill the console: lines come out of a bucket. */
    BUCKET_LINES = 64,
    LINES_PER_SECOND = 16,
};

struct line {
    char text[LINE_SIZE];
    size_t size;
};

static enum log_level threshold = LOG_INFO;
static int out = STDOUT_FILENO;
static bool kernel_log;
static unsigned long suppressed;
static void (*tee)(struct span line);

struct span log_span(const char *text)
{
    return (struct span){(const uint8_t *)text, strlen(text)};
}

bool log_set_level(const char *word)
{
    static const struct {
        const char *word;
        enum log_level level;
    } words[] = {
        {"fatal", LOG_CRITICAL}, {"panic", LOG_CRITICAL}, {"critical", LOG_CRITICAL},
        {"error", LOG_ERROR},    {"warn", LOG_WARN},      {"warning", LOG_WARN},
        {"info", LOG_INFO},      {"debug", LOG_DEBUG},    {"trace", LOG_TRACE},
    };
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (strcmp(word, words[i].word) == 0) {
            threshold = words[i].level;
            return true;
        }
    return false;
}

void log_to(int descriptor, bool kernel)
{
    out = descriptor;
    kernel_log = kernel;
}

void log_tee(void (*also)(struct span line))
{
    tee = also;
}

static bool room(const struct line *line, size_t size)
{
    return line->size + size + CLOSING <= LINE_SIZE;
}

static void put(struct line *line, const char *text, size_t size)
{
    memcpy(line->text + line->size, text, size);
    line->size += size;
}

static void put_escaped(struct line *line, struct span value)
{
    for (size_t at = 0; at < value.size;) {
        size_t length = wire_utf8_length((struct span){value.data + at, value.size - at});
        unsigned char byte = value.data[at];
        char escape[8];
        const char *text = escape;
        size_t size;
        if (length == 0) {
            text = "\\ufffd";
            size = 6;
            length = 1;
        } else if (byte < 0x20 || byte == 0x7f) { /* a terminal would act on them */
            size = (size_t)snprintf(escape, sizeof escape, "\\u%04x", byte);
        } else if (byte == '"' || byte == '\\') {
            escape[0] = '\\';
            escape[1] = (char)byte;
            size = 2;
        } else {
            text = (const char *)value.data + at;
            size = length;
        }
        if (!room(line, size))
            return;
        put(line, text, size);
        at += length;
    }
}

static void put_field(struct line *line, const struct log_field *field)
{
    size_t key = strlen(field->key);
    if (!room(line, key + 8 + (field->kind == LOG_BARE ? field->value.size : 0)))
        return;
    if (line->text[line->size - 1] != '{')
        put(line, ",", 1);
    put(line, "\"", 1);
    put(line, field->key, key);
    put(line, "\":", 2);
    if (field->kind == LOG_BARE) {
        put(line, (const char *)field->value.data, field->value.size);
        return;
    }
    put(line, "\"", 1);
    put_escaped(line, field->value);
    put(line, "\"", 1);
}

static bool allowed(void)
{
    static long tokens = BUCKET_LINES * 1000L;
    static long long filled_ms;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long long now_ms = (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    long long gained = (now_ms - filled_ms) * LINES_PER_SECOND;
    filled_ms = now_ms;
    tokens = gained > BUCKET_LINES * 1000L - tokens ? BUCKET_LINES * 1000L : tokens + (long)gained;
    if (tokens < 1000)
        return false;
    tokens -= 1000;
    return true;
}

static void write_line(const struct line *line)
{
    /* A serial port whose interrupts never come stays full: that must cost us one wait, not one for each line. */
    static bool stuck;
    struct pollfd ready = {.fd = out, .events = POLLOUT};
    stuck = poll(&ready, 1, stuck ? 0 : PATIENCE_MS) != 1 || (ready.revents & POLLOUT) == 0;
    if (stuck) {
        suppressed++;
        return;
    }
    for (size_t done = 0; done < line->size;) {
        ssize_t wrote = write(out, line->text + done, line->size - done);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            return;
        done += (size_t)wrote;
    }
}

void log_write(enum log_level level, const char *subsystem, const char *message, const struct log_field *fields)
{
    static const char *const names[] = {"CRITICAL", "ERROR", "WARN", "INFO", "DEBUG", "TRACE"};
    if (level > threshold)
        return;
    if (!allowed()) {
        suppressed++;
        return;
    }
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    char ts[80];
    char pid[24];
    char missed[24];
    snprintf(ts, sizeof ts, "%04d-%02d-%02dT%02d:%02d:%02d.%09ldZ", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday,
             utc.tm_hour, utc.tm_min, utc.tm_sec, now.tv_nsec);
    snprintf(pid, sizeof pid, "%ld", (long)getpid());
    const struct log_field common[] = {
        LOG_STRING("msg", message),
        LOG_STRING("level", names[level]),
        LOG_STRING("ts", ts),
        LOG_STRING("name", "osbuilder-agent"),
        LOG_STRING("pid", pid), /* text, as in Kata's lines */
        LOG_STRING("source", "agent"),
        LOG_STRING("version", AGENT_VERSION),
        LOG_STRING("subsystem", subsystem),
    };
    static struct line line;
    line.size = 0;
    if (kernel_log)
        put(&line, KERNEL_PREFIX, strlen(KERNEL_PREFIX));
    put(&line, "{", 1);
    for (size_t i = 0; i < sizeof common / sizeof common[0]; i++)
        put_field(&line, &common[i]);
    if (suppressed > 0) {
        snprintf(missed, sizeof missed, "%lu", suppressed);
        const struct log_field field = LOG_RAW("suppressed", missed);
        put_field(&line, &field);
        suppressed = 0;
    }
    for (; fields->key != NULL; fields++)
        put_field(&line, fields);
    put(&line, "}\n", 2);
    write_line(&line);
    size_t prefix = kernel_log ? strlen(KERNEL_PREFIX) : 0;
    if (tee != NULL) /* last: it may have something to log itself */
        tee((struct span){(const uint8_t *)line.text + prefix, line.size - prefix});
}
