#define _GNU_SOURCE
#include "guest.h"

#include "log.h"
#include "mountinfo.h"
#include "small_file.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define SUBSYSTEM "guest"
#define CMDLINE "/proc/cmdline"
#define MEMORY "/sys/devices/system/memory/"

enum { CMDLINE_SIZE = 4096 }; /* more than COMMAND_LINE_SIZE of x86 and arm64 */

struct mount_row {
    const char *type;
    const char *source;
    const char *target;
    unsigned long flags;
    const char *data;
};

static const struct mount_row base_mounts[] = {
    {"proc", "proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""},
    {"sysfs", "sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""},
    {"devtmpfs", "dev", "/dev", MS_NOSUID, ""},
    {"tmpfs", "tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777"},
    {"devpts", "devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666"},
    {"tmpfs", "tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755"},
    /* Always version 2. Kata's agent mounts version 1 unless the kernel was told cgroup_no_v1=all or
     * systemd.unified_cgroup_hierarchy=1, and our kernels could do that: they carry MEMCG_V1 and CPUSETS_V1 for it.
     * This agent's containers have their limits in version 2 alone. */
    {"cgroup2", "cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RELATIME, "nsdelegate"},
};

static void warn(const char *message, const char *what)
{
    int number = errno;
    LOG(LOG_WARN, SUBSYSTEM, message, LOG_STRING("what", what), LOG_ERRNO(number));
}

/* --- mounts --- */

/* What is mounted on `target`, seen last: the later covers the earlier. The line is the caller's to free. */
static char *find_mount(const char *target, struct mountinfo *found)
{
    FILE *file = fopen("/proc/self/mountinfo", "re");
    if (file == NULL)
        return NULL;
    char *kept = NULL;
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, file) > 0) {
        struct mountinfo mounted;
        if (!mountinfo_split(line, &mounted))
            continue;
        if (strcmp(mounted.target, target) != 0)
            continue;
        free(kept);
        kept = line;
        *found = mounted;
        line = NULL;
        size = 0;
    }
    free(line);
    fclose(file);
    return kept;
}

static bool already_mounted(const struct mount_row *row)
{
    struct statfs statistics;
    if (strcmp(row->type, "proc") == 0) /* mountinfo is not there to be asked yet */
        return statfs(row->target, &statistics) == 0 && statistics.f_type == PROC_SUPER_MAGIC;
    struct mountinfo found;
    char *line = find_mount(row->target, &found);
    bool same = line != NULL && strcmp(found.type, row->type) == 0;
    free(line);
    return same;
}

static void mount_row(const struct mount_row *row)
{
    if (already_mounted(row))
        return;
    mkdir(row->target, 0755); /* on a read-only root it is there or it is not; mount() will say */
    if (mount(row->source, row->target, row->type, row->flags, row->data) == 0 || errno == EBUSY)
        return;
    /* A kernel that does not know an option. */
    if (errno == EINVAL && mount(row->source, row->target, row->type, row->flags, NULL) == 0)
        return;
    warn("cannot mount", row->target);
}

/* --- the root, for the log --- */

static bool has_option(const char *list, const char *option, size_t size)
{
    for (const char *at = list; *at != '\0';) {
        size_t length = strcspn(at, ",");
        if (length == size && memcmp(at, option, size) == 0)
            return true;
        at += length + (at[length] == ',');
    }
    return false;
}

/* The options of the mount, then those of the filesystem that do not just repeat them; as many as fit. */
static void join_options(const struct mountinfo *root, char *joined, size_t size)
{
    snprintf(joined, size, "%s", root->options);
    for (const char *at = root->super_options; *at != '\0';) {
        size_t length = strcspn(at, ",");
        size_t used = strlen(joined);
        if (!has_option(joined, at, length) && used + length + 2 <= size)
            snprintf(joined + used, size - used, ",%.*s", (int)length, at);
        at += length + (at[length] == ',');
    }
}

void guest_log_root(void)
{
    struct mountinfo root;
    char *line = find_mount("/", &root);
    if (line == NULL) {
        LOG(LOG_WARN, SUBSYSTEM, "cannot tell what the root is", LOG_STRING("what", "/proc/self/mountinfo"));
        return;
    }
    char device[560];
    char options[1024];
    mountinfo_device(&root, device, sizeof device);
    join_options(&root, options, sizeof options);
    LOG(LOG_INFO, SUBSYSTEM, "root mounted", LOG_STRING("fstype", root.type), LOG_STRING("device", device),
        LOG_STRING("options", options));
    free(line);
}

/* --- the rest of what PID 1 does --- */

void guest_open_standard_files(void)
{
    int file;
    do
        file = open("/dev/null", O_RDWR);
    while (file >= 0 && file <= STDERR_FILENO);
    if (file >= 0)
        close(file);
}

/* The kernel gives init the console, unless the initramfs had no /dev/console: by now devtmpfs has. */
static void open_console(bool given)
{
    if (given)
        return;
    int console = open("/dev/console", O_RDWR | O_NOCTTY);
    if (console >= 0) {
        for (int i = STDIN_FILENO; i <= STDERR_FILENO; i++)
            dup2(console, i);
        if (console > STDERR_FILENO)
            close(console);
        return;
    }
    int kernel = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
    if (kernel >= 0)
        log_to(kernel, true);
    guest_open_standard_files();
}

static void link_ptmx(void)
{
    unlink("/dev/ptmx");
    if (symlink("/dev/pts/ptmx", "/dev/ptmx") != 0)
        warn("cannot link", "/dev/ptmx");
}

static void set_hostname(void)
{
    char text[256];
    small_file_read("/etc/hostname", text, sizeof text);
    const char *name = text + strspn(text, " \t\r\n");
    size_t size = strcspn(name, " \t\r\n");
    if (size == 0) {
        name = "localhost";
        size = strlen(name);
    }
    if (sethostname(name, size) != 0)
        warn("cannot set the hostname", "sethostname");
}

static void raise_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo"};
    int handle = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (handle < 0 || ioctl(handle, SIOCGIFFLAGS, &request) != 0) {
        warn("cannot reach the loopback interface", "lo");
    } else {
        request.ifr_flags = (short)(request.ifr_flags | IFF_UP);
        if (ioctl(handle, SIOCSIFFLAGS, &request) != 0)
            warn("cannot raise the loopback interface", "lo");
    }
    if (handle >= 0)
        close(handle);
}

