/* How a container and each of its processes come to run: CreateContainer, StartContainer, ExecProcess. */
#define _GNU_SOURCE
#include "containers.h"

#include "bundle.h"
#include "clock.h"
#include "identity.h"
#include "kernel_settings.h"
#include "log.h"
#include "sandbox.h"
#include "storage.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define SUBSYSTEM "container"
#define ALLOW_MKNOD "io.osbuilder.allow-mknod"

enum { ROOT_DEVICES = 16 };

/* --- what a request must say --- */

static bool bad(struct failure *failure, const char *what)
{
    return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%s", what);
}

static bool check_process(const struct oci_process *process, struct failure *failure)
{
    if (process->args.count == 0 || process->args.items[0][0] == '\0')
        return bad(failure, "the process has no arguments, not even its program");
    if (process->cwd[0] != '/')
        return bad(failure, "the working directory of the process is not absolute");
    if (process->oom_score_adj < -1000 || process->oom_score_adj > 1000)
        return bad(failure, "OOMScoreAdj is not between -1000 and 1000");
    if (process->apparmor_profile[0] != '\0' || process->selinux_label[0] != '\0')
        LOG(LOG_INFO, SUBSYSTEM, "labels of AppArmor and SELinux mean nothing in this guest");
    return limits_check(process, failure);
}

static bool check_mounts(const struct oci_spec *spec, struct failure *failure)
{
    for (size_t i = 0; i < spec->mounts.count; i++)
        if (spec->mounts.items[i].destination[0] == '\0')
            return bad(failure, "a mount has no destination");
    return true;
}

/* Beside the containers' own directories there are these. */
static bool is_directory_of_sandbox(const char *id)
{
    return strcmp(id, "shared") == 0 || strcmp(id, "sandbox") == 0;
}

/* Who asks for what is not served must hear it: a runtime that passes ports waits for output on them. */
static bool check_ports(uint32_t in, uint32_t out, uint32_t err, struct failure *failure)
{
    return (in | out | err) == 0 ||
           failure_set(failure, TTRPC_UNIMPLEMENTED, "streams on vsock ports of their own (stdin_port, stdout_port, "
                                                     "stderr_port) are not served: agent.passfd_listener_port must be 0");
}

static bool check_served(const struct create_container_request *request, struct failure *failure)
{
    if (request->shared_mounts.count > 0)
        return failure_set(failure, TTRPC_UNIMPLEMENTED, "mounts shared between containers are not served: %.100s",
                           request->shared_mounts.items[0].name);
    return check_ports(request->stdin_port, request->stdout_port, request->stderr_port, failure);
}

static bool check_request(const struct create_container_request *request, struct failure *failure)
{
    const struct oci_spec *spec = request->oci;
    if (!container_valid_id(request->container_id) || is_directory_of_sandbox(request->container_id))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%.100s is no id of a container", request->container_id);
    if (spec == NULL || spec->linux_ == NULL || spec->root == NULL || spec->process == NULL)
        return bad(failure, "the description of the container lacks OCI, Linux, Root or Process");
    if (spec->process->capabilities == NULL)
        return bad(failure, "the description of the container lacks Process.Capabilities");
    if (spec->linux_->namespaces.count == 0)
        return bad(failure, "the description of the container lists no namespaces");
    if (spec->root->path[0] != '/')
        return bad(failure, "the path of the container's root is not absolute");
    return check_process(spec->process, failure) && check_mounts(spec, failure) && check_served(request, failure);
}

static const char *annotation(const struct oci_spec *spec, const char *key)
{
    for (size_t i = 0; i < spec->annotations.count; i++)
        if (strcmp(spec->annotations.items[i].key, key) == 0)
            return spec->annotations.items[i].value;
    return "";
}

/* --- devices --- */

/* What a rule of the host says about the host's number is meant for the device, whose number is another one here. */
static void renumber_rules(struct oci_resources *resources, const struct oci_device *device, dev_t number)
{
    for (size_t i = 0; resources != NULL && i < resources->devices.count; i++) {
        struct oci_device_rule *rule = &resources->devices.items[i];
        if (rule->major == device->major && rule->minor == device->minor && strcmp(rule->type, device->type) == 0) {
            rule->major = major(number);
            rule->minor = minor(number);
        }
    }
}

