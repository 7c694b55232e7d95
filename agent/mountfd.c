/* musl has no words for this interface and glibc's <sys/mount.h> gets in the way of <linux/mount.h>: this file alone
 * has the kernel's. */
#define _GNU_SOURCE
#include "mountfd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef AT_EMPTY_PATH
#define AT_EMPTY_PATH 0x1000
#endif
#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif
#ifndef MOUNT_ATTR_NOSYMFOLLOW
#define MOUNT_ATTR_NOSYMFOLLOW 0x00200000
#endif

enum effect { NOTHING, SET, CLEAR, ATIME, SET_BELOW, PROPAGATION, BIND, REMOUNT };

struct option {
    const char *word;
    enum effect effect;
    bool below;
    uint64_t value;
};

static const struct option options[] = {
    {"ro", SET, false, MOUNT_ATTR_RDONLY},
    {"rw", CLEAR, false, MOUNT_ATTR_RDONLY},
    {"nosuid", SET, false, MOUNT_ATTR_NOSUID},
    {"suid", CLEAR, false, MOUNT_ATTR_NOSUID},
    {"nodev", SET, false, MOUNT_ATTR_NODEV},
    {"dev", CLEAR, false, MOUNT_ATTR_NODEV},
    {"noexec", SET, false, MOUNT_ATTR_NOEXEC},
    {"exec", CLEAR, false, MOUNT_ATTR_NOEXEC},
    {"nodiratime", SET, false, MOUNT_ATTR_NODIRATIME},
    {"diratime", CLEAR, false, MOUNT_ATTR_NODIRATIME},
    {"nosymfollow", SET, false, MOUNT_ATTR_NOSYMFOLLOW},
    {"symfollow", CLEAR, false, MOUNT_ATTR_NOSYMFOLLOW},
    {"relatime", ATIME, false, MOUNT_ATTR_RELATIME},
    {"noatime", ATIME, false, MOUNT_ATTR_NOATIME},
    {"strictatime", ATIME, false, MOUNT_ATTR_STRICTATIME},
    {"rro", SET_BELOW, true, MOUNT_ATTR_RDONLY},
    {"rnosuid", SET_BELOW, true, MOUNT_ATTR_NOSUID},
    {"rnodev", SET_BELOW, true, MOUNT_ATTR_NODEV},
    {"rnoexec", SET_BELOW, true, MOUNT_ATTR_NOEXEC},
    {"private", PROPAGATION, false, MS_PRIVATE},
    {"rprivate", PROPAGATION, true, MS_PRIVATE},
    {"slave", PROPAGATION, false, MS_SLAVE},
    {"rslave", PROPAGATION, true, MS_SLAVE},
    {"shared", PROPAGATION, false, MS_SHARED},
    {"rshared", PROPAGATION, true, MS_SHARED},
    {"unbindable", PROPAGATION, false, MS_UNBINDABLE},
    {"runbindable", PROPAGATION, true, MS_UNBINDABLE},
    {"bind", BIND, false, 0},
    {"rbind", BIND, true, 0},
    {"remount", REMOUNT, false, 0},
    {"defaults", NOTHING, false, 0},
    {"async", NOTHING, false, 0},
    {"atime", NOTHING, false, 0},
    {"norelatime", NOTHING, false, 0},
    {"nostrictatime", NOTHING, false, 0},
    {"silent", NOTHING, false, 0},
    {"loud", NOTHING, false, 0},
    {"nofail", NOTHING, false, 0},
    {"_netdev", NOTHING, false, 0},
    {"", NOTHING, false, 0},
};

static const struct option *find_option(const char *word)
{
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++)
        if (strcmp(options[i].word, word) == 0)
            return &options[i];
    return NULL;
}

static void wish(struct mountfd_wishes *wishes, const struct option *option)
{
    switch (option->effect) {
    case SET:
        wishes->set |= option->value;
        wishes->clear &= ~option->value;
        break;
    case CLEAR:
        wishes->set &= ~option->value;
        wishes->clear |= option->value;
        break;
    case ATIME:
        wishes->set = (wishes->set & ~(uint64_t)MOUNT_ATTR__ATIME) | option->value;
        wishes->clear |= MOUNT_ATTR__ATIME;
        break;
    case SET_BELOW:
        wishes->set_below |= option->value;
        break;
    case PROPAGATION:
        wishes->propagation = option->value;
        wishes->propagation_below = option->below;
        break;
    case BIND:
        wishes->bind = true;
        wishes->below |= option->below;
        break;
    case REMOUNT:
        wishes->remount = true;
        break;
    case NOTHING:
        break;
    }
}

