#define _GNU_SOURCE
#include "place.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define VAR_RUN "/var/run"

static bool is_dots(const char *part, size_t length)
{
    return length == 2 && part[0] == '.' && part[1] == '.';
}

static bool squeeze(const char *path, char *normal, size_t size)
{
    size_t used = 0;
    for (const char *at = path; *at != '\0';) {
        at += strspn(at, "/");
        size_t length = strcspn(at, "/");
        if (is_dots(at, length))
            return false;
        if (length > 0 && !(length == 1 && at[0] == '.')) {
            if (used + length + 2 > size)
                return false;
            normal[used++] = '/';
            memcpy(normal + used, at, length);
            used += length;
        }
        at += length;
    }
    if (used == 0)
        normal[used++] = '/';
    normal[used] = '\0';
    return true;
}

bool place_normalize(const char *path, const char *what, char normal[PLACE_SIZE], struct failure *failure)
{
    if (path[0] != '/')
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%s is no absolute path: %.100s", what, path);
    if (!squeeze(path, normal, PLACE_SIZE))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%s is too long or has .. in it: %.100s", what, path);
    if (place_is_below(normal, VAR_RUN))
        memmove(normal, normal + strlen("/var"), strlen(normal) - strlen("/var") + 1);
    return true;
}

bool place_is_below(const char *path, const char *parent)
{
    size_t length = strlen(parent);
    return strncmp(path, parent, length) == 0 && (path[length] == '\0' || path[length] == '/');
}

int place_open(int directory, const char *path, int flags)
{
    struct open_how how = {
        .flags = (unsigned int)(flags | O_CLOEXEC),
        .resolve = RESOLVE_NO_SYMLINKS | (directory == AT_FDCWD ? 0 : RESOLVE_BENEATH),
    };
    return (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
}

/* One step down, made if it is not there. Another may make it first. */
static int enter(int directory, const char *name, mode_t mode, bool *made)
{
    int next = place_open(directory, name, O_PATH | O_DIRECTORY);
    *made = next < 0 && errno == ENOENT && mkdirat(directory, name, mode) == 0;
    if (next < 0 && (*made || errno == EEXIST))
        next = place_open(directory, name, O_PATH | O_DIRECTORY);
    return next;
}

int place_make(const char *normal, mode_t mode, bool *made)
{
    char parts[PLACE_SIZE];
    snprintf(parts, sizeof parts, "%s", normal + 1);
    *made = false;
    int directory = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    char *rest = parts;
    for (char *part; directory >= 0 && (part = strsep(&rest, "/")) != NULL && *part != '\0';) {
        int next = enter(directory, part, mode, made);
        int number = errno;
        close(directory);
        errno = number;
        directory = next;
    }
    return directory;
}

int place_open_parent(const char *normal, const char **name)
{
    char parent[PLACE_SIZE];
    const char *slash = strrchr(normal, '/');
    *name = slash + 1;
    snprintf(parent, sizeof parent, "%.*s", slash == normal ? 1 : (int)(slash - normal), normal);
    return place_open(AT_FDCWD, parent, O_PATH | O_DIRECTORY);
}

struct place_name place_name(int descriptor)
{
    struct place_name name;
    snprintf(name.text, sizeof name.text, "/proc/self/fd/%d", descriptor);
    return name;
}
