#define _GNU_SOURCE
#include "sandbox.h"

#include "container.h"
#include "sandbox_hooks.h"
#include "log.h"
#include "program.h"
#include "shared.h"
#include "storage.h"
#include "tree.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#define SUBSYSTEM "sandbox"
#define BASE "/run/kata-containers"
#define OWN BASE "/sandbox"
#define RESOLV OWN "/resolv.conf"
#define GUEST_RESOLV "/etc/resolv.conf"
#define RANDOM "/dev/random"
#define MODPROBE "/sbin/modprobe"

enum {
    LONGEST_HOSTNAME = 64, /* __NEW_UTS_LEN */
    MOST_PARAMETERS = 64, /* of a kernel module */
    MODULE_SECONDS = 30,
};

static bool running;
static bool shares_pids;
static bool dns_covered; /* GUEST_RESOLV is, by ours */

bool sandbox_is_running(void)
{
    return running;
}

bool sandbox_shares_pids(void)
{
    return running && shares_pids;
}

const char *sandbox_namespace(const char *kind)
{
    return shared_path(kind);
}

/* --- making --- */

/* modprobe would take for an option of its own what begins so. */
static bool is_word(const char *text)
{
    return text[0] != '\0' && text[0] != '-';
}

static bool load_module(const struct kernel_module *module, struct failure *failure)
{
    const char *argv[3 + MOST_PARAMETERS + 1] = {MODPROBE, "-v", module->name};
    if (!is_word(module->name))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "\"%.100s\" cannot be a kernel module's name",
                           module->name);
    if (module->parameters.count > MOST_PARAMETERS)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "kernel module %.100s: more than %d parameters",
                           module->name, MOST_PARAMETERS);
    for (size_t i = 0; i < module->parameters.count; i++) {
        argv[3 + i] = module->parameters.items[i];
        if (!is_word(argv[3 + i]))
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "kernel module %.100s: \"%.100s\" is no parameter",
                               module->name, argv[3 + i]);
    }
    const struct program modprobe = {.path = MODPROBE, .argv = argv, .seconds = MODULE_SECONDS};
    return program_run(&modprobe, failure);
}

static bool write_all(int file, const char *data, size_t size)
{
    while (size > 0) {
        ssize_t wrote = write(file, data, size);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            return false;
        data += wrote;
        size -= (size_t)wrote;
    }
    return true;
}

static bool write_resolv(const struct texts *lines)
{
    int file = open(RESOLV, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (file < 0)
        return false;
    bool good = true;
    for (size_t i = 0; good && i < lines->count; i++)
        good = write_all(file, lines->items[i], strlen(lines->items[i])) && write_all(file, "\n", 1);
    return close(file) == 0 && good;
}

static void uncover_resolv(void)
{
    if (dns_covered)
        umount2(GUEST_RESOLV, MNT_DETACH | UMOUNT_NOFOLLOW);
    dns_covered = false;
}

/* The guest's root may be read-only: its file is covered, not written, and can only be if it is there. */
static bool set_dns(const struct texts *lines, struct failure *failure)
{
    struct stat status;
    if (lines->count == 0)
        return true;
    if (!tree_make(OWN, 0755) || !write_resolv(lines))
        return failure_errno(failure, "cannot write " RESOLV);
    if (lstat(GUEST_RESOLV, &status) != 0 || !S_ISREG(status.st_mode)) {
        LOG(LOG_INFO, SUBSYSTEM, GUEST_RESOLV " is no regular file: names are resolved as before");
        return true;
    }
    dns_covered = mount(RESOLV, GUEST_RESOLV, NULL, MS_BIND, NULL) == 0;
    return dns_covered || failure_errno(failure, "cannot mount " RESOLV " on " GUEST_RESOLV);
}

static void take_down(void)
{
    storage_release("");
    hooks_forget();
    uncover_resolv();
    shared_remove();
    tree_unmount(BASE);
    if (!tree_remove(BASE)) {
        int number = errno;
        LOG(LOG_WARN, SUBSYSTEM, "something is left of " BASE, LOG_ERRNO(number));
    }
    running = false;
    shares_pids = false;
}

static bool begin(const struct create_sandbox_request *request, struct failure *failure)
{
    if (strlen(request->hostname) > LONGEST_HOSTNAME)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the hostname %.100s is longer than %d bytes",
                           request->hostname, LONGEST_HOSTNAME);
    /* As Kata's agent, we begin anew when we are asked twice. It deletes what running containers need. */
    if (container_any())
        return failure_set(failure, TTRPC_FAILED_PRECONDITION, "this sandbox has containers already");
    take_down();
    if (!tree_make(BASE, 0755))
        return failure_errno(failure, "cannot make " BASE);
    for (size_t i = 0; i < request->kernel_modules.count; i++)
        if (!load_module(&request->kernel_modules.items[i], failure))
            return false;
    return shared_make(request->hostname, failure);
}