static struct oci_device *find_device(struct oci_linux *about, const char *path)
{
    for (size_t i = 0; i < about->devices.count; i++)
        if (strcmp(about->devices.items[i].path, path) == 0)
            return &about->devices.items[i];
    return NULL;
}

static enum ttrpc_status find_devices(struct create_container_request *request, struct failure *failure)
{
    struct oci_linux *about = request->oci->linux_;
    for (size_t i = 0; i < request->devices.count; i++) {
        const struct device *wanted = &request->devices.items[i];
        char node[256];
        dev_t number = 0;
        bool is_block = false;
        struct oci_device *device = find_device(about, wanted->container_path);
        if (device == NULL)
            return failure_set(failure, TTRPC_INVALID_ARGUMENT, "OCI.Linux.Devices lists no %.100s",
                               wanted->container_path),
                   failure->status;
        enum ttrpc_status status = storage_find_device(wanted, node, sizeof node, &number, &is_block, failure);
        if (status != TTRPC_OK)
            return status;
        renumber_rules(about->resources, device, number);
        device->major = major(number);
        device->minor = minor(number);
        device->type = is_block ? "b" : "c";
    }
    return TTRPC_OK;
}

/* What leads to the root is refused before there is anything of the container, and to all containers at once: a
 * container may take off what is said of its own cgroup. */
static bool deny_root(const struct oci_linux *about, struct failure *failure)
{
    dev_t denied[ROOT_DEVICES];
    size_t count = storage_root_devices(denied, ROOT_DEVICES);
    for (size_t i = 0; i < about->devices.count; i++) {
        const struct oci_device *device = &about->devices.items[i];
        for (size_t j = 0; strcmp(device->type, "b") == 0 && j < count; j++)
            if (major(denied[j]) == device->major && minor(denied[j]) == device->minor)
                return failure_set(failure, TTRPC_PERMISSION_DENIED, "%.100s would be this guest's own root",
                                   device->path);
    }
    return cgroup_deny_to_all(denied, count, failure);
}

static bool limit_devices(struct container *container, struct failure *failure)
{
    const struct oci_linux *about = container->request.oci->linux_;
    dev_t denied[ROOT_DEVICES];
    size_t count = storage_root_devices(denied, ROOT_DEVICES);
    return cgroup_limit_devices(&container->cgroup, about->devices.items, about->devices.count, about->resources,
                                denied, count, failure);
}

/* --- namespaces --- */

static bool join(struct plan *plan, const char *path, struct failure *failure)
{
    if (plan->join_count == SPAWN_JOINS)
        return bad(failure, "there are more namespaces than kinds of them");
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0)
        return failure_errno(failure, "cannot open the namespace %.100s", path);
    plan->joins[plan->join_count++] = file;
    return true;
}

/* PID and mount namespaces are seen to elsewhere, and there is always a cgroup namespace of its own. */
static bool plan_namespace(struct plan *plan, const struct oci_namespace *wanted, struct settings_scope *scope,
                           struct failure *failure)
{
    const char *kind = wanted->type;
    const char *path = wanted->path;
    int flag = strcmp(kind, "ipc") == 0 ? CLONE_NEWIPC
               : strcmp(kind, "uts") == 0 ? CLONE_NEWUTS
               : strcmp(kind, "network") == 0 ? CLONE_NEWNET
                                              : 0;
    if (strcmp(kind, "pid") == 0 || strcmp(kind, "mount") == 0 || strcmp(kind, "cgroup") == 0)
        return true;
    if (flag == 0)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "namespaces of the kind %.40s are not supported", kind);
    scope->ipc |= flag == CLONE_NEWIPC;
    scope->uts |= flag == CLONE_NEWUTS;
    if (path[0] == '\0' && flag != CLONE_NEWNET)
        path = sandbox_namespace(kind);
    if (path != NULL && path[0] != '\0')
        return join(plan, path, failure);
    plan->fresh |= flag;
    return true;
}

static bool plan_pids(struct plan *plan, const struct container *container, struct failure *failure)
{
    char path[64];
    const struct container *other = container->shares_pids ? container_with_pids() : NULL;
    if (other == NULL)
        return true;
    snprintf(path, sizeof path, "/proc/%ld/ns/pid", (long)other->first->child.pid);
    plan->pids = open(path, O_RDONLY | O_CLOEXEC);
    return plan->pids >= 0 || failure_errno(failure, "cannot open the PID namespace of the containers");
}

