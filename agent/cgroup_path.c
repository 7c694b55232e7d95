#include "cgroup_path.h"

#include <stdio.h>
#include <string.h>

enum { LONGEST_NAME = 255 };

struct writer {
    char *path;
    size_t size;
    size_t used;
};

/* A cgroup of such a name would be in the way of the kernel's own files. */
static bool names_a_file(const char *name, size_t length)
{
    static const char *const prefixes[] = {"cgroup", "cpu",  "cpuset", "dmem", "hugetlb",    "io",
                                           "irq",    "memory", "misc", "pids", "perf_event", "rdma"};
    size_t prefix = strcspn(name, ".");
    if (prefix >= length)
        return false;
    for (size_t i = 0; i < sizeof prefixes / sizeof prefixes[0]; i++)
        if (strlen(prefixes[i]) == prefix && memcmp(prefixes[i], name, prefix) == 0)
            return true;
    return false;
}

static bool is_fit(const char *name, size_t length)
{
    if (length == 0 || length > LONGEST_NAME || strspn(name, ".") >= length || names_a_file(name, length))
        return false;
    for (size_t i = 0; i < length; i++)
        if ((unsigned char)name[i] <= ' ' || name[i] == 0x7f)
            return false;
    return true;
}

static bool add(struct writer *out, const char *name, size_t length)
{
    if (!is_fit(name, length) || out->used + length + 2 > out->size)
        return false;
    if (out->used > 0)
        out->path[out->used++] = '/';
    memcpy(out->path + out->used, name, length);
    out->used += length;
    out->path[out->used] = '\0';
    return true;
}

static bool add_components(struct writer *out, const char *asked)
{
    for (const char *at = asked; *at != '\0';) {
        size_t length = strcspn(at, "/");
        if (length > 0 && !add(out, at, length))
            return false;
        at += length + (at[length] == '/');
    }
    return true;
}

/* a-b.slice lies in a.slice; -.slice is the root. */
static bool add_slice(struct writer *out, const char *slice, size_t length)
{
    static const char suffix[] = ".slice";
    const size_t ending = sizeof suffix - 1;
    char name[LONGEST_NAME + 1];
    if (length == 0)
        return add(out, "system.slice", strlen("system.slice"));
    if (length <= ending || length > LONGEST_NAME || memcmp(slice + length - ending, suffix, ending) != 0)
        return false;
    size_t stem = length - ending;
    if (slice[0] == '-')
        return stem == 1;
    for (size_t end = 1; end <= stem; end++) {
        if (end < stem && slice[end] != '-')
            continue;
        if (slice[end - 1] == '-') /* an empty part, as in "a--b" */
            return false;
        int size = snprintf(name, sizeof name, "%.*s%s", (int)end, slice, suffix);
        if (!add(out, name, (size_t)size))
            return false;
    }
    return true;
}

static bool add_systemd(struct writer *out, const char *slice, const char *prefix, const char *name)
{
    char unit[2 * LONGEST_NAME];
    size_t length = strlen(name);
    bool is_slice = length > 6 && strcmp(name + length - 6, ".slice") == 0;
    size_t before = (size_t)(name - 1 - prefix);
    if (length == 0 || strchr(slice, '/') != NULL || !add_slice(out, slice, (size_t)(prefix - 1 - slice)))
        return false;
    int size = is_slice ? snprintf(unit, sizeof unit, "%s", name)
                        : snprintf(unit, sizeof unit, "%.*s%s%s.scope", (int)before, prefix, before > 0 ? "-" : "",
                                   name);
    return size > 0 && (size_t)size < sizeof unit && add(out, unit, (size_t)size);
}

/* slice:prefix:name */
static bool split_systemd(const char *asked, const char **prefix, const char **name)
{
    const char *first = strchr(asked, ':');
    const char *second = first == NULL ? NULL : strchr(first + 1, ':');
    if (asked[0] == '/' || second == NULL || strchr(second + 1, ':') != NULL)
        return false;
    *prefix = first + 1;
    *name = second + 1;
    return true;
}

bool cgroup_path(const char *asked, char *path, size_t size, struct failure *failure)
{
    struct writer out = {path, size, 0};
    const char *prefix;
    const char *name;
    path[0] = '\0';
    bool fits = split_systemd(asked, &prefix, &name) ? add_systemd(&out, asked, prefix, name)
                                                     : add_components(&out, asked);
    if (!fits || out.used == 0)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%.100s is no path that a cgroup can have", asked);
    return true;
}
