/* /proc/self/mountinfo, line by line. */
#ifndef AGENT_MOUNTINFO_H
#define AGENT_MOUNTINFO_H

#include <stdbool.h>
#include <stddef.h>

/* A line: id parent maj:min root target options [tags…] - type source options. */
struct mountinfo {
    char *device; /* maj:min; major 0: there is none */
    char *target;
    char *options;
    char *type;
    char *source;
    char *super_options;
};

/* Take a line apart, in place. False: it is none. */
bool mountinfo_split(char *line, struct mountinfo *mount);
/* Its device's name in /dev. */
void mountinfo_device(const struct mountinfo *mount, char *name, size_t size);

#endif
