/* The messages of agent/proto that the agent takes, as C structs. One table a message says both what its struct is and
 * how it is decoded; message_decode trusts nothing of what it reads.
 *
 *     F(T, number, KIND, name)      a scalar, a text or a list of them; T is the message's own type
 *     ONE(T, number, type, name)    a message: NULL when absent
 *     MANY(T, number, type, name)   a list of messages
 *
 * Names are those of the .proto files in our spelling. Fields that nobody here reads are left out: they are skipped
 * like unknown ones.
 */
#ifndef AGENT_MESSAGES_H
#define AGENT_MESSAGES_H

#include "arena.h"
#include "buffer.h"

struct texts {
    const char **items;
    size_t count;
};

struct numbers {
    uint32_t *items;
    size_t count;
};

struct addresses {
    uint64_t *items;
    size_t count;
};

struct pair {
    const char *key;
    const char *value;
};

struct pairs {
    struct pair *items;
    size_t count;
};

struct optional_u32 {
    bool set;
    uint32_t value;
};

#define MESSAGE_C_BOOL bool
#define MESSAGE_C_U32 uint32_t
#define MESSAGE_C_I32 int32_t
#define MESSAGE_C_U64 uint64_t
#define MESSAGE_C_I64 int64_t
#define MESSAGE_C_TEXT const char * /* never NULL, no NUL inside */
#define MESSAGE_C_BYTES struct span /* lies in what was decoded */
#define MESSAGE_C_TEXTS struct texts
#define MESSAGE_C_NUMBERS struct numbers
#define MESSAGE_C_ADDRESSES struct addresses
#define MESSAGE_C_PAIRS struct pairs
#define MESSAGE_C_MAYBE_U32 struct optional_u32

/* --- oci.proto --- */

#define MESSAGE_oci_box(T, F, ONE, MANY) F(T, 1, U32, height) F(T, 2, U32, width)
#define MESSAGE_oci_user(T, F, ONE, MANY) \
    F(T, 1, U32, uid) F(T, 2, U32, gid) F(T, 3, NUMBERS, additional_gids) F(T, 4, TEXT, username)
#define MESSAGE_oci_capabilities(T, F, ONE, MANY) \
    F(T, 1, TEXTS, bounding) F(T, 2, TEXTS, effective) F(T, 3, TEXTS, inheritable) F(T, 4, TEXTS, permitted) \
    F(T, 5, TEXTS, ambient)
#define MESSAGE_oci_rlimit(T, F, ONE, MANY) F(T, 1, TEXT, type) F(T, 2, U64, hard) F(T, 3, U64, soft)
#define MESSAGE_oci_process(T, F, ONE, MANY) \
    F(T, 1, BOOL, terminal) ONE(T, 2, oci_box, console_size) ONE(T, 3, oci_user, user) F(T, 4, TEXTS, args) \
    F(T, 5, TEXTS, env) F(T, 6, TEXT, cwd) ONE(T, 7, oci_capabilities, capabilities) \
    MANY(T, 8, oci_rlimit, rlimits) F(T, 9, BOOL, no_new_privileges) F(T, 10, TEXT, apparmor_profile) \
    F(T, 11, I64, oom_score_adj) F(T, 12, TEXT, selinux_label)
#define MESSAGE_oci_mount(T, F, ONE, MANY) \
    F(T, 1, TEXT, destination) F(T, 2, TEXT, source) F(T, 3, TEXT, type) F(T, 4, TEXTS, options)
#define MESSAGE_oci_root(T, F, ONE, MANY) F(T, 1, TEXT, path) F(T, 2, BOOL, readonly)
#define MESSAGE_oci_hook(T, F, ONE, MANY) \
    F(T, 1, TEXT, path) F(T, 2, TEXTS, args) F(T, 3, TEXTS, env) F(T, 4, I64, timeout)
#define MESSAGE_oci_hooks(T, F, ONE, MANY) \
    MANY(T, 1, oci_hook, prestart) MANY(T, 2, oci_hook, poststart) MANY(T, 3, oci_hook, poststop) \
    MANY(T, 4, oci_hook, create_runtime) MANY(T, 5, oci_hook, create_container) \
    MANY(T, 6, oci_hook, start_container)