static bool plan_namespaces(struct plan *plan, const struct container *container, struct failure *failure)
{
    const struct oci_linux *about = container->request.oci->linux_;
    /* The guest's network is the pod's: a runtime takes the namespace out of the list and leaves the settings. */
    struct settings_scope scope = {.net = true};
    for (size_t i = 0; i < about->namespaces.count; i++)
        if (!plan_namespace(plan, &about->namespaces.items[i], &scope, failure))
            return false;
    return settings_check(&about->sysctl, &scope, failure) && plan_pids(plan, container, failure);
}

static void close_plan(const struct plan *plan)
{
    for (size_t i = 0; i < plan->join_count; i++)
        close(plan->joins[i]);
    if (plan->pids >= 0)
        close(plan->pids);
    if (plan->leader >= 0)
        close(plan->leader);
}

/* --- a container's life until it runs --- */

static void run_guest_hooks(const struct container *container, enum sandbox_hook hook, const char *status)
{
    struct container_hooks_state state;
    struct buffer text = {0};
    container_hooks(container, &state, status);
    container_hooks_put_state(&text, &state);
    if (!text.failed)
        sandbox_run_hooks(hook, (const char *)buffer_content(&text).data);
    buffer_reset(&text);
}

static bool complete(struct container *container)
{
    struct container_hooks_state state;
    struct failure *failure = &container->failure;
    const struct oci_hooks *hooks = container->request.oci->hooks;
    if (!limit_devices(container, failure))
        return false;
    container_hooks(container, &state, "created");
    if (hooks != NULL && (!container_hooks_run(hooks->prestart.items, hooks->prestart.count, &state, failure) ||
                          !container_hooks_run(hooks->create_runtime.items, hooks->create_runtime.count, &state,
                                               failure)))
        return false;
    run_guest_hooks(container, SANDBOX_PRESTART, "created");
    return true;
}

static void fail_creation(struct container *container)
{
    if (container->failure.status == TTRPC_OK)
        failure_set(&container->failure, TTRPC_INTERNAL, "the container ended before it was set up");
    container->state = CONTAINER_FAILING;
    container_kill(container);
}

static void creation_changed(struct container *container, struct process *first)
{
    if (first->state == PROCESS_FAILED && container->failure.status == TTRPC_OK)
        container->failure = first->failure;
    if (first->state == PROCESS_READY && first->alive && complete(container))
        container->state = CONTAINER_CREATED;
    else if (first->state != PROCESS_SETTING_UP || !first->alive)
        fail_creation(container);
}

static void start_changed(struct container *container, struct process *first)
{
    if (first->state == PROCESS_FAILED) {
        container->failure = first->failure;
        container->state = CONTAINER_STOPPED;
    } else if (first->state == PROCESS_RUNNING) {
        struct failure failure = {0};
        struct container_hooks_state state;
        const struct oci_hooks *hooks = container->request.oci->hooks;
        container->state = CONTAINER_RUNNING;
        container_hooks(container, &state, "running");
        if (hooks != NULL &&
            !container_hooks_run(hooks->poststart.items, hooks->poststart.count, &state, &failure))
            LOG(LOG_WARN, SUBSYSTEM, "a poststart hook failed", LOG_STRING("reason", failure.reason));
        run_guest_hooks(container, SANDBOX_POSTSTART, "running");
    }
}

static void first_changed(struct process *process)
{
    struct container *container = process->owner;
    if (container->state == CONTAINER_CREATING)
        creation_changed(container, process);
    else if (container->state == CONTAINER_STARTING)
        start_changed(container, process);
    if (!process->alive) {
        container->changed_at = clock_ms();
        if (container->state == CONTAINER_CREATED || container->state == CONTAINER_RUNNING)
            container->state = CONTAINER_STOPPED;
    }
    ttrpc_wake(container);
    container_tidy(); /* the process may be freed */
}