void guest_begin(void)
{
    bool console = fcntl(STDIN_FILENO, F_GETFD) >= 0 && fcntl(STDOUT_FILENO, F_GETFD) >= 0;
    umask(0022);
    if (chdir("/") != 0)
        warn("cannot change to", "/");
    for (size_t i = 0; i < sizeof base_mounts / sizeof base_mounts[0]; i++)
        mount_row(&base_mounts[i]);
    open_console(console);
    link_ptmx();
    setsid();
    ioctl(STDIN_FILENO, TIOCSCTTY, 1); /* a console that cannot be a terminal is no harm */
    setenv("PATH", "/bin:/sbin/:/usr/bin/:/usr/sbin/", 1); /* as Kata's agent spells it */
    set_hostname();
    raise_loopback();
}

/* Without ACPI a PC cannot be switched off: Linux would halt, and its VMM would wait for ever. A restart ends what is
 * run with -no-reboot, and Firecracker, which has no other way. */
static bool can_power_off(void)
{
#if defined(__x86_64__) || defined(__i386__)
    return access("/sys/firmware/acpi", F_OK) == 0;
#else
    return true;
#endif
}

_Noreturn void guest_power_off(void)
{
    sync();
    if (!can_power_off())
        reboot(RB_AUTOBOOT);
    reboot(RB_POWER_OFF);
    reboot((int)RB_HALT_SYSTEM);
    for (;;)
        pause();
}

/* The next of the kernel's words, ended by a NUL; NULL: there are no more. Blanks between quotes end none. */
static char *next_word(char **rest)
{
    char *word = *rest;
    bool quotes = false;
    if (word == NULL)
        return NULL;
    for (char *at = word;; at++) {
        if (*at == '"')
            quotes = !quotes;
        if (*at != '\0' && (quotes || (*at != ' ' && *at != '\n')))
            continue;
        *rest = *at == '\0' ? NULL : at + 1;
        *at = '\0';
        return word;
    }
}

bool guest_word(const char *name, char *value, size_t size)
{
    char words[CMDLINE_SIZE];
    char *rest = words;
    size_t length = strlen(name);
    bool found = false;
    value[0] = '\0';
    if (!small_file_read(CMDLINE, words, sizeof words))
        return false;
    for (char *word = next_word(&rest); word != NULL; word = next_word(&rest))
        /* As in the kernel, a later word wins. */
        if (strncmp(word, name, length) == 0 && word[length] == '=' && strlen(word + length + 1) < size) {
            snprintf(value, size, "%s", word + length + 1);
            found = true;
        }
    return found;
}

bool guest_flag(const char *name)
{
    char words[CMDLINE_SIZE];
    char *rest = words;
    size_t length = strlen(name);
    bool found = false;
    if (!small_file_read(CMDLINE, words, sizeof words))
        return false;
    for (char *word = next_word(&rest); word != NULL; word = next_word(&rest)) {
        if (strncmp(word, name, length) != 0 || (word[length] != '\0' && word[length] != '='))
            continue;
        const char *value = word + length + (word[length] == '=');
        found = strcmp(value, "0") != 0 && strcmp(value, "false") != 0 && strcmp(value, "no") != 0;
    }
    return found;
}

uint64_t guest_memory_block_size(void)
{
    char text[32];
    if (!small_file_read(MEMORY "block_size_bytes", text, sizeof text))
        return 0;
    return strtoull(text, NULL, 16);
}

bool guest_has_memory_probe(void)
{
    return access(MEMORY "probe", F_OK) == 0;
}