#define MESSAGE_oci_id_mapping(T, F, ONE, MANY) F(T, 1, U32, host_id) F(T, 2, U32, container_id) F(T, 3, U32, size)
#define MESSAGE_oci_namespace(T, F, ONE, MANY) F(T, 1, TEXT, type) F(T, 2, TEXT, path)
#define MESSAGE_oci_device(T, F, ONE, MANY) \
    F(T, 1, TEXT, path) F(T, 2, TEXT, type) F(T, 3, I64, major) F(T, 4, I64, minor) F(T, 5, U32, file_mode) \
    F(T, 6, U32, uid) F(T, 7, U32, gid)
#define MESSAGE_oci_device_rule(T, F, ONE, MANY) \
    F(T, 1, BOOL, allow) F(T, 2, TEXT, type) F(T, 3, I64, major) F(T, 4, I64, minor) F(T, 5, TEXT, access)
#define MESSAGE_oci_memory(T, F, ONE, MANY) \
    F(T, 1, I64, limit) F(T, 2, I64, reservation) F(T, 3, I64, swap) F(T, 4, I64, kernel) F(T, 5, I64, kernel_tcp) \
    F(T, 6, U64, swappiness) F(T, 7, BOOL, disable_oom_killer)
#define MESSAGE_oci_cpu(T, F, ONE, MANY) \
    F(T, 1, U64, shares) F(T, 2, I64, quota) F(T, 3, U64, period) F(T, 4, I64, realtime_runtime) \
    F(T, 5, U64, realtime_period) F(T, 6, TEXT, cpus) F(T, 7, TEXT, mems)
#define MESSAGE_oci_pids(T, F, ONE, MANY) F(T, 1, I64, limit)
#define MESSAGE_oci_weight_device(T, F, ONE, MANY) \
    F(T, 1, I64, major) F(T, 2, I64, minor) F(T, 3, U32, weight) F(T, 4, U32, leaf_weight)
#define MESSAGE_oci_throttle_device(T, F, ONE, MANY) F(T, 1, I64, major) F(T, 2, I64, minor) F(T, 3, U64, rate)
#define MESSAGE_oci_block_io(T, F, ONE, MANY) \
    F(T, 1, U32, weight) F(T, 2, U32, leaf_weight) MANY(T, 3, oci_weight_device, weight_device) \
    MANY(T, 4, oci_throttle_device, read_bps) MANY(T, 5, oci_throttle_device, write_bps) \
    MANY(T, 6, oci_throttle_device, read_iops) MANY(T, 7, oci_throttle_device, write_iops)
#define MESSAGE_oci_hugepage_limit(T, F, ONE, MANY) F(T, 1, TEXT, page_size) F(T, 2, U64, limit)
#define MESSAGE_oci_resources(T, F, ONE, MANY) \
    MANY(T, 1, oci_device_rule, devices) ONE(T, 2, oci_memory, memory) ONE(T, 3, oci_cpu, cpu) \
    ONE(T, 4, oci_pids, pids) ONE(T, 5, oci_block_io, block_io) MANY(T, 6, oci_hugepage_limit, hugepage_limits)
#define MESSAGE_oci_syscall_argument(T, F, ONE, MANY) \
    F(T, 1, U64, index) F(T, 2, U64, value) F(T, 3, U64, value_two) F(T, 4, TEXT, op)
#define MESSAGE_oci_syscall(T, F, ONE, MANY) \
    F(T, 1, TEXTS, names) F(T, 2, TEXT, action) F(T, 3, MAYBE_U32, errno_ret) \
    MANY(T, 4, oci_syscall_argument, args)
#define MESSAGE_oci_seccomp(T, F, ONE, MANY) \
    F(T, 1, TEXT, default_action) F(T, 2, TEXTS, architectures) F(T, 3, TEXTS, flags) \
    MANY(T, 4, oci_syscall, syscalls)
#define MESSAGE_oci_linux(T, F, ONE, MANY) \
    MANY(T, 1, oci_id_mapping, uid_mappings) MANY(T, 2, oci_id_mapping, gid_mappings) F(T, 3, PAIRS, sysctl) \
    ONE(T, 4, oci_resources, resources) F(T, 5, TEXT, cgroups_path) MANY(T, 6, oci_namespace, namespaces) \
    MANY(T, 7, oci_device, devices) ONE(T, 8, oci_seccomp, seccomp) F(T, 9, TEXT, rootfs_propagation) \
    F(T, 10, TEXTS, masked_paths) F(T, 11, TEXTS, readonly_paths)
