#define _GNU_SOURCE
#include "container_hooks.h"

#include "bundle.h"
#include "json.h"
#include "program.h"

enum { MOST_WORDS = 256, SECONDS = 30 };

void container_hooks_put_state(struct buffer *out, const struct container_hooks_state *state)
{
    char bundle[BUNDLE_SIZE];
    bundle_path(state->id, bundle);
    json_begin(out, NULL, '{');
    json_text(out, "ociVersion", BUNDLE_VERSION);
    json_text(out, "id", state->id);
    json_text(out, "status", state->status);
    json_number(out, "pid", state->pid);
    json_text(out, "bundle", bundle);
    json_pairs(out, "annotations", state->annotations);
    json_end(out, '}');
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