static bool finish(const struct create_sandbox_request *request, struct failure *failure)
{
    if (request->guest_hook_path[0] != '\0')
        hooks_find(request->guest_hook_path);
    if (!set_dns(&request->dns, failure))
        return false;
    shares_pids = request->sandbox_pidns;
    running = true;
    LOG(LOG_INFO, SUBSYSTEM, "created", LOG_STRING("sandbox", request->sandbox_id),
        LOG_STRING("hostname", request->hostname));
    return true;
}

/* Which of the calls that create is at work: one that comes while another waits for a device has taken its place. */
static uint64_t turn;

static enum ttrpc_status create_sandbox(struct ttrpc_call *call)
{
    struct create_sandbox_request request;
    if (!ttrpc_decode(call, &message_create_sandbox_request, &request))
        return call->failure.status;
    if (call->memo == 0) {
        if (!begin(&request, &call->failure))
            return call->failure.status;
        call->memo = ++turn;
    }
    if (call->memo != turn) {
        failure_set(&call->failure, TTRPC_FAILED_PRECONDITION, "another call creates or ended the sandbox");
        return call->failure.status;
    }
    enum ttrpc_status status =
        storage_mount(request.storages.items, request.storages.count, "", &call->failure);
    if (status == TTRPC_LATER)
        status = storage_later(call);
    if (status == TTRPC_LATER)
        return status;
    if (status == TTRPC_OK && finish(&request, &call->failure))
        return TTRPC_OK;
    status = call->failure.status;
    take_down();
    return status;
}

static enum ttrpc_status destroy_sandbox(struct ttrpc_call *call)
{
    struct empty request;
    if (!ttrpc_decode(call, &message_empty, &request))
        return call->failure.status;
    container_destroy_all();
    take_down();
    turn++;
    call->ending = true;
    return TTRPC_OK;
}

/* --- clock and randomness --- */

static enum ttrpc_status set_guest_date_time(struct ttrpc_call *call)
{
    struct set_guest_date_time_request request;
    if (!ttrpc_decode(call, &message_set_guest_date_time_request, &request))
        return call->failure.status;
    struct timeval now = {.tv_sec = (time_t)request.sec, .tv_usec = (suseconds_t)request.usec};
    if (request.usec < 0 || request.usec >= 1000000)
        failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "%lld microseconds are no part of a second",
                    (long long)request.usec);
    else if (settimeofday(&now, NULL) != 0)
        failure_errno(&call->failure, "cannot set the clock to %lld s", (long long)request.sec);
    return call->failure.status;
}

static bool reseed(struct span data, struct failure *failure)
{
    int file = open(RANDOM, O_WRONLY | O_CLOEXEC);
    if (file < 0)
        return failure_errno(failure, "cannot open " RANDOM);
    int credit = (int)data.size;
    bool good = true;
    if (!write_all(file, (const char *)data.data, data.size))
        good = failure_errno(failure, "cannot write " RANDOM);
    else if (ioctl(file, RNDADDTOENTCNT, &credit) != 0)
        good = failure_errno(failure, "the kernel takes no credit for the random data");
    else if (ioctl(file, RNDRESEEDCRNG) != 0)
        good = failure_errno(failure, "the kernel does not reseed its generator");
    close(file);
    return good;
}

static enum ttrpc_status reseed_random_dev(struct ttrpc_call *call)
{
    struct reseed_random_dev_request request;
    if (!ttrpc_decode(call, &message_reseed_random_dev_request, &request))
        return call->failure.status;
    if (request.data.size == 0)
        failure_set(&call->failure, TTRPC_INVALID_ARGUMENT, "there is no random data in the request");
    else
        reseed(request.data, &call->failure);
    return call->failure.status;
}

const struct ttrpc_method_row sandbox_calls[] = {
    {"CreateSandbox", create_sandbox},
    {"DestroySandbox", destroy_sandbox},
    {"SetGuestDateTime", set_guest_date_time},
    {"ReseedRandomDev", reseed_random_dev},
    {NULL, NULL},
};