#define MESSAGE_oci_spec(T, F, ONE, MANY) \
    F(T, 1, TEXT, version) ONE(T, 2, oci_process, process) ONE(T, 3, oci_root, root) F(T, 4, TEXT, hostname) \
    MANY(T, 5, oci_mount, mounts) ONE(T, 6, oci_hooks, hooks) F(T, 7, PAIRS, annotations) \
    ONE(T, 8, oci_linux, linux_)

/* --- types.proto --- */

#define MESSAGE_ip_address(T, F, ONE, MANY) F(T, 1, I32, family) F(T, 2, TEXT, address) F(T, 3, TEXT, mask)
#define MESSAGE_interface(T, F, ONE, MANY) \
    F(T, 1, TEXT, device) F(T, 2, TEXT, name) MANY(T, 3, ip_address, addresses) F(T, 4, U64, mtu) \
    F(T, 5, TEXT, hw_addr) F(T, 6, TEXT, device_path) F(T, 7, TEXT, type) F(T, 8, U32, raw_flags)
#define MESSAGE_route(T, F, ONE, MANY) \
    F(T, 1, TEXT, dest) F(T, 2, TEXT, gateway) F(T, 3, TEXT, device) F(T, 4, TEXT, source) F(T, 5, U32, scope) \
    F(T, 6, I32, family) F(T, 7, U32, flags) F(T, 8, U32, mtu)
#define MESSAGE_arp_neighbor(T, F, ONE, MANY) \
    ONE(T, 1, ip_address, to) F(T, 2, TEXT, device) F(T, 3, TEXT, lladdr) F(T, 4, I32, state) F(T, 5, I32, flags)

/* --- agent.proto --- */

#define MESSAGE_string_user(T, F, ONE, MANY) F(T, 1, TEXT, uid) F(T, 2, TEXT, gid) F(T, 3, TEXTS, additional_gids)
#define MESSAGE_device(T, F, ONE, MANY) \
    F(T, 1, TEXT, id) F(T, 2, TEXT, type) F(T, 3, TEXT, vm_path) F(T, 4, TEXT, container_path) \
    F(T, 5, TEXTS, options)
#define MESSAGE_fs_group(T, F, ONE, MANY) F(T, 2, U32, group_id) F(T, 3, I32, change_policy)
#define MESSAGE_storage(T, F, ONE, MANY) \
    F(T, 1, TEXT, driver) F(T, 2, TEXTS, driver_options) F(T, 3, TEXT, source) F(T, 4, TEXT, fstype) \
    F(T, 5, TEXTS, options) F(T, 6, TEXT, mount_point) ONE(T, 7, fs_group, fs_group) F(T, 8, BOOL, shared)
#define MESSAGE_kernel_module(T, F, ONE, MANY) F(T, 1, TEXT, name) F(T, 2, TEXTS, parameters)
#define MESSAGE_shared_mount(T, F, ONE, MANY) F(T, 1, TEXT, name)
#define MESSAGE_create_container_request(T, F, ONE, MANY) \
    F(T, 1, TEXT, container_id) F(T, 2, TEXT, exec_id) ONE(T, 3, string_user, string_user) \
    MANY(T, 4, device, devices) MANY(T, 5, storage, storages) ONE(T, 6, oci_spec, oci) \
    F(T, 7, BOOL, sandbox_pidns) MANY(T, 8, shared_mount, shared_mounts) F(T, 9, U32, stdin_port) \
    F(T, 10, U32, stdout_port) F(T, 11, U32, stderr_port)
#define MESSAGE_container_request(T, F, ONE, MANY) F(T, 1, TEXT, container_id)
#define MESSAGE_remove_container_request(T, F, ONE, MANY) F(T, 1, TEXT, container_id) F(T, 2, U32, timeout)
#define MESSAGE_exec_process_request(T, F, ONE, MANY) \
    F(T, 1, TEXT, container_id) F(T, 2, TEXT, exec_id) ONE(T, 3, string_user, string_user) \
    ONE(T, 4, oci_process, process) F(T, 5, U32, stdin_port) F(T, 6, U32, stdout_port) F(T, 7, U32, stderr_port)
#define MESSAGE_signal_process_request(T, F, ONE, MANY) \
    F(T, 1, TEXT, container_id) F(T, 2, TEXT, exec_id) F(T, 3, U32, signal)
