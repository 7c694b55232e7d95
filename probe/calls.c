/* System calls that an engine's filter may refuse, each tried in a child, where it may work. */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    KEYCTL_GET_KEYRING_ID = 0, /* linux/keyctl.h */
    KEY_SPEC_PROCESS_KEYRING = -2,
    BPF_MAP_CREATE = 0, /* linux/bpf.h */
    BPF_MAP_TYPE_ARRAY = 2,
    ADDR_NO_RANDOMIZE = 0x0040000, /* linux/personality.h */
};

static long try_keyctl(void)
{
    return syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 1);
}

static long try_add_key(void)
{
    return syscall(SYS_add_key, "user", "osbuilder", "x", 1, KEY_SPEC_PROCESS_KEYRING);
}

static long try_unshare(void)
{
    return syscall(SYS_unshare, CLONE_NEWUSER);
}

static long try_personality(void)
{
    return syscall(SYS_personality, ADDR_NO_RANDOMIZE);
}

static long try_mount(void)
{
    return syscall(SYS_mount, "none", "/", "tmpfs", 0, NULL);
}

static long try_bpf(void)
{
    struct {
        unsigned type, key, value, entries, more[28];
    } map = {BPF_MAP_TYPE_ARRAY, 4, 4, 1, {0}};
    return syscall(SYS_bpf, BPF_MAP_CREATE, &map, sizeof map);
}

static const struct {
    const char *name;
    long (*attempt)(void);
} calls[] = {
    {"keyctl", try_keyctl},           {"add_key", try_add_key}, {"unshare", try_unshare},
    {"personality", try_personality}, {"mount", try_mount},     {"bpf", try_bpf},
};

/* What it is refused with, 0 when it is not; -1 when nobody could try. */
static int refusal(long (*attempt)(void))
{
    pid_t child = fork();
    if (child == 0)
        _exit(attempt() < 0 ? errno : 0);
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child)
        return -1;
    if (!WIFEXITED(status)) {
        errno = EINTR;
        return -1;
    }
    return WEXITSTATUS(status);
}

bool probe_calls(struct answer *answer, char **words, int count)
{
    (void)words;
    (void)count;
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        int number = refusal(calls[i].attempt);
        if (number < 0)
            return fail(answer, calls[i].name);
        say(answer, "%s %d\n", calls[i].name, number);
    }
    return true;
}
