#define _GNU_SOURCE
#include "sandbox_hooks.h"

#include "log.h"
#include "program.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SUBSYSTEM "hooks"

enum {
    KINDS = SANDBOX_POSTSTOP + 1,
    MOST = 64, /* of a kind; the loop stands still while they run */
    SECONDS = 10, /* for each, as Kata's agent gives those that name no limit */
};

static const char *const kinds[KINDS] = {"prestart", "poststart", "poststop"};

static struct {
    char *directory; /* in which the names are */
    char *names[MOST];
    size_t count;
} found[KINDS];

void hooks_forget(void)
{
    for (int kind = 0; kind < KINDS; kind++) {
        for (size_t i = 0; i < found[kind].count; i++)
            free(found[kind].names[i]);
        found[kind].count = 0;
        free(found[kind].directory);
        found[kind].directory = NULL;
    }
}

/* Symbolic links are left alone, as Kata's agent does. */
static bool is_program(int directory, const char *name)
{
    struct stat status;
    return fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(status.st_mode) &&
           (status.st_mode & 0111) != 0;
}

static int by_name(const void *left, const void *right)
{
    return strcmp(*(char *const *)left, *(char *const *)right);
}

static void find_kind(const char *directory, int kind)
{
    if (asprintf(&found[kind].directory, "%s/%s", directory, kinds[kind]) < 0) {
        found[kind].directory = NULL;
        return;
    }
    DIR *list = opendir(found[kind].directory);
    if (list == NULL)
        return;
    for (const struct dirent *entry; found[kind].count < MOST && (entry = readdir(list)) != NULL;) {
        if (!is_program(dirfd(list), entry->d_name))
            continue;
        char *name = strdup(entry->d_name);
        if (name == NULL)
            break;
        found[kind].names[found[kind].count++] = name;
        LOG(LOG_INFO, SUBSYSTEM, "found", LOG_STRING("kind", kinds[kind]), LOG_STRING("hook", name));
    }
    closedir(list);
    qsort(found[kind].names, found[kind].count, sizeof found[kind].names[0], by_name);
}

void hooks_find(const char *directory)
{
    hooks_forget();
    for (int kind = 0; kind < KINDS; kind++)
        find_kind(directory, kind);
}

static void run(int kind, const char *name, const char *state)
{
    struct failure failure = {0};
    char *path = NULL;
    if (asprintf(&path, "%s/%s", found[kind].directory, name) < 0)
        return;
    const char *argv[] = {name, kinds[kind], NULL};
    const struct program program = {.path = path, .argv = argv, .input = state, .seconds = SECONDS};
    if (!program_run(&program, &failure))
        LOG(LOG_WARN, SUBSYSTEM, "a hook failed", LOG_STRING("kind", kinds[kind]), LOG_STRING("hook", name),
            LOG_STRING("error", failure.reason));
    free(path);
}

void sandbox_run_hooks(enum sandbox_hook hook, const char *state)
{
    for (size_t i = 0; i < found[hook].count; i++)
        run((int)hook, found[hook].names[i], state);
}
