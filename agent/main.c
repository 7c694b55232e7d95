/* osbuilder's guest agent: PID 1 of a guest, a service in it, or (--listen) an ordinary process for tests. */
#define _GNU_SOURCE
#include "debug.h"
#include "guest.h"
#include "log.h"
#include "server.h"
#include "services.h"
#include "version.h"

#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define SUBSYSTEM "root"
#define UNIX "unix:"

enum { MOST_ADDRESSES = 4 };

struct options {
    const char *paths[MOST_ADDRESSES]; /* of unix sockets to listen on instead of what a guest has */
    size_t count;
    struct debug_options debug;
};

static const char marker[] = AGENT_MARKER;

/* Out of the marker, so that no linker takes it for something nobody needs. */
static void print_version(void)
{
    const char *version = strchr(marker, '=') + 1;
    printf("osbuilder-agent %.*s\n", (int)strcspn(version, ";"), version);
}

static int usage(void)
{
    fputs("usage: osbuilder-agent [--version] [--listen unix:PATH]... [--debug-console unix:PATH] [--log unix:PATH]\n",
          stderr);
    return 2;
}

static bool take(const char *option, const char *path, struct options *options)
{
    if (strcmp(option, "--listen") == 0 && options->count < MOST_ADDRESSES)
        options->paths[options->count++] = path;
    else if (strcmp(option, "--debug-console") == 0)
        options->debug.console = path;
    else if (strcmp(option, "--log") == 0)
        options->debug.log = path;
    else
        return false;
    return true;
}

static bool parse(int argc, char **argv, struct options *options)
{
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 == argc || strncmp(argv[i + 1], UNIX, strlen(UNIX)) != 0)
            return false;
        if (!take(argv[i], argv[i + 1] + strlen(UNIX), options))
            return false;
    }
    return true;
}

static void set_log_level(void)
{
    char word[32];
    if (guest_word("agent.log", word, sizeof word) && !log_set_level(word))
        LOG(LOG_WARN, SUBSYSTEM, "agent.log knows no such level", LOG_STRING("level", word));
}

/* Words of Kata's agent that change what a runtime expects, and that mean nothing here. */
static void warn_of_words(void)
{
    static const struct {
        const char *name;
        const char *usual;
    } unserved[] = {
        {"agent.server_addr", "vsock://-1:1024"},
        {"agent.passfd_listener_port", "0"},
        {"agent.container_pipe_size", "0"},
    };
    char value[64];
    for (size_t i = 0; i < sizeof unserved / sizeof unserved[0]; i++)
        if (guest_word(unserved[i].name, value, sizeof value) && strcmp(value, unserved[i].usual) != 0)
            LOG(LOG_WARN, SUBSYSTEM, "a word of the kernel's command line is not served",
                LOG_STRING("word", unserved[i].name), LOG_STRING("value", value));
}

static void log_start(bool init)
{
    char nonce[256];
    char uptime[48];
    struct timespec since_boot;
    guest_word("osbuilder.nonce", nonce, sizeof nonce);
    clock_gettime(CLOCK_BOOTTIME, &since_boot);
    snprintf(uptime, sizeof uptime, "%lld.%03ld", (long long)since_boot.tv_sec, since_boot.tv_nsec / 1000000);
    guest_log_root();
    LOG(LOG_INFO, SUBSYSTEM, "agent started", LOG_BOOL("init", init), LOG_STRING("nonce", nonce),
        LOG_RAW("uptime_seconds", uptime));
}

static bool listen_everywhere(const struct options *options)
{
    for (size_t i = 0; i < options->count; i++)
        if (!server_listen_unix(options->paths[i]))
            return false;
    if (options->count > 0)
        return true;
    server_watch_ports();
    server_listen_vsock();
    return true;
}

int main(int argc, char **argv)
{
    struct options options = {0};
    bool first = getpid() == 1;
    if (argc == 2 && strcmp(argv[1], "--version") == 0) {
        print_version();
        return 0;
    }
    /* The kernel gives init the words of its command line that it does not know itself. */
    if (!parse(argc, argv, &options) && !first)
        return usage();
    bool init = first && options.count == 0;
    if (init)
        guest_begin();
    else
        prctl(PR_SET_CHILD_SUBREAPER, 1);
    set_log_level();
    debug_begin(&options.debug);
    services_set_init(init);
    log_start(init);
    warn_of_words();
    bool able = server_begin() && listen_everywhere(&options);
    if (able) {
        debug_listen();
        server_run();
    }
    LOG(LOG_INFO, SUBSYSTEM, init ? "powering off" : "ending");
    if (init)
        guest_power_off();
    return able ? 0 : 1;
}
