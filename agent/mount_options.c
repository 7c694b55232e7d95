#define _GNU_SOURCE
#include "mount_options.h"

#include <stdio.h>
#include <string.h>
#include <sys/mount.h>

/* musl 1.2.3 has no name for it. */
#ifndef MS_NOSYMFOLLOW
#define MS_NOSYMFOLLOW 256
#endif

struct flag_row {
    const char *name;
    unsigned long set;
    unsigned long clear;
};

static const struct flag_row flags[] = {
    {"defaults", 0, 0},
    {"ro", MS_RDONLY, 0},
    {"rw", 0, MS_RDONLY},
    {"nosuid", MS_NOSUID, 0},
    {"suid", 0, MS_NOSUID},
    {"nodev", MS_NODEV, 0},
    {"dev", 0, MS_NODEV},
    {"noexec", MS_NOEXEC, 0},
    {"exec", 0, MS_NOEXEC},
    {"sync", MS_SYNCHRONOUS, 0},
    {"async", 0, MS_SYNCHRONOUS},
    {"dirsync", MS_DIRSYNC, 0},
    {"remount", MS_REMOUNT, 0},
    {"mand", MS_MANDLOCK, 0},
    {"nomand", 0, MS_MANDLOCK},
    {"noatime", MS_NOATIME, MS_RELATIME | MS_STRICTATIME},
    {"atime", 0, MS_NOATIME},
    {"nodiratime", MS_NODIRATIME, 0},
    {"diratime", 0, MS_NODIRATIME},
    {"relatime", MS_RELATIME, MS_NOATIME | MS_STRICTATIME},
    {"norelatime", 0, MS_RELATIME},
    {"strictatime", MS_STRICTATIME, MS_NOATIME | MS_RELATIME},
    {"nostrictatime", 0, MS_STRICTATIME},
    {"lazytime", MS_LAZYTIME, 0},
    {"nolazytime", 0, MS_LAZYTIME},
    {"iversion", MS_I_VERSION, 0},
    {"noiversion", 0, MS_I_VERSION},
    {"silent", MS_SILENT, 0},
    {"loud", 0, MS_SILENT},
    {"nosymfollow", MS_NOSYMFOLLOW, 0},
    {"symfollow", 0, MS_NOSYMFOLLOW},
    {"bind", MS_BIND, 0},
    {"rbind", MS_BIND | MS_REC, 0},
};

static const struct flag_row propagations[] = {
    {"private", MS_PRIVATE, 0},       {"rprivate", MS_PRIVATE | MS_REC, 0},
    {"shared", MS_SHARED, 0},         {"rshared", MS_SHARED | MS_REC, 0},
    {"slave", MS_SLAVE, 0},           {"rslave", MS_SLAVE | MS_REC, 0},
    {"unbindable", MS_UNBINDABLE, 0}, {"runbindable", MS_UNBINDABLE | MS_REC, 0},
};

static const struct flag_row *find(const struct flag_row *rows, size_t count, const char *name, size_t length)
{
    for (size_t i = 0; i < count; i++)
        if (strlen(rows[i].name) == length && memcmp(rows[i].name, name, length) == 0)
            return &rows[i];
    return NULL;
}

static bool add_data(struct mount_options *options, const char *text, size_t length, struct failure *failure)
{
    size_t used = strlen(options->data);
    if (used + length + 2 > sizeof options->data)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the mount options are longer than the kernel takes");
    snprintf(options->data + used, sizeof options->data - used, "%s%.*s", used > 0 ? "," : "", (int)length, text);
    return true;
}

static bool add_word(struct mount_options *options, const char *word, size_t length, struct failure *failure)
{
    const struct flag_row *row = find(flags, sizeof flags / sizeof flags[0], word, length);
    if (row != NULL) {
        options->flags = (options->flags & ~row->clear) | row->set;
        return true;
    }
    row = find(propagations, sizeof propagations / sizeof propagations[0], word, length);
    if (row != NULL) {
        options->propagation = row->set;
        return true;
    }
    if (length == strlen("loop") && memcmp(word, "loop", length) == 0)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the mount option loop is for files");
    return length == 0 || add_data(options, word, length, failure);
}

bool mount_options_add(struct mount_options *options, const char *words, struct failure *failure)
{
    for (const char *at = words;; at++) {
        size_t length = strcspn(at, ",");
        if (!add_word(options, at, length, failure))
            return false;
        at += length;
        if (*at == '\0')
            return true;
    }
}

bool mount_options_add_data(struct mount_options *options, const char *text, struct failure *failure)
{
    return add_data(options, text, strlen(text), failure);
}
