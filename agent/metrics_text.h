/* Prometheus's text format 0.0.4: families of numbers with labels. */
#ifndef AGENT_METRICS_TEXT_H
#define AGENT_METRICS_TEXT_H

#include "buffer.h"

struct metrics {
    struct buffer text;
    const char *family; /* whose samples follow */
    size_t began; /* where its text does */
};

struct metrics_label {
    const char *name;
    const char *value; /* any bytes */
};

void metrics_family(struct metrics *metrics, const char *name, const char *kind, const char *help);
/* One line; labels end with a NULL name. */
void metrics_sample(struct metrics *metrics, const struct metrics_label *labels, double value);
void metrics_count(struct metrics *metrics, const struct metrics_label *labels, uint64_t value);
/* The one label that most families have. */
void metrics_item(struct metrics *metrics, const char *item, uint64_t value);
/* The family has as much text as one may have: machines with thousands of disks get the first of them. */
bool metrics_full(const struct metrics *metrics);

#endif
