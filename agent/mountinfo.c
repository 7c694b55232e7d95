#define _GNU_SOURCE
#include "mountinfo.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The kernel writes a space in a path as \040. The text only gets shorter. */
static void unescape(char *text)
{
    char *to = text;
    for (const char *from = text; *from != '\0'; to++) {
        if (from[0] == '\\' && from[1] >= '0' && from[1] <= '3' && from[2] >= '0' && from[2] <= '7' &&
            from[3] >= '0' && from[3] <= '7') {
            *to = (char)((from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0'));
            from += 4;
        } else {
            *to = *from++;
        }
    }
    *to = '\0';
}

bool mountinfo_split(char *line, struct mountinfo *mount)
{
    char *rest = line;
    char *words[6];
    for (size_t i = 0; i < 6; i++) {
        words[i] = strsep(&rest, " ");
        if (rest == NULL)
            return false;
    }
    *mount = (struct mountinfo){.device = words[2], .target = words[4], .options = words[5]};
    for (char *tag = strsep(&rest, " "); tag != NULL && strcmp(tag, "-") != 0;)
        tag = strsep(&rest, " ");
    mount->type = strsep(&rest, " ");
    mount->source = strsep(&rest, " ");
    mount->super_options = strsep(&rest, "\n");
    if (mount->super_options == NULL)
        return false;
    unescape(mount->target);
    unescape(mount->source);
    return true;
}

/* The kernel calls what it mounted at boot /dev/root: its number knows the real name. */
void mountinfo_device(const struct mountinfo *mount, char *name, size_t size)
{
    char link[64];
    char target[512];
    snprintf(link, sizeof link, "/sys/dev/block/%s", mount->device);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length <= 0) {
        snprintf(name, size, "%s", mount->source);
        return;
    }
    target[length] = '\0';
    const char *slash = strrchr(target, '/');
    snprintf(name, size, "/dev/%s", slash == NULL ? target : slash + 1);
}
