/* Directories. */
#define _GNU_SOURCE
#include "probe.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static char kind_of(mode_t mode)
{
    switch (mode & S_IFMT) {
    case S_IFDIR: return 'd';
    case S_IFLNK: return 'l';
    case S_IFCHR: return 'c';
    case S_IFBLK: return 'b';
    case S_IFREG: return '-';
    default: return '?';
    }
}

static bool say_entry(struct answer *answer, int directory, const char *name)
{
    char target[PATH_MAX] = "";
    struct stat found;
    if (strchr(name, '\n') != NULL || fstatat(directory, name, &found, AT_SYMLINK_NOFOLLOW) != 0)
        return true;
    if (S_ISLNK(found.st_mode) && readlinkat(directory, name, target, sizeof target - 1) < 0)
        return true;
    return say(answer, "%s %c %o %u:%u %s\n", name, kind_of(found.st_mode), found.st_mode & 07777,
               major(found.st_rdev), minor(found.st_rdev), target);
}

bool probe_list(struct answer *answer, char **words, int count)
{
    (void)count;
    DIR *stream = opendir(words[0]);
    if (stream == NULL)
        return fail(answer, words[0]);
    bool room = true;
    for (struct dirent *entry; room && (entry = readdir(stream)) != NULL;)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            room = say_entry(answer, dirfd(stream), entry->d_name);
    closedir(stream);
    errno = EFBIG;
    return room || fail(answer, words[0]);
}