static bool prepare(struct container *container, struct plan *plan, struct failure *failure)
{
    const struct oci_spec *spec = container->request.oci;
    const char *path = spec->linux_->cgroups_path;
    char usual[ID_SIZE + 8];
    snprintf(usual, sizeof usual, "/kata/%s", container->id);
    container->allow_mknod = strcmp(annotation(spec, ALLOW_MKNOD), "true") == 0;
    container->shares_pids = container->request.sandbox_pidns || sandbox_shares_pids();
    if (!capabilities_read(spec->process->capabilities, container->allow_mknod, &plan->capabilities, failure) ||
        !seccomp_compile(spec->linux_->seccomp, &container->filter, failure) ||
        !plan_namespaces(plan, container, failure) || !bundle_make(container->id, spec, failure))
        return false;
    return cgroup_create(&container->cgroup, path[0] == '\0' ? usual : path, failure) &&
           deny_root(spec->linux_, failure) && cgroup_limit(&container->cgroup, spec->linux_->resources, failure);
}

static bool make(struct container *container, struct failure *failure)
{
    const struct create_container_request *request = &container->request;
    struct plan plan = {
        .process = request->oci->process,
        .user = request->string_user,
        .filter = &container->filter,
        .cgroup = &container->cgroup,
        .pids = -1,
        .spec = request->oci,
        .devices = request->oci->linux_->devices.items,
        .device_count = request->oci->linux_->devices.count,
        .leader = -1,
    };
    container_hooks(container, &plan.state, "creating");
    bool made = prepare(container, &plan, failure);
    if (made) {
        container->first = process_start("", &plan, first_changed, container, failure);
        made = container->first != NULL;
    }
    close_plan(&plan);
    return made;
}

/* The call of somebody else may have been for the same container. */
static bool is_new(const char *id, struct failure *failure)
{
    return container_find(id) == NULL ||
           failure_set(failure, TTRPC_ALREADY_EXISTS, "there is a container %.100s already", id);
}

static enum ttrpc_status begin_creation(struct ttrpc_call *call)
{
    struct create_container_request request;
    container_tidy();
    if (!ttrpc_decode(call, &message_create_container_request, &request) ||
        !check_request(&request, &call->failure) || !is_new(request.container_id, &call->failure))
        return call->failure.status;
    /* In a memory of its own from here on. */
    struct container *container = container_add(request.container_id, &call->failure);
    if (container == NULL)
        return call->failure.status;
    struct arena arena = {0};
    struct create_container_request *own = &container->request;
    if (!message_decode(&message_create_container_request, call->request, &arena, own)) {
        failure_set(&call->failure, TTRPC_RESOURCE_EXHAUSTED, "no memory for a container");
        arena_reset(&arena);
        container_free(container);
        return call->failure.status;
    }
    container->arena = arena;
    enum ttrpc_status status = find_devices(own, &call->failure);
    if (status == TTRPC_OK)
        status = storage_mount(own->storages.items, own->storages.count, own->container_id, &call->failure);
    if (status != TTRPC_OK) {
        arena_reset(&container->arena);
        container_free(container);
        return status == TTRPC_LATER ? storage_later(call) : status;
    }
    call->memo = container->serial;
    if (make(container, &call->failure)) {
        oom_watch(container);
        return ttrpc_later(call, container, CLOCK_NEVER);
    }
    container_release(container);
    container_free(container);
    return call->failure.status;
}

enum { POLL_MS = 5 }; /* while the kernel takes down what was killed */

static enum ttrpc_status await_creation(struct ttrpc_call *call, struct container *container)
{
    if (container->state == CONTAINER_CREATING)
        return ttrpc_later(call, container, CLOCK_NEVER);
    container_tidy();
    if (container->state == CONTAINER_FAILING)
        return ttrpc_later(call, container, clock_ms() + POLL_MS);
    if (container->state != CONTAINER_FAILED)
        return TTRPC_OK;
    call->failure = container->failure;
    container_free(container);
    return call->failure.status;
}

enum ttrpc_status container_create(struct ttrpc_call *call)
{
    if (call->memo == 0)
        return begin_creation(call);
    struct container *container = container_with(call->memo);
    if (container == NULL)
        return failure_set(&call->failure, TTRPC_INTERNAL, "the container was removed while it was made"),
               call->failure.status;
    return await_creation(call, container);
}

/* --- StartContainer --- */

static enum ttrpc_status await_start(struct ttrpc_call *call, const struct container *container)
{
    if (container->state == CONTAINER_STARTING)
        return ttrpc_later(call, container, CLOCK_NEVER);
    call->failure = container->failure;
    return call->failure.status;
}

