#define _GNU_SOURCE
#include "capabilities.h"

#include <errno.h>
#include <linux/capability.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *const names[] = {
    [CAP_CHOWN] = "CHOWN",
    [CAP_DAC_OVERRIDE] = "DAC_OVERRIDE",
    [CAP_DAC_READ_SEARCH] = "DAC_READ_SEARCH",
    [CAP_FOWNER] = "FOWNER",
    [CAP_FSETID] = "FSETID",
    [CAP_KILL] = "KILL",
    [CAP_SETGID] = "SETGID",
    [CAP_SETUID] = "SETUID",
    [CAP_SETPCAP] = "SETPCAP",
    [CAP_LINUX_IMMUTABLE] = "LINUX_IMMUTABLE",
    [CAP_NET_BIND_SERVICE] = "NET_BIND_SERVICE",
    [CAP_NET_BROADCAST] = "NET_BROADCAST",
    [CAP_NET_ADMIN] = "NET_ADMIN",
    [CAP_NET_RAW] = "NET_RAW",
    [CAP_IPC_LOCK] = "IPC_LOCK",
    [CAP_IPC_OWNER] = "IPC_OWNER",
    [CAP_SYS_MODULE] = "SYS_MODULE",
    [CAP_SYS_RAWIO] = "SYS_RAWIO",
    [CAP_SYS_CHROOT] = "SYS_CHROOT",
    [CAP_SYS_PTRACE] = "SYS_PTRACE",
    [CAP_SYS_PACCT] = "SYS_PACCT",
    [CAP_SYS_ADMIN] = "SYS_ADMIN",
    [CAP_SYS_BOOT] = "SYS_BOOT",
    [CAP_SYS_NICE] = "SYS_NICE",
    [CAP_SYS_RESOURCE] = "SYS_RESOURCE",
    [CAP_SYS_TIME] = "SYS_TIME",
    [CAP_SYS_TTY_CONFIG] = "SYS_TTY_CONFIG",
    [CAP_MKNOD] = "MKNOD",
    [CAP_LEASE] = "LEASE",
    [CAP_AUDIT_WRITE] = "AUDIT_WRITE",
    [CAP_AUDIT_CONTROL] = "AUDIT_CONTROL",
    [CAP_SETFCAP] = "SETFCAP",
    [CAP_MAC_OVERRIDE] = "MAC_OVERRIDE",
    [CAP_MAC_ADMIN] = "MAC_ADMIN",
    [CAP_SYSLOG] = "SYSLOG",
    [CAP_WAKE_ALARM] = "WAKE_ALARM",
    [CAP_BLOCK_SUSPEND] = "BLOCK_SUSPEND",
    [CAP_AUDIT_READ] = "AUDIT_READ",
    [CAP_PERFMON] = "PERFMON",
    [CAP_BPF] = "BPF",
    [CAP_CHECKPOINT_RESTORE] = "CHECKPOINT_RESTORE",
};

enum { KNOWN = sizeof names / sizeof names[0] };

#define BIT(number) ((uint64_t)1 << (number))

static int number_of(const char *name)
{
    if (strncmp(name, "CAP_", 4) != 0)
        return -1;
    for (int i = 0; i < KNOWN; i++)
        if (strcmp(names[i], name + 4) == 0)
            return i;
    return -1;
}

static bool read_set(const struct texts *list, uint64_t *set, struct failure *failure)
{
    for (size_t i = 0; i < list->count; i++) {
        int number = number_of(list->items[i]);
        if (number < 0)
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%.100s is no capability", list->items[i]);
        *set |= BIT(number);
    }
    return true;
}

bool capabilities_read(const struct oci_capabilities *list, bool allow_mknod, struct capabilities *capabilities,
                       struct failure *failure)
{
    *capabilities = (struct capabilities){0};
    if (list == NULL)
        return true;
    if (!read_set(&list->bounding, &capabilities->bounding, failure) ||
        !read_set(&list->effective, &capabilities->effective, failure) ||
        !read_set(&list->inheritable, &capabilities->inheritable, failure) ||
        !read_set(&list->permitted, &capabilities->permitted, failure) ||
        !read_set(&list->ambient, &capabilities->ambient, failure))
        return false;
    uint64_t kept = allow_mknod ? ~(uint64_t)0 : ~BIT(CAP_MKNOD);
    capabilities->bounding &= kept;
    capabilities->effective &= kept;
    capabilities->inheritable &= kept;
    capabilities->permitted &= kept;
    capabilities->ambient &= kept;
    return true;
}

/* The kernel may know fewer or more than this file. */
static uint64_t of_this_kernel(void)
{
    uint64_t known = 0;
    for (int i = 0; i < 64 && prctl(PR_CAPBSET_READ, i, 0, 0, 0) >= 0; i++)
        known |= BIT(i);
    return known;
}

bool capabilities_limit(const struct capabilities *capabilities)
{
    uint64_t known = of_this_kernel();
    for (int i = 0; i < 64; i++)
        if ((known & BIT(i)) != 0 && (capabilities->bounding & BIT(i)) == 0 &&
            prctl(PR_CAPBSET_DROP, i, 0, 0, 0) != 0)
            return false;
    return prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0;
}

static bool set_all(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    for (int i = 0; i < 2; i++) {
        data[i].effective = (uint32_t)(effective >> (32 * i));
        data[i].permitted = (uint32_t)(permitted >> (32 * i));
        data[i].inheritable = (uint32_t)(inheritable >> (32 * i));
    }
    return syscall(SYS_capset, &header, data) == 0;
}

bool capabilities_raise(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) != 0)
        return false;
    for (int i = 0; i < 2; i++)
        data[i].effective = data[i].permitted;
    return syscall(SYS_capset, &header, data) == 0;
}

bool capabilities_apply(const struct capabilities *capabilities)
{
    uint64_t known = of_this_kernel();
    uint64_t permitted = capabilities->permitted & known;
    uint64_t inheritable = capabilities->inheritable & known;
    /* Ambient ones must be both; a set that the runtime left inconsistent gives less, never more. */
    uint64_t ambient = capabilities->ambient & permitted & inheritable;
    if (!set_all(capabilities->effective & permitted, permitted, inheritable))
        return false;
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0)
        return false;
    for (int i = 0; i < 64; i++)
        if ((ambient & BIT(i)) != 0 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0, 0) != 0)
            return false;
    return true;
}
