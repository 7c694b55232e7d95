#define _GNU_SOURCE
#include "inside.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    ROUNDS = 512, /* each makes one name or follows one dangling link */
    RACES = 16, /* so often is EAGAIN taken for an accident: somebody renames while the kernel walks */
    LARGEST_TEXT = 1024 * 1024,
};

static int open_beneath(int root, const char *path, int flags, uint64_t resolve)
{
    struct open_how how = {
        .flags = (uint64_t)(unsigned int)(flags | O_CLOEXEC),
        .resolve = resolve | RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
    };
    long fd = -1;
    for (int i = 0; i < RACES; i++) {
        fd = syscall(SYS_openat2, root, path[0] == '\0' ? "/" : path, &how, sizeof how);
        if (fd >= 0 || (errno != EAGAIN && errno != EINTR))
            break;
    }
    return (int)fd;
}

int inside_open(int root, const char *path, int flags)
{
    return open_beneath(root, path, flags, 0);
}

int inside_open_straight(int root, const char *path, int flags)
{
    return open_beneath(root, path, flags, RESOLVE_NO_SYMLINKS);
}

bool inside_is_magic(const char *path)
{
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_MAGICLINKS};
    long fd = syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    if (fd >= 0)
        close((int)fd);
    return fd < 0 && errno == ELOOP;
}

/* The first name in `path` that does not lead anywhere: where it begins and ends, and the directory before it. */
struct gap {
    size_t begin;
    size_t end;
    int parent;
};

static bool find_gap(int root, const char *path, struct gap *gap)
{
    char prefix[PATH_MAX];
    size_t at = 0;
    gap->parent = inside_open(root, "/", O_PATH | O_DIRECTORY);
    while (gap->parent >= 0) {
        gap->begin = at + strspn(path + at, "/");
        gap->end = gap->begin + strcspn(path + gap->begin, "/");
        if (gap->end == gap->begin)
            break; /* all of it is there by now */
        memcpy(prefix, path, gap->end);
        prefix[gap->end] = '\0';
        int next = inside_open(root, prefix, O_PATH | O_DIRECTORY);
        if (next < 0 && errno == ENOENT)
            return true;
        int number = errno;
        close(gap->parent);
        gap->parent = next;
        errno = number;
        at = gap->end;
    }
    return gap->parent >= 0;
}

/* The name is a link to what is not there: `path` goes on where it points to. */
static bool follow(char *path, const struct gap *gap)
{
    char name[NAME_MAX + 1];
    char target[PATH_MAX];
    char longer[2 * PATH_MAX];
    if (gap->end - gap->begin > NAME_MAX) {
        errno = ENAMETOOLONG;
        return false;
    }
    memcpy(name, path + gap->begin, gap->end - gap->begin);
    name[gap->end - gap->begin] = '\0';
    ssize_t length = readlinkat(gap->parent, name, target, sizeof target - 1);
    if (length < 0)
        return errno == EINVAL; /* no link: somebody made it meanwhile */
    target[length] = '\0';
    int before = target[0] == '/' ? 0 : (int)gap->begin;
    int size = snprintf(longer, sizeof longer, "%.*s%s%s", before, path, target, path + gap->end);
    if (size >= PATH_MAX) {
        errno = ENAMETOOLONG;
        return false;
    }
    memcpy(path, longer, (size_t)size + 1);
    return true;
}

static bool make_name(int parent, const char *name, bool directory)
{
    if (directory)
        return mkdirat(parent, name, 0755) == 0;
    int fd = openat(parent, name, O_CREAT | O_EXCL | O_NOFOLLOW | O_WRONLY | O_CLOEXEC, 0644);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

static bool fill_gap(int root, char *path, bool directory)
{
    struct gap gap = {0};
    char name[NAME_MAX + 1];
    if (!find_gap(root, path, &gap))
        return false;
    size_t length = gap.end - gap.begin;
    if (length > NAME_MAX) {
        close(gap.parent);
        errno = ENAMETOOLONG;
        return false;
    }
    memcpy(name, path + gap.begin, length);
    name[length] = '\0';
    bool last = path[gap.end + strspn(path + gap.end, "/")] == '\0';
    bool filled = length == 0 || make_name(gap.parent, name, directory || !last) ||
                  (errno == EEXIST && follow(path, &gap));
    int number = errno;
    close(gap.parent);
    errno = number;
    return filled;
}

static int make(int root, const char *wanted, bool directory)
{
    char path[PATH_MAX];
    if ((size_t)snprintf(path, sizeof path, "%s", wanted) >= sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    for (int i = 0; i < ROUNDS; i++) {
        int fd = inside_open(root, path, O_PATH | (directory ? O_DIRECTORY : 0));
        if (fd >= 0 || errno != ENOENT)
            return fd;
        if (!fill_gap(root, path, directory))
            return -1;
    }
    errno = ELOOP;
    return -1;
}

int inside_make_directory(int root, const char *path)
{
    return make(root, path, true);
}

int inside_make_file(int root, const char *path)
{
    return make(root, path, false);
}

int inside_make_parent(int root, const char *path, char *name, size_t size)
{
    char above[PATH_MAX];
    const char *slash = strrchr(path, '/');
    const char *last = slash == NULL ? path : slash + 1;
    size_t length = (size_t)(last - path);
    if (length >= sizeof above || strlen(last) >= size || last[0] == '\0' || strcmp(last, ".") == 0 ||
        strcmp(last, "..") == 0) {
        errno = EINVAL;
        return -1;
    }
    memcpy(above, path, length);
    above[length] = '\0';
    snprintf(name, size, "%s", last);
    return inside_make_directory(root, above);
}

static bool is_regular(int fd)
{
    struct stat state;
    return fd >= 0 && fstat(fd, &state) == 0 && S_ISREG(state.st_mode) && state.st_size <= LARGEST_TEXT;
}

/* Opening a device may do something: it is looked at before. */
static int open_regular(int root, const char *path)
{
    int found = inside_open(root, path, O_PATH);
    bool regular = is_regular(found);
    if (found >= 0)
        close(found);
    if (!regular)
        return -1;
    int file = inside_open(root, path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
    if (file >= 0 && !is_regular(file)) {
        close(file);
        return -1;
    }
    return file;
}

bool inside_read(int root, const char *path, struct buffer *text)
{
    int file = open_regular(root, path);
    if (file < 0)
        return false;
    ssize_t got = 1;
    while (got > 0 && text->size <= LARGEST_TEXT) {
        uint8_t *room = buffer_reserve(text, 4096);
        got = room == NULL ? -1 : read(file, room, 4096);
        if (got > 0)
            buffer_commit(text, (size_t)got);
    }
    close(file);
    buffer_append(text, "", 1);
    return got == 0 && !text->failed;
}