#define MESSAGE_process_request(T, F, ONE, MANY) F(T, 1, TEXT, container_id) F(T, 2, TEXT, exec_id)
#define MESSAGE_update_container_request(T, F, ONE, MANY) \
    F(T, 1, TEXT, container_id) ONE(T, 2, oci_resources, resources)
#define MESSAGE_write_stream_request(T, F, ONE, MANY) \
    F(T, 1, TEXT, container_id) F(T, 2, TEXT, exec_id) F(T, 3, BYTES, data)
#define MESSAGE_read_stream_request(T, F, ONE, MANY) \
    F(T, 1, TEXT, container_id) F(T, 2, TEXT, exec_id) F(T, 3, U32, len)
#define MESSAGE_tty_win_resize_request(T, F, ONE, MANY) \
    F(T, 1, TEXT, container_id) F(T, 2, TEXT, exec_id) F(T, 3, U32, row) F(T, 4, U32, column)
#define MESSAGE_create_sandbox_request(T, F, ONE, MANY) \
    F(T, 1, TEXT, hostname) F(T, 2, TEXTS, dns) MANY(T, 3, storage, storages) F(T, 4, BOOL, sandbox_pidns) \
    F(T, 5, TEXT, sandbox_id) F(T, 6, TEXT, guest_hook_path) MANY(T, 7, kernel_module, kernel_modules)
#define MESSAGE_empty(T, F, ONE, MANY) 
#define MESSAGE_update_interface_request(T, F, ONE, MANY) ONE(T, 1, interface, interface)
#define MESSAGE_routes(T, F, ONE, MANY) MANY(T, 1, route, routes)
#define MESSAGE_update_routes_request(T, F, ONE, MANY) ONE(T, 1, routes, routes)
#define MESSAGE_update_ephemeral_mounts_request(T, F, ONE, MANY) MANY(T, 1, storage, storages)
#define MESSAGE_arp_neighbors(T, F, ONE, MANY) MANY(T, 1, arp_neighbor, neighbors)
#define MESSAGE_add_arp_neighbors_request(T, F, ONE, MANY) ONE(T, 1, arp_neighbors, neighbors)
#define MESSAGE_online_cpu_mem_request(T, F, ONE, MANY) \
    F(T, 1, BOOL, wait) F(T, 2, U32, nb_cpus) F(T, 3, BOOL, cpu_only)
#define MESSAGE_reseed_random_dev_request(T, F, ONE, MANY) F(T, 2, BYTES, data)
#define MESSAGE_guest_details_request(T, F, ONE, MANY) F(T, 1, BOOL, mem_block_size) F(T, 2, BOOL, mem_hotplug_probe)
#define MESSAGE_mem_hotplug_by_probe_request(T, F, ONE, MANY) F(T, 1, ADDRESSES, addresses)
#define MESSAGE_set_guest_date_time_request(T, F, ONE, MANY) F(T, 1, I64, sec) F(T, 2, I64, usec)
#define MESSAGE_copy_file_request(T, F, ONE, MANY) \
    F(T, 1, TEXT, path) F(T, 2, I64, file_size) F(T, 3, U32, file_mode) F(T, 4, U32, dir_mode) F(T, 5, I32, uid) \
    F(T, 6, I32, gid) F(T, 7, I64, offset) F(T, 8, BYTES, data)
#define MESSAGE_add_swap_request(T, F, ONE, MANY) F(T, 1, NUMBERS, pci_path)
#define MESSAGE_add_swap_path_request(T, F, ONE, MANY) F(T, 1, TEXT, path)
#define MESSAGE_volume_stats_request(T, F, ONE, MANY) F(T, 1, TEXT, volume_guest_path)
#define MESSAGE_check_request(T, F, ONE, MANY) F(T, 1, TEXT, service)

