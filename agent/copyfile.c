#define _GNU_SOURCE
#include "copyfile.h"

#include "place.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SHARED "/run/kata-containers/shared/containers"

enum {
    USUAL_DIRECTORY_MODE = 0750, /* what Kata's runtime asks for */
    MODE_BITS = 07777,
};

/* Where something is to come to be: containers see these directories, and may change them under our hands. */
struct target {
    int parent;
    char name[NAME_MAX + 1];
    char spare[32]; /* beside it, until it is whole; not made of the name, which may be as long as names can be */
    char path[PLACE_SIZE];
};

static bool say_errno(const struct target *target, struct failure *failure)
{
    return failure_errno(failure, "cannot copy to %.200s", target->path);
}

/* --- the directory that it goes to --- */

static bool give(int thing, const struct copy_file_request *request, uint32_t mode)
{
    return fchownat(thing, "", (uid_t)request->uid, (gid_t)request->gid, AT_EMPTY_PATH) == 0 &&
           chmod(place_name(thing).text, mode & MODE_BITS) == 0;
}

/* One step down. What is not there is made; what is there stays as it is. */
static int enter(int directory, const char *name, const struct copy_file_request *request)
{
    bool made = mkdirat(directory, name, 0700) == 0;
    if (!made && errno != EEXIST)
        return -1;
    int next = place_open(directory, name, O_PATH | O_DIRECTORY);
    uint32_t mode = request->dir_mode != 0 ? request->dir_mode : USUAL_DIRECTORY_MODE;
    if (next >= 0 && made && !give(next, request, mode)) {
        int number = errno;
        close(next);
        errno = number;
        return -1;
    }
    return next;
}

static bool open_parent(struct target *target, const struct copy_file_request *request)
{
    bool made;
    char parts[PLACE_SIZE];
    snprintf(parts, sizeof parts, "%s", target->path + strlen(SHARED "/"));
    target->parent = place_make(SHARED, 0755, &made);
    char *rest = parts;
    for (char *part = strsep(&rest, "/"); rest != NULL && target->parent >= 0; part = strsep(&rest, "/")) {
        int next = enter(target->parent, part, request);
        int number = errno;
        close(target->parent);
        errno = number;
        target->parent = next;
    }
    return target->parent >= 0;
}

/* FNV-1a. */
static uint64_t hash(const char *text)
{
    uint64_t value = 0xcbf29ce484222325;
    for (; *text != '\0'; text++)
        value = (value ^ (unsigned char)*text) * 0x100000001b3;
    return value;
}

static bool find_target(struct target *target, const struct copy_file_request *request, struct failure *failure)
{
    target->parent = -1;
    if (!place_normalize(request->path, "the path", target->path, failure))
        return false;
    if (!place_is_below(target->path, SHARED) || strlen(target->path) == strlen(SHARED))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "files are copied to below " SHARED ", not to %.100s",
                           target->path);
    const char *name = strrchr(target->path, '/') + 1;
    if (strlen(name) > NAME_MAX) {
        errno = ENAMETOOLONG;
        return say_errno(target, failure);
    }
    strcpy(target->name, name);
    snprintf(target->spare, sizeof target->spare, ".%016llx.tmp", (unsigned long long)hash(name));
    return open_parent(target, request) || say_errno(target, failure);
}

/* --- directories and links --- */

static bool make_directory(const struct target *target, const struct copy_file_request *request)
{
    /* Something else may be there; a directory keeps what is in it. */
    if (unlinkat(target->parent, target->name, 0) != 0 && errno != ENOENT && errno != EISDIR)
        return false;
    if (mkdirat(target->parent, target->name, 0700) != 0 && errno != EEXIST)
        return false;
    int made = place_open(target->parent, target->name, O_PATH | O_DIRECTORY);
    if (made < 0)
        return false;
    bool done = give(made, request, request->file_mode);
    int number = errno;
    close(made);
    errno = number;
    return done;
}

static bool remove_spare(const struct target *target)
{
    return unlinkat(target->parent, target->spare, 0) == 0 || errno == ENOENT;
}

/* It stands for the other one from one moment to the next. */
static bool put_in_place(const struct target *target)
{
    if (renameat(target->parent, target->spare, target->parent, target->name) == 0)
        return true;
    int number = errno;
    remove_spare(target);
    errno = number;
    return false;
}

