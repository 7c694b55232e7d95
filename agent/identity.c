#define _GNU_SOURCE
#include "identity.h"

#include "inside.h"

#include <errno.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

/* --- /etc/passwd and /etc/group: name:password:number:… --- */

enum { FIELDS = 7, NAME = 0, NUMBER = 2, GROUP = 3, MEMBERS = 3, HOME = 5 };

struct line {
    char *fields[FIELDS];
    size_t count;
};

static bool parse_number(const char *text, uint32_t *number)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || value >= UINT32_MAX)
        return false;
    *number = (uint32_t)value;
    return true;
}

/* The text is taken apart where it lies. */
static bool next_line(char **rest, struct line *line)
{
    char *text = strsep(rest, "\n");
    if (text == NULL)
        return false;
    line->count = 0;
    while (text != NULL && line->count < FIELDS)
        line->fields[line->count++] = strsep(&text, ":");
    return true;
}

static bool has_number(const struct line *line, uint32_t *number)
{
    return line->count > NUMBER && parse_number(line->fields[NUMBER], number);
}

/* By its name, or by its number if `name` is NULL. `group` is the user's own one. */
static bool find_user(int root, const char *name, uint32_t *uid, uint32_t *group, char home[IDENTITY_HOME])
{
    struct buffer text = {0};
    struct line line;
    uint32_t number;
    bool found = false;
    if (inside_read(root, "/etc/passwd", &text)) {
        char *rest = (char *)text.memory + text.start;
        while (!found && next_line(&rest, &line)) {
            if (!has_number(&line, &number) || (name == NULL ? number != *uid : strcmp(line.fields[NAME], name) != 0))
                continue;
            found = true;
            *uid = number;
            if (line.count <= GROUP || !parse_number(line.fields[GROUP], group))
                *group = 0;
            if (line.count > HOME) /* as it is, like runc and Kata's agent: an empty one, too */
                snprintf(home, IDENTITY_HOME, "%s", line.fields[HOME]);
        }
    }
    buffer_reset(&text);
    return found;
}

static bool find_group(int root, const char *name, uint32_t *gid)
{
    struct buffer text = {0};
    struct line line;
    bool found = false;
    if (inside_read(root, "/etc/group", &text)) {
        char *rest = (char *)text.memory + text.start;
        while (!found && next_line(&rest, &line))
            found = has_number(&line, gid) && strcmp(line.fields[NAME], name) == 0;
    }
    buffer_reset(&text);
    return found;
}

static bool add_group(struct identity *identity, gid_t gid)
{
    if (identity->group_count == IDENTITY_GROUPS)
        return false;
    identity->groups[identity->group_count++] = gid;
    return true;
}

/* A number stands for itself, whether or not the container has it. */
static bool resolve_group(int root, const char *name, uint32_t *gid, struct failure *failure)
{
    if (parse_number(name, gid) || find_group(root, name, gid))
        return true;
    return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the container's /etc/group has no group %.100s", name);
}

static bool resolve_user(int root, const char *name, struct identity *identity, struct failure *failure)
{
    uint32_t uid = 0;
    uint32_t gid = 0;
    bool number = parse_number(name, &uid);
    if (!find_user(root, number ? NULL : name, &uid, &gid, identity->home) && !number)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the container's /etc/passwd has no user %.100s", name);
    identity->uid = uid;
    identity->gid = gid;
    return true;
}

static bool resolve_names(int root, const struct string_user *names, struct identity *identity,
                          struct failure *failure)
{
    uint32_t gid;
    if (names->uid[0] != '\0' && !resolve_user(root, names->uid, identity, failure))
        return false;
    if (names->gid[0] != '\0') {
        if (!resolve_group(root, names->gid, &gid, failure))
            return false;
        identity->gid = gid;
    }
    for (size_t i = 0; i < names->additional_gids.count; i++) {
        if (!resolve_group(root, names->additional_gids.items[i], &gid, failure))
            return false;
        if (!add_group(identity, gid))
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "more than %d groups", IDENTITY_GROUPS);
    }
    return true;
}

bool identity_resolve(int root, const struct oci_user *user, const struct string_user *names,
                      struct identity *identity, struct failure *failure)
{
    uint32_t uid = user == NULL ? 0 : user->uid;
    uint32_t unused;
    *identity = (struct identity){.uid = uid, .gid = user == NULL ? 0 : user->gid, .home = "/"};
    for (size_t i = 0; user != NULL && i < user->additional_gids.count; i++)
        if (!add_group(identity, user->additional_gids.items[i]))
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "more than %d groups", IDENTITY_GROUPS);
    find_user(root, NULL, &uid, &unused, identity->home);
    return names == NULL || resolve_names(root, names, identity, failure);
}

bool identity_apply(const struct identity *identity)
{
    return setgroups(identity->group_count, identity->groups) == 0 &&
           setresgid(identity->gid, identity->gid, identity->gid) == 0 &&
           setresuid(identity->uid, identity->uid, identity->uid) == 0;
}

/* --- limits --- */

struct limit {
    const char *name;
    int number;
};

static const struct limit limits[] = {
    {"RLIMIT_AS", RLIMIT_AS},
    {"RLIMIT_CORE", RLIMIT_CORE},
    {"RLIMIT_CPU", RLIMIT_CPU},
    {"RLIMIT_DATA", RLIMIT_DATA},
    {"RLIMIT_FSIZE", RLIMIT_FSIZE},
    {"RLIMIT_LOCKS", RLIMIT_LOCKS},
    {"RLIMIT_MEMLOCK", RLIMIT_MEMLOCK},
    {"RLIMIT_MSGQUEUE", RLIMIT_MSGQUEUE},
    {"RLIMIT_NICE", RLIMIT_NICE},
    {"RLIMIT_NOFILE", RLIMIT_NOFILE},
    {"RLIMIT_NPROC", RLIMIT_NPROC},
    {"RLIMIT_RSS", RLIMIT_RSS},
    {"RLIMIT_RTPRIO", RLIMIT_RTPRIO},
    {"RLIMIT_RTTIME", RLIMIT_RTTIME},
    {"RLIMIT_SIGPENDING", RLIMIT_SIGPENDING},
    {"RLIMIT_STACK", RLIMIT_STACK},
};

static const struct limit *find_limit(const char *name)
{
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++)
        if (strcmp(limits[i].name, name) == 0)
            return &limits[i];
    return NULL;
}

bool limits_check(const struct oci_process *process, struct failure *failure)
{
    for (size_t i = 0; i < process->rlimits.count; i++)
        if (find_limit(process->rlimits.items[i].type) == NULL)
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%.100s is no limit", process->rlimits.items[i].type);
    return true;
}

bool limits_apply(const struct oci_process *process)
{
    for (size_t i = 0; i < process->rlimits.count; i++) {
        const struct oci_rlimit *wanted = &process->rlimits.items[i];
        struct rlimit values = {.rlim_cur = wanted->soft, .rlim_max = wanted->hard};
        const struct limit *limit = find_limit(wanted->type);
        if (limit != NULL && setrlimit(limit->number, &values) != 0)
            return false;
    }
    return true;
}
