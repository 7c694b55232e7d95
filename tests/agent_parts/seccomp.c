/* The agent's filters without the agent: FILE is a grpc.LinuxSeccomp.
 *
 *     compile                  for each FILE on standard input: "ok FLAGS" and the program, a line each: code jt jf k,
 *                              or a status and a reason; and an empty line
 *     try FILE CALL,ARG,… …    each call made in a process of its own under it: errno, 0, or "signal N"
 */
#define _GNU_SOURCE
#include "seccomp.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static struct seccomp_filter filter;

static bool load(const char *path, struct arena *arena, struct failure *failure)
{
    static uint8_t bytes[1 << 20];
    struct oci_seccomp seccomp;
    int file = open(path, O_RDONLY);
    ssize_t got = file < 0 ? -1 : read(file, bytes, sizeof bytes);
    if (got < 0 || !message_decode(&message_oci_seccomp, (struct span){bytes, (size_t)got}, arena, &seccomp)) {
        perror(path);
        exit(2);
    }
    close(file);
    return seccomp_compile(&seccomp, &filter, failure);
}

static void try_call(char *words)
{
    long numbers[7] = {0};
    int status;
    size_t count = 0;
    for (char *word = strsep(&words, ","); word != NULL && count < 7; word = strsep(&words, ","))
        numbers[count++] = (long)strtoull(word, NULL, 0);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        if (!seccomp_install(&filter))
            _exit(255);
        long result = syscall(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]);
        _exit(result < 0 ? errno : 0);
    }
    waitpid(pid, &status, 0);
    if (WIFSIGNALED(status))
        printf("signal %d\n", WTERMSIG(status));
    else
        printf("%d\n", WEXITSTATUS(status));
}

static void compile(const char *path)
{
    struct arena arena = {0};
    struct failure failure = {0};
    if (load(path, &arena, &failure))
        printf("ok %u\n", filter.flags);
    else
        printf("%d %s\n", failure.status, failure.reason);
    for (size_t i = 0; i < filter.count; i++)
        printf("%u %u %u %u\n", filter.rows[i].code, filter.rows[i].jt, filter.rows[i].jf, filter.rows[i].k);
    puts("");
    fflush(stdout);
    seccomp_reset(&filter);
    arena_reset(&arena);
}

int main(int argc, char **argv)
{
    struct arena arena = {0};
    struct failure failure = {0};
    char path[4096];
    if (argc == 2 && strcmp(argv[1], "compile") == 0) {
        while (fgets(path, sizeof path, stdin) != NULL) {
            path[strcspn(path, "\n")] = '\0';
            compile(path);
        }
        return 0;
    }
    if (argc < 3 || strcmp(argv[1], "try") != 0 || !load(argv[2], &arena, &failure))
        return 2;
    for (int i = 3; i < argc; i++) {
        fflush(stdout);
        try_call(argv[i]);
    }
    seccomp_reset(&filter);
    arena_reset(&arena);
    return 0;
}
