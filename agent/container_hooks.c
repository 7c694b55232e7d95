#define _GNU_SOURCE
#include "container_hooks.h"

#include "program.h"

#include <stdio.h>
#include <string.h>

#define VERSION "1.0.2"
#define BUNDLES "/run/kata-containers/"

enum { MOST_WORDS = 256, SECONDS = 30 };

static void put(struct buffer *out, const char *text)
{
    buffer_append(out, text, strlen(text));
}

static void put_text(struct buffer *out, const char *text)
{
    put(out, "\"");
    for (; *text != '\0'; text++) {
        char escaped[8];
        unsigned char byte = (unsigned char)*text;
        if (byte == '"' || byte == '\\')
            snprintf(escaped, sizeof escaped, "\\%c", byte);
        else if (byte < 0x20)
            snprintf(escaped, sizeof escaped, "\\u%04x", byte);
        else
            snprintf(escaped, sizeof escaped, "%c", byte);
        put(out, escaped);
    }
    put(out, "\"");
}

static void put_member(struct buffer *out, const char *name, const char *value)
{
    put_text(out, name);
    put(out, ":");
    put_text(out, value);
    put(out, ",");
}

static void put_annotations(struct buffer *out, const struct pairs *annotations)
{
    put(out, "\"annotations\":{");
    for (size_t i = 0; annotations != NULL && i < annotations->count; i++) {
        put(out, i == 0 ? "" : ",");
        put_text(out, annotations->items[i].key);
        put(out, ":");
        put_text(out, annotations->items[i].value);
    }
    put(out, "}");
}

void container_hooks_put_state(struct buffer *out, const struct container_hooks_state *state)
{
    char number[40];
    char bundle[320];
    snprintf(number, sizeof number, "\"pid\":%ld,", (long)state->pid);
    snprintf(bundle, sizeof bundle, BUNDLES "%.255s", state->id);
    put(out, "{");
    put_member(out, "ociVersion", VERSION);
    put_member(out, "id", state->id);
    put_member(out, "status", state->status);
    put(out, number);
    put_member(out, "bundle", bundle);
    put_annotations(out, state->annotations);
    put(out, "}");
    buffer_append(out, "", 1);
}

/* execve wants a NULL behind the last one. */
static bool list_words(const struct texts *words, const char *list[MOST_WORDS + 1])
{
    if (words->count > MOST_WORDS)
        return false;
    for (size_t i = 0; i < words->count; i++)
        list[i] = words->items[i];
    list[words->count] = NULL;
    return true;
}

static bool run(const struct oci_hook *hook, const char *state, struct failure *failure)
{
    const char *argv[MOST_WORDS + 1];
    const char *env[MOST_WORDS + 1];
    if (!list_words(&hook->args, argv) || !list_words(&hook->env, env))
        return failure_set(failure, TTRPC_INVALID_ARGUMENT, "the hook %.100s has too many words", hook->path);
    if (argv[0] == NULL) {
        argv[0] = hook->path;
        argv[1] = NULL;
    }
    struct program program = {
        .path = hook->path,
        .argv = argv,
        .env = env,
        .input = state,
        .seconds = hook->timeout > 0 && hook->timeout < SECONDS ? (int)hook->timeout : SECONDS,
    };
    return program_run(&program, failure);
}

bool container_hooks_run(const struct oci_hook *hooks, size_t count, const struct container_hooks_state *state,
                         struct failure *failure)
{
    struct buffer text = {0};
    if (count == 0)
        return true;
    container_hooks_put_state(&text, state);
    bool done = !text.failed || failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "no memory for a hook");
    for (size_t i = 0; done && i < count; i++)
        done = run(&hooks[i], (const char *)buffer_content(&text).data, failure);
    buffer_reset(&text);
    return done;
}
