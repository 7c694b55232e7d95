#define _GNU_SOURCE
#include "child.h"

#include "log.h"

#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/wait.h>

static struct child *children;

void child_add(struct child *child)
{
    child->next = children;
    children = child;
}

void child_remove(struct child *child)
{
    for (struct child **at = &children; *at != NULL; at = &(*at)->next)
        if (*at == child) {
            *at = child->next;
            return;
        }
}

static struct child *take(pid_t pid)
{
    for (struct child **at = &children; *at != NULL; at = &(*at)->next)
        if ((*at)->pid == pid) {
            struct child *found = *at;
            *at = found->next;
            return found;
        }
    return NULL;
}

void child_reap(void)
{
    pid_t pid;
    int status;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        struct child *child = take(pid);
        if (child != NULL) {
            child->ended(child, status);
            continue;
        }
        char number[24];
        snprintf(number, sizeof number, "%ld", (long)pid);
        LOG(LOG_DEBUG, "guest", "reaped", LOG_RAW("child", number));
    }
}

void child_reset_signals(void)
{
    struct sigaction usual = {.sa_handler = SIG_DFL};
    for (int number = 1; number < NSIG; number++)
        sigaction(number, &usual, NULL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}