/* In an order in which each stands behind what it holds. */
#define MESSAGES(X) \
    X(oci_box, "grpc.Box") X(oci_user, "grpc.User") X(oci_capabilities, "grpc.LinuxCapabilities") \
    X(oci_rlimit, "grpc.POSIXRlimit") X(oci_process, "grpc.Process") X(oci_mount, "grpc.Mount") \
    X(oci_root, "grpc.Root") X(oci_hook, "grpc.Hook") X(oci_hooks, "grpc.Hooks") \
    X(oci_id_mapping, "grpc.LinuxIDMapping") X(oci_namespace, "grpc.LinuxNamespace") \
    X(oci_device, "grpc.LinuxDevice") X(oci_device_rule, "grpc.LinuxDeviceCgroup") \
    X(oci_memory, "grpc.LinuxMemory") X(oci_cpu, "grpc.LinuxCPU") X(oci_pids, "grpc.LinuxPids") \
    X(oci_weight_device, "grpc.LinuxWeightDevice") X(oci_throttle_device, "grpc.LinuxThrottleDevice") \
    X(oci_block_io, "grpc.LinuxBlockIO") X(oci_hugepage_limit, "grpc.LinuxHugepageLimit") \
    X(oci_resources, "grpc.LinuxResources") X(oci_syscall_argument, "grpc.LinuxSeccompArg") \
    X(oci_syscall, "grpc.LinuxSyscall") X(oci_seccomp, "grpc.LinuxSeccomp") X(oci_linux, "grpc.Linux") \
    X(oci_spec, "grpc.Spec") \
    X(ip_address, "types.IPAddress") X(interface, "types.Interface") X(route, "types.Route") \
    X(arp_neighbor, "types.ARPNeighbor") \
    X(string_user, "grpc.StringUser") X(device, "grpc.Device") X(fs_group, "grpc.FSGroup") \
    X(storage, "grpc.Storage") X(kernel_module, "grpc.KernelModule") \
    X(shared_mount, "grpc.SharedMount") \
    X(create_container_request, "grpc.CreateContainerRequest") X(container_request, "request with a container's id") \
    X(remove_container_request, "grpc.RemoveContainerRequest") X(exec_process_request, "grpc.ExecProcessRequest") \
    X(signal_process_request, "grpc.SignalProcessRequest") X(process_request, "request with a process's id") \
    X(update_container_request, "grpc.UpdateContainerRequest") X(write_stream_request, "grpc.WriteStreamRequest") \
    X(read_stream_request, "grpc.ReadStreamRequest") X(tty_win_resize_request, "grpc.TtyWinResizeRequest") \
    X(create_sandbox_request, "grpc.CreateSandboxRequest") X(empty, "message without fields") \
    X(update_interface_request, "grpc.UpdateInterfaceRequest") X(routes, "grpc.Routes") \
    X(update_routes_request, "grpc.UpdateRoutesRequest") \
    X(update_ephemeral_mounts_request, "grpc.UpdateEphemeralMountsRequest") X(arp_neighbors, "grpc.ARPNeighbors") \
    X(add_arp_neighbors_request, "grpc.AddARPNeighborsRequest") \
    X(online_cpu_mem_request, "grpc.OnlineCPUMemRequest") \
    X(reseed_random_dev_request, "grpc.ReseedRandomDevRequest") X(guest_details_request, "grpc.GuestDetailsRequest") \
    X(mem_hotplug_by_probe_request, "grpc.MemHotplugByProbeRequest") \
    X(set_guest_date_time_request, "grpc.SetGuestDateTimeRequest") X(copy_file_request, "grpc.CopyFileRequest") \
    X(add_swap_request, "grpc.AddSwapRequest") X(add_swap_path_request, "grpc.AddSwapPathRequest") \
    X(volume_stats_request, "grpc.VolumeStatsRequest") \
    X(check_request, "grpc.CheckRequest")

#define MESSAGE_FIELD(type, number, KIND, name) MESSAGE_C_##KIND name;
#define MESSAGE_ONE(type, number, child, name) struct child *name;
#define MESSAGE_MANY(type, number, child, name) \
    struct { \
        struct child *items; \
        size_t count; \
    } name;
#define MESSAGE_STRUCT(type, full_name) \
    struct type { \
        MESSAGE_##type(type, MESSAGE_FIELD, MESSAGE_ONE, MESSAGE_MANY) \
    };
MESSAGES(MESSAGE_STRUCT)

struct message_type;
#define MESSAGE_TYPE(type, full_name) extern const struct message_type message_##type;
MESSAGES(MESSAGE_TYPE)

/* Decode `bytes` into `message`, a struct of that type, whose lists and texts then lie in the arena. False: malformed,
 * or arena->failed. */
bool message_decode(const struct message_type *type, struct span bytes, struct arena *arena, void *message);
/* As the .proto files call it. */
const char *message_name(const struct message_type *type);

#endif
