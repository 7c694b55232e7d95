#define _GNU_SOURCE
#include "overlay.h"

#include "log.h"
#include "tree.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define BUNDLES "/run/kata-containers"
#define WRITABLE "io.katacontainers.fs-opt.overlay-rw" /* upper and work directory are the agent's to make */

enum { MOST_LAYERS = 200 }; /* their names fit into a page */

/* Directories of the options as descriptors: the kernel is given names of these, so nothing can change in between. */
struct layers {
    int descriptors[MOST_LAYERS];
    size_t count;
};

static void close_layers(struct layers *layers)
{
    for (size_t i = 0; i < layers->count; i++)
        close(layers->descriptors[i]);
}

/* Append `text` and the name of the directory `path` to an option. */
static bool add_directory(struct layers *layers, const char *path, bool make, char *option, size_t size,
                          struct failure *failure)
{
    char normal[PLACE_SIZE];
    bool made;
    if (!place_normalize(path, "a directory of an overlay", normal, failure))
        return false;
    if (layers->count == MOST_LAYERS)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "an overlay has %d directories at most", MOST_LAYERS);
    int directory = make ? place_make(normal, 0755, &made) : place_open(AT_FDCWD, normal, O_PATH | O_DIRECTORY);
    if (directory < 0)
        return failure_errno(failure, "cannot open %.100s, a directory of an overlay", normal);
    layers->descriptors[layers->count++] = directory;
    size_t used = strlen(option);
    snprintf(option + used, size - used, "%s", place_name(directory).text);
    return true;
}

/* Up to the next character of `ends` that has no backslash before it, without the backslashes. */
static const char *take_path(const char *at, const char *ends, char *path, size_t size)
{
    size_t used = 0;
    for (; *at != '\0' && strchr(ends, *at) == NULL; at++) {
        if (*at == '\\' && at[1] != '\0')
            at++;
        if (used + 1 < size)
            path[used++] = *at;
    }
    path[used] = '\0';
    return at;
}

/* lowerdir=a:b::c (behind two colons are layers that only have data), upperdir=a, workdir=a */
static bool add_directories(struct layers *layers, const char *name, const char *value, struct mount_options *options,
                            struct failure *failure)
{
    char option[sizeof options->data];
    char path[PLACE_SIZE];
    bool many = strcmp(name, "lowerdir=") == 0;
    snprintf(option, sizeof option, "%s", name);
    for (const char *at = value;;) {
        at = take_path(at, many ? ":" : "", path, sizeof path);
        if (!add_directory(layers, path, !many, option, sizeof option, failure))
            return false;
        if (*at == '\0')
            return mount_options_add_data(options, option, failure);
        for (; *at == ':'; at++)
            if (strlen(option) + 1 < sizeof option)
                strcat(option, ":");
    }
}

static bool add_option(struct layers *layers, const char *option, struct mount_options *options,
                       struct failure *failure)
{
    static const char *const directories[] = {"lowerdir=", "upperdir=", "workdir="};
    for (size_t i = 0; i < sizeof directories / sizeof directories[0]; i++)
        if (strncmp(option, directories[i], strlen(directories[i])) == 0)
            return add_directories(layers, directories[i], option + strlen(directories[i]), options, failure);
    if (strncmp(option, "io.katacontainers.", strlen("io.katacontainers.")) == 0)
        return true;
    return mount_options_add(options, option, failure);
}

/* An option may be several, with commas between them. */
static bool add_options(struct layers *layers, const char *words, struct mount_options *options,
                        struct failure *failure)
{
    for (const char *at = words;; at++) {
        char word[PLACE_SIZE];
        size_t used = 0;
        for (; *at != '\0' && *at != ',' && used + 2 < sizeof word; at++) {
            word[used++] = *at;
            if (*at == '\\' && at[1] != '\0')
                word[used++] = *++at;
        }
        word[used] = '\0';
        if (*at != '\0' && *at != ',')
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "an option of an overlay is too long");
        if (!add_option(layers, word, options, failure))
            return false;
        if (*at == '\0')
            return true;
    }
}

static bool is_writable(const struct storage *storage)
{
    for (size_t i = 0; i < storage->options.count; i++)
        if (strcmp(storage->options.items[i], WRITABLE) == 0)
            return true;
    return false;
}

static bool add_writable(struct layers *layers, const char *owner, struct mount_options *options,
                         struct failure *failure)
{
    static const char *const names[][2] = {{"upperdir=", "upper"}, {"workdir=", "work"}};
    if (*owner == '\0' || strchr(owner, '/') != NULL)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "only a container can have %s", WRITABLE);
    for (size_t i = 0; i < 2; i++) {
        char path[PLACE_SIZE];
        snprintf(path, sizeof path, BUNDLES "/%.200s/%s", owner, names[i][1]);
        if (!add_directories(layers, names[i][0], path, options, failure))
            return false;
    }
    return true;
}

bool overlay_mount(const struct storage_driver *driver, const struct storage_request *request,
                   struct failure *failure)
{
    struct layers layers = {.count = 0};
    struct mount_options options = {0};
    const struct storage *storage = request->storage;
    bool done = true;
    for (size_t i = 0; i < storage->options.count && done; i++)
        done = add_options(&layers, storage->options.items[i], &options, failure);
    if (done && is_writable(storage))
        done = add_writable(&layers, request->owner, &options, failure);
    const char *source = *request->source != '\0' ? request->source : "overlay";
    if (done)
        done = storage_mount_at(request, source, driver->type, &options, failure);
    close_layers(&layers);
    return done;
}

void overlay_clean(const char *owner)
{
    static const char *const names[] = {"upper", "work"};
    if (*owner == '\0' || strchr(owner, '/') != NULL)
        return;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[PLACE_SIZE];
        snprintf(path, sizeof path, BUNDLES "/%.200s/%s", owner, names[i]);
        if (tree_remove(path))
            continue;
        int number = errno;
        LOG(LOG_WARN, "storage", "cannot remove what a container wrote", LOG_STRING("path", path), LOG_ERRNO(number));
    }
}
