#define _GNU_SOURCE
#include "kernel_settings.h"

#include "inside.h"
#include "mountfd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static bool starts(const char *text, const char *start)
{
    return strncmp(text, start, strlen(start)) == 0;
}

static bool is_of_ipc(const char *name)
{
    static const char *const names[] = {
        "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
        "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    return starts(name, "fs.mqueue.");
}

static bool in_scope(const char *name, const struct settings_scope *scope)
{
    return (scope->ipc && is_of_ipc(name)) || (scope->net && starts(name, "net.")) ||
           (scope->uts && strcmp(name, "kernel.domainname") == 0);
}

/* Kubernetes allows slashes as well, and a name of an interface may have dots then. */
static bool spell(const char *name, char *dotted, size_t size)
{
    if ((size_t)snprintf(dotted, size, "%s", name) >= size || strstr(name, "..") != NULL)
        return false;
    if (strchr(name, '/') != NULL && strcspn(name, "/") < strcspn(name, "."))
        for (char *at = dotted; *at != '\0'; at++)
            *at = *at == '/' ? '.' : *at == '.' ? '/' : *at;
    return true;
}

bool settings_check(const struct pairs *sysctl, const struct settings_scope *scope, struct failure *failure)
{
    char name[256];
    for (size_t i = 0; i < sysctl->count; i++)
        if (!spell(sysctl->items[i].key, name, sizeof name) || !in_scope(name, scope))
            return failure_set(failure, TTRPC_INVALID_ARGUMENT,
                               "the sysctl %.100s does not belong to a namespace of the container's own",
                               sysctl->items[i].key);
    return true;
}

static bool write_file(int proc, const char *path, const char *value)
{
    int file = inside_open(proc, path, O_WRONLY);
    if (file < 0)
        return false;
    size_t size = strlen(value);
    bool written = write(file, value, size) == (ssize_t)size;
    int number = errno;
    close(file);
    errno = number;
    return written;
}

static bool write_sysctl(int proc, const struct pair *setting)
{
    char name[256];
    char path[272];
    if (!spell(setting->key, name, sizeof name))
        return false;
    for (char *at = name; *at != '\0'; at++)
        *at = *at == '.' ? '/' : *at == '/' ? '.' : *at;
    snprintf(path, sizeof path, "sys/%s", name);
    return write_file(proc, path, setting->value);
}

static bool write_all(int proc, const struct pairs *sysctl, int64_t oom_score_adj, struct failure *failure)
{
    char number[24];
    for (size_t i = 0; sysctl != NULL && i < sysctl->count; i++)
        if (!write_sysctl(proc, &sysctl->items[i]))
            return failure_errno(failure, "cannot set the sysctl %.100s", sysctl->items[i].key);
    snprintf(number, sizeof number, "%lld", (long long)oom_score_adj);
    if (!write_file(proc, "self/oom_score_adj", number))
        return failure_errno(failure, "cannot set oom_score_adj");
    return true;
}

bool settings_apply(const struct pairs *sysctl, int64_t oom_score_adj, struct failure *failure)
{
    static const struct texts none = {NULL, 0};
    int proc = mountfd_new("proc", "proc", &none, "nothing", failure);
    if (proc < 0)
        return false;
    bool done = write_all(proc, sysctl, oom_score_adj, failure);
    close(proc);
    return done;
}
