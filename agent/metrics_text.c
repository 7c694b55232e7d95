#include "metrics_text.h"

#include "wire.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { LARGEST_FAMILY = 160 * 1024 }; /* five families grow with the machine, and an answer stays below 1 MiB */

static void put(struct metrics *metrics, const char *text)
{
    buffer_append(&metrics->text, text, strlen(text));
}

/* Inside of quotes; UTF-8, since it becomes a string of protobuf. */
static void put_escaped(struct metrics *metrics, const char *value)
{
    size_t size = strlen(value);
    for (size_t at = 0; at < size;) {
        size_t length = wire_utf8_length((struct span){(const uint8_t *)value + at, size - at});
        if (length == 0)
            put(metrics, "?");
        else if (value[at] == '\n')
            put(metrics, "\\n");
        else {
            if (value[at] == '\\' || value[at] == '"')
                put(metrics, "\\");
            buffer_append(&metrics->text, value + at, length);
        }
        at += length > 0 ? length : 1;
    }
}

void metrics_family(struct metrics *metrics, const char *name, const char *kind, const char *help)
{
    char line[256];
    snprintf(line, sizeof line, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind);
    metrics->began = metrics->text.size;
    metrics->family = name;
    put(metrics, line);
}

static void put_sample(struct metrics *metrics, const struct metrics_label *labels, const char *value)
{
    put(metrics, metrics->family);
    for (const struct metrics_label *label = labels; label->name != NULL; label++) {
        put(metrics, label == labels ? "{" : ",");
        put(metrics, label->name);
        put(metrics, "=\"");
        put_escaped(metrics, label->value);
        put(metrics, "\"");
    }
    put(metrics, labels->name != NULL ? "} " : " ");
    put(metrics, value);
    put(metrics, "\n");
}

void metrics_sample(struct metrics *metrics, const struct metrics_label *labels, double value)
{
    char text[64];
    snprintf(text, sizeof text, "%.15g", value);
    put_sample(metrics, labels, text);
}

void metrics_count(struct metrics *metrics, const struct metrics_label *labels, uint64_t value)
{
    char text[32];
    snprintf(text, sizeof text, "%" PRIu64, value);
    put_sample(metrics, labels, text);
}

void metrics_item(struct metrics *metrics, const char *item, uint64_t value)
{
    metrics_count(metrics, (const struct metrics_label[]){{"item", item}, {NULL, NULL}}, value);
}

bool metrics_full(const struct metrics *metrics)
{
    return metrics->text.size - metrics->began > LARGEST_FAMILY;
}