enum ttrpc_status container_start(struct ttrpc_call *call)
{
    struct container_request request;
    if (!ttrpc_decode(call, &message_container_request, &request))
        return call->failure.status;
    struct container *container = container_look_up(call, request.container_id);
    if (container == NULL)
        return call->failure.status;
    if (call->memo == container->serial)
        return await_start(call, container);
    if (container->state != CONTAINER_CREATED || container->paused || !process_go(container->first))
        return failure_set(&call->failure, TTRPC_FAILED_PRECONDITION, "the container %.100s is not one to start",
                           container->id),
               call->failure.status;
    container->state = CONTAINER_STARTING;
    call->memo = container->serial;
    return ttrpc_later(call, container, CLOCK_NEVER);
}

/* --- ExecProcess --- */

static void other_changed(struct process *process)
{
    struct container *container = process->owner;
    if (process->alive)
        return;
    container->changed_at = clock_ms();
    ttrpc_wake(container);
}

static bool check_exec(const struct container *container, const struct exec_process_request *request,
                       struct failure *failure)
{
    if (request->process == NULL)
        return bad(failure, "there is no process in the request");
    if (!container_valid_id(request->exec_id) || strcmp(request->exec_id, container->id) == 0)
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "%.100s is no id for a process", request->exec_id);
    for (const struct process *process = container->processes; process != NULL; process = process->next)
        if (strcmp(process->id, request->exec_id) == 0 && process->delivered_at == 0)
            return failure_set(failure, TTRPC_ALREADY_EXISTS, "there is a process %.100s already", request->exec_id);
    if (container->state != CONTAINER_RUNNING || container->paused || !container->first->alive)
        return failure_set(failure, TTRPC_FAILED_PRECONDITION, "the container %.100s does not run", container->id);
    if (process_count() >= PROCESSES)
        return failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "there are too many processes");
    return check_process(request->process, failure) &&
           check_ports(request->stdin_port, request->stdout_port, request->stderr_port, failure);
}

static bool plan_exec(struct plan *plan, const struct container *container, struct failure *failure)
{
    char path[64];
    pid_t first = container->first->child.pid;
    snprintf(path, sizeof path, "/proc/%ld/ns/pid", (long)first);
    plan->pids = open(path, O_RDONLY | O_CLOEXEC);
    plan->leader = (int)syscall(SYS_pidfd_open, first, 0);
    if (plan->pids < 0 || plan->leader < 0)
        return failure_errno(failure, "cannot open the namespaces of the container");
    return capabilities_read(plan->process->capabilities, container->allow_mknod, &plan->capabilities, failure);
}

static struct process *start_exec(struct container *container, const struct exec_process_request *request,
                                  struct failure *failure)
{
    struct plan plan = {
        .process = request->process,
        .user = request->string_user,
        .filter = &container->filter,
        .cgroup = &container->cgroup,
        .pids = -1,
        .leader = -1,
    };
    struct process *process = NULL;
    if (plan_exec(&plan, container, failure))
        process = process_start(request->exec_id, &plan, other_changed, container, failure);
    close_plan(&plan);
    if (process != NULL) {
        process->next = container->processes;
        container->processes = process;
    }
    return process;
}

static enum ttrpc_status await_exec(struct ttrpc_call *call, struct process *process)
{
    if (process->state == PROCESS_RUNNING)
        return TTRPC_OK;
    if (process->state != PROCESS_FAILED)
        return ttrpc_later(call, process, CLOCK_NEVER);
    call->failure = process->failure;
    process->delivered_at = clock_ms();
    return call->failure.status;
}

enum ttrpc_status container_exec(struct ttrpc_call *call)
{
    struct exec_process_request request;
    if (!ttrpc_decode(call, &message_exec_process_request, &request))
        return call->failure.status;
    struct container *container = container_look_up(call, request.container_id);
    if (container == NULL)
        return call->failure.status;
    struct process *process;
    if (call->memo != 0) {
        process = container_process(call, container, request.exec_id);
        return process == NULL ? call->failure.status : await_exec(call, process);
    }
    if (!check_exec(container, &request, &call->failure))
        return call->failure.status;
    process = start_exec(container, &request, &call->failure);
    if (process == NULL)
        return call->failure.status;
    call->memo = process->serial;
    return ttrpc_later(call, process, CLOCK_NEVER);
}
