/* The agent's cgroups without the agent: each argument is a step, done one after the other in this process; each says
 * one line, "ok …" or "STATUS reason". Numbers and messages come from files that a test wrote (protobuf). */
#define _GNU_SOURCE
#include "cgroup.h"
#include "cgroup_path.h"

#include <fcntl.h>
#include <linux/bpf.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

static struct cgroup cgroup = {.directory = -1, .devices = -1};
static struct failure failure;
static struct arena arena;
static pid_t started;

static struct span read_all(const char *path)
{
    static uint8_t bytes[1 << 20];
    int file = open(path, O_RDONLY);
    ssize_t got = file < 0 ? -1 : read(file, bytes, sizeof bytes);
    if (got < 0) {
        perror(path);
        exit(2);
    }
    close(file);
    return (struct span){bytes, (size_t)got};
}

static void say(bool able)
{
    if (able)
        puts("ok");
    else
        printf("%d %s\n", failure.status, failure.reason);
    failure = (struct failure){0};
}

static void decode(const struct message_type *type, const char *path, void *message)
{
    if (!message_decode(type, read_all(path), &arena, message)) {
        fputs("malformed\n", stderr);
        exit(2);
    }
}

/* Returns when the shell is in the cgroup. */
static pid_t start(const char *script)
{
    int joined[2];
    char byte;
    if (pipe2(joined, O_CLOEXEC) != 0)
        exit(2);
    pid_t pid = fork();
    if (pid == 0) {
        int procs = openat(cgroup.directory, "cgroup.procs", O_WRONLY);
        if (write(procs, "0", 1) != 1) {
            perror("cgroup.procs");
            _exit(126);
        }
        execl("/bin/sh", "sh", "-c", script, NULL);
        _exit(127);
    }
    close(joined[1]);
    if (read(joined[0], &byte, 1) != 0)
        exit(2);
    close(joined[0]);
    return pid;
}

static void wait_for_it(void)
{
    int status;
    if (waitpid(started, &status, 0) != started) {
        perror("waitpid");
        exit(2);
    }
    printf("ok %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

static void run(const char *script)
{
    started = start(script);
    wait_for_it();
}

/* "8:0,8:1" or "" */
static size_t parse_numbers(const char *numbers, dev_t list[16])
{
    size_t count = 0;
    unsigned major_number, minor_number;
    int used;
    for (; sscanf(numbers, "%u:%u%n", &major_number, &minor_number, &used) == 2; numbers += used + (numbers[used] == ','))
        list[count++] = makedev(major_number, minor_number);
    return count;
}

/* FILE DENIED: a grpc.Linux, and numbers */
static void limit_devices(const char *path, const char *numbers)
{
    struct oci_linux linux_;
    dev_t denied[16];
    size_t count = parse_numbers(numbers, denied);
    decode(&message_oci_linux, path, &linux_);
    say(cgroup_limit_devices(&cgroup, linux_.devices.items, linux_.devices.count, linux_.resources, denied, count,
                             &failure));
}

static void deny_to_all(const char *numbers)
{
    dev_t denied[16];
    size_t count = parse_numbers(numbers, denied);
    say(cgroup_deny_to_all(denied, count, &failure));
}

/* How many programs decide on devices above all containers. */
static void count_guards(void)
{
    union bpf_attr attributes;
    int home = cgroup_open_home();
    memset(&attributes, 0, sizeof attributes);
    attributes.query.target_fd = (uint32_t)home;
    attributes.query.attach_type = BPF_CGROUP_DEVICE;
    if (syscall(SYS_bpf, BPF_PROG_QUERY, &attributes, sizeof attributes) != 0) {
        perror("BPF_PROG_QUERY");
        exit(2);
    }
    close(home);
    printf("ok %u\n", attributes.query.prog_cnt);
}

static void put_stats(void)
{
    struct buffer out = {0};
    cgroup_put_stats(&cgroup, &out);
    printf("ok ");
    for (size_t i = 0; i < out.size; i++)
        printf("%02x", buffer_content(&out).data[i]);
    puts("");
    buffer_reset(&out);
}

/* How many arguments it took. */
static int step(char **words)
{
    const char *verb = words[0];
    struct oci_resources resources;
    char path[512];
    if (strcmp(verb, "path") == 0) {
        bool able = cgroup_path(words[1], path, 384, &failure);
        if (able)
            printf("ok %s\n", path);
        else
            say(false);
        return 2;
    }
    if (strcmp(verb, "at") == 0) {
        cgroup.directory = open(words[1], O_RDONLY | O_DIRECTORY);
        say(cgroup.directory >= 0);
        return 2;
    }
    if (strcmp(verb, "create") == 0) {
        say(cgroup_create(&cgroup, words[1], &failure));
        return 2;
    }
    if (strcmp(verb, "limit") == 0) {
        decode(&message_oci_resources, words[1], &resources);
        say(cgroup_limit(&cgroup, &resources, &failure));
        return 2;
    }
    if (strcmp(verb, "devices") == 0) {
        limit_devices(words[1], words[2]);
        return 3;
    }
    if (strcmp(verb, "deny") == 0) {
        deny_to_all(words[1]);
        return 2;
    }
    if (strcmp(verb, "run") == 0) {
        run(words[1]);
        return 2;
    }
    if (strcmp(verb, "outside") == 0) { /* a shell that is not in the cgroup */
        fflush(stdout);
        printf("ok %d\n", WEXITSTATUS(system(words[1])));
        return 2;
    }
    if (strcmp(verb, "start") == 0) {
        started = start(words[1]);
        puts("ok");
        return 2;
    }
    if (strcmp(verb, "wait") == 0) {
        wait_for_it();
    } else if (strcmp(verb, "freeze") == 0) {
        say(cgroup_freeze(&cgroup, true, &failure));
    } else if (strcmp(verb, "thaw") == 0) {
        say(cgroup_freeze(&cgroup, false, &failure));
    } else if (strcmp(verb, "frozen") == 0) {
        for (int i = 0; i < 200 && !cgroup_is_frozen(&cgroup); i++)
            usleep(10000);
        printf("ok %d\n", cgroup_is_frozen(&cgroup));
    } else if (strcmp(verb, "kill") == 0) {
        say(cgroup_kill(&cgroup));
    } else if (strcmp(verb, "empty") == 0) {
        printf("ok %d\n", cgroup_is_empty(&cgroup));
    } else if (strcmp(verb, "emptied") == 0) { /* the shell's own children end a moment after it */
        for (int i = 0; i < 500 && !cgroup_is_empty(&cgroup); i++)
            usleep(10000);
        printf("ok %d\n", cgroup_is_empty(&cgroup));
    } else if (strcmp(verb, "guards") == 0) {
        count_guards();
    } else if (strcmp(verb, "oom") == 0) {
        printf("ok %lu\n", cgroup_oom_kills(&cgroup));
    } else if (strcmp(verb, "where") == 0) {
        printf("ok %s\n", cgroup.path);
    } else if (strcmp(verb, "stats") == 0) {
        put_stats();
    } else if (strcmp(verb, "remove") == 0) {
        cgroup_remove(&cgroup);
        puts("ok");
    } else {
        fprintf(stderr, "unknown step %s\n", verb);
        exit(2);
    }
    return 1;
}

int main(int argc, char **argv)
{
    (void)argc;
    for (char **at = argv + 1; *at != NULL;) {
        at += step(at);
        fflush(stdout);
    }
    arena_reset(&arena);
    if (cgroup.directory >= 0)
        close(cgroup.directory);
    return 0;
}