static bool make_link(const struct target *target, const struct copy_file_request *request)
{
    char aim[PLACE_SIZE];
    if (request->data.size == 0 || request->data.size >= sizeof aim ||
        memchr(request->data.data, '\0', request->data.size) != NULL) {
        errno = EINVAL;
        return false;
    }
    memcpy(aim, request->data.data, request->data.size);
    aim[request->data.size] = '\0';
    uid_t uid = (uid_t)request->uid;
    gid_t gid = (gid_t)request->gid;
    return remove_spare(target) && symlinkat(aim, target->parent, target->spare) == 0 &&
           fchownat(target->parent, target->spare, uid, gid, AT_SYMLINK_NOFOLLOW) == 0 && put_in_place(target);
}

/* --- files --- */

/* Pieces follow one upon the other, so that nobody can ask for a file with a hole of a terabyte, and a file is
 * whole when it is as long as it should be. */
static bool check_piece(const struct copy_file_request *request, struct failure *failure)
{
    if (request->file_size < 0 || request->offset < 0 || request->offset > request->file_size ||
        request->data.size > (uint64_t)(request->file_size - request->offset))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "a piece of %zu bytes at %lld is not part of %lld bytes",
                           request->data.size, (long long)request->offset, (long long)request->file_size);
    return true;
}

/* What a container has put there in the meantime is not written to: a pipe, another name of some file. */
static bool is_ours(int file, struct stat *status)
{
    return fstat(file, status) == 0 && S_ISREG(status->st_mode) && status->st_nlink == 1 &&
           status->st_uid == geteuid();
}

static int open_spare(const struct target *target, int64_t offset, struct failure *failure)
{
    struct stat status;
    const int flags = O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
    if (offset == 0) {
        int made = remove_spare(target) ? openat(target->parent, target->spare, flags | O_CREAT | O_EXCL, 0600) : -1;
        if (made < 0)
            say_errno(target, failure);
        return made;
    }
    int file = openat(target->parent, target->spare, flags);
    if (file >= 0 && is_ours(file, &status) && status.st_size >= offset)
        return file;
    failure_set(failure, TTRPC_FAILED_PRECONDITION, "what comes before %lld of %.200s was not copied",
                (long long)offset, target->path);
    if (file >= 0)
        close(file);
    return -1;
}

static bool write_all(int file, struct span data, int64_t offset)
{
    while (data.size > 0) {
        ssize_t written = pwrite(file, data.data, data.size, offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return false;
        data.data += written;
        data.size -= (size_t)written;
        offset += written;
    }
    return true;
}

static bool finish(int file, const struct target *target, const struct copy_file_request *request)
{
    struct stat status;
    if (fstat(file, &status) != 0)
        return false;
    if (status.st_size != request->file_size)
        return true; /* more is to come */
    /* In this order: a change of owner takes set-id bits off. */
    return fchown(file, (uid_t)request->uid, (gid_t)request->gid) == 0 &&
           fchmod(file, request->file_mode & MODE_BITS) == 0 && put_in_place(target);
}

static bool copy_piece(const struct target *target, const struct copy_file_request *request, struct failure *failure)
{
    int file = open_spare(target, request->offset, failure);
    if (file < 0)
        return false;
    bool done = write_all(file, request->data, request->offset) && finish(file, target, request);
    if (!done) {
        say_errno(target, failure);
        remove_spare(target);
    }
    close(file);
    return done;
}

static bool copy(const struct target *target, const struct copy_file_request *request, struct failure *failure)
{
    switch (request->file_mode & S_IFMT) {
    case S_IFDIR:
        return make_directory(target, request) || say_errno(target, failure);
    case S_IFLNK:
        return make_link(target, request) || say_errno(target, failure);
    default:
        return copy_piece(target, request, failure);
    }
}

static bool check_kind(const struct copy_file_request *request, struct failure *failure)
{
    uint32_t kind = request->file_mode & S_IFMT;
    if (kind == S_IFDIR || kind == S_IFLNK)
        return true;
    if (kind == S_IFREG || kind == 0)
        return check_piece(request, failure);
    return failure_set(failure, TTRPC_INVALID_ARGUMENT, "files, directories and links can be copied, but not mode %o",
                       request->file_mode);
}

static enum ttrpc_status copy_file(struct ttrpc_call *call)
{
    struct copy_file_request request;
    struct target target;
    if (!ttrpc_decode(call, &message_copy_file_request, &request))
        return call->failure.status;
    bool done = check_kind(&request, &call->failure) && find_target(&target, &request, &call->failure);
    if (done) {
        done = copy(&target, &request, &call->failure);
        close(target.parent);
    }
    return done ? TTRPC_OK : call->failure.status;
}

const struct ttrpc_method_row copyfile_calls[] = {
    {"CopyFile", copy_file},
    {NULL, NULL},
};