struct mountfd_wishes mountfd_wishes(const struct texts *list)
{
    struct mountfd_wishes wishes = {0};
    for (size_t i = 0; i < list->count; i++) {
        const struct option *option = find_option(list->items[i]);
        if (option != NULL)
            wish(&wishes, option);
    }
    return wishes;
}

bool mountfd_propagation(const char *word, uint64_t *propagation, bool *below)
{
    const struct option *option = find_option(word);
    if (option == NULL || option->effect != PROPAGATION)
        return false;
    *propagation = option->value;
    *below = option->below;
    return true;
}

int mountfd_copy(int fd, bool below)
{
    unsigned int flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | (below ? AT_RECURSIVE : 0);
    return (int)syscall(SYS_open_tree, fd, "", flags);
}

static bool configure(int filesystem, unsigned int command, const char *key, const char *value)
{
    return syscall(SYS_fsconfig, filesystem, command, key, value, 0) == 0;
}

static bool configure_option(int filesystem, const char *option)
{
    char key[64];
    size_t length = strcspn(option, "=");
    if (option[length] == '\0')
        return configure(filesystem, FSCONFIG_SET_FLAG, option, NULL);
    if (length >= sizeof key) {
        errno = EINVAL;
        return false;
    }
    memcpy(key, option, length);
    key[length] = '\0';
    return configure(filesystem, FSCONFIG_SET_STRING, key, option + length + 1);
}

static bool configure_all(int filesystem, const char *source, const struct texts *list)
{
    if (source[0] != '\0' && !configure(filesystem, FSCONFIG_SET_STRING, "source", source))
        return false;
    for (size_t i = 0; i < list->count; i++)
        if (find_option(list->items[i]) == NULL && !configure_option(filesystem, list->items[i]))
            return false;
    return configure(filesystem, FSCONFIG_CMD_CREATE, NULL, NULL);
}

/* The kernel says more than errno does: "e tmpfs: Bad value for 'size'". */
static void explain(int filesystem, const char *type, const char *what, struct failure *failure)
{
    char words[160];
    int number = errno;
    ssize_t size = read(filesystem, words, sizeof words - 1);
    words[size > 2 ? size : 0] = '\0';
    words[strcspn(words, "\n")] = '\0';
    errno = number;
    failure_errno(failure, "cannot mount %.40s on %.100s%s%s", type, what, size > 2 ? ": " : "",
                  size > 2 ? words + 2 : "");
}

int mountfd_new(const char *type, const char *source, const struct texts *list, const char *what,
                struct failure *failure)
{
    int filesystem = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
    if (filesystem < 0) {
        failure_errno(failure, "cannot mount %.40s on %.100s", type, what);
        return -1;
    }
    int mount = -1;
    if (configure_all(filesystem, source, list))
        mount = (int)syscall(SYS_fsmount, filesystem, FSMOUNT_CLOEXEC, 0);
    if (mount < 0)
        explain(filesystem, type, what, failure);
    close(filesystem);
    return mount;
}

static bool set_attributes(int mount, struct mount_attr attributes, bool below)
{
    unsigned int flags = AT_EMPTY_PATH | (below ? AT_RECURSIVE : 0);
    return syscall(SYS_mount_setattr, mount, "", flags, &attributes, sizeof attributes) == 0;
}

bool mountfd_set(int mount, const struct mountfd_wishes *wishes)
{
    struct mount_attr attributes = {.attr_set = wishes->set, .attr_clr = wishes->clear};
    if ((wishes->set | wishes->clear) != 0 && !set_attributes(mount, attributes, false))
        return false;
    return wishes->set_below == 0 || set_attributes(mount, (struct mount_attr){.attr_set = wishes->set_below}, true);
}

bool mountfd_propagate(int mount, uint64_t propagation, bool below)
{
    return propagation == 0 || set_attributes(mount, (struct mount_attr){.propagation = propagation}, below);
}

bool mountfd_make_readonly(int mount, bool below)
{
    return set_attributes(mount, (struct mount_attr){.attr_set = MOUNT_ATTR_RDONLY}, below);
}

bool mountfd_put(int mount, int target)
{
    unsigned int flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    return syscall(SYS_move_mount, mount, "", target, "", flags) == 0;
}
