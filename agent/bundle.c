#define _GNU_SOURCE
#include "bundle.h"

#include "json.h"
#include "small_file.h"
#include "tree.h"

#include <fcntl.h>
#include <stdio.h>

#define BUNDLES "/run/kata-containers/"

void bundle_path(const char *id, char path[BUNDLE_SIZE])
{
    snprintf(path, BUNDLE_SIZE, BUNDLES "%.255s", id);
}

static void put_user(struct buffer *out, const struct oci_user *user)
{
    json_begin(out, "user", '{');
    json_number(out, "uid", user == NULL ? 0 : user->uid);
    json_number(out, "gid", user == NULL ? 0 : user->gid);
    json_begin(out, "additionalGids", '[');
    for (size_t i = 0; user != NULL && i < user->additional_gids.count; i++)
        json_number(out, NULL, user->additional_gids.items[i]);
    json_end(out, ']');
    json_end(out, '}');
}

static void put_process(struct buffer *out, const struct oci_process *process)
{
    json_begin(out, "process", '{');
    json_bool(out, "terminal", process->terminal);
    put_user(out, process->user);
    json_texts(out, "args", &process->args);
    json_texts(out, "env", &process->env);
    json_text(out, "cwd", process->cwd);
    json_end(out, '}');
}

static void put_mount(struct buffer *out, const struct oci_mount *mount)
{
    json_begin(out, NULL, '{');
    json_text(out, "destination", mount->destination);
    json_text(out, "type", mount->type);
    json_text(out, "source", mount->source);
    json_texts(out, "options", &mount->options);
    json_end(out, '}');
}

static void put_config(struct buffer *out, const struct oci_spec *spec)
{
    json_begin(out, NULL, '{');
    json_text(out, "ociVersion", spec->version[0] == '\0' ? BUNDLE_VERSION : spec->version);
    put_process(out, spec->process);
    json_begin(out, "root", '{');
    json_text(out, "path", spec->root->path);
    json_bool(out, "readonly", spec->root->readonly);
    json_end(out, '}');
    json_text(out, "hostname", spec->hostname);
    json_begin(out, "mounts", '[');
    for (size_t i = 0; i < spec->mounts.count; i++)
        put_mount(out, &spec->mounts.items[i]);
    json_end(out, ']');
    json_pairs(out, "annotations", &spec->annotations);
    json_end(out, '}');
    buffer_append(out, "\n", sizeof "\n");
}

/* The environment may hold secrets. */
static bool write_config(const char *bundle, const struct oci_spec *spec, struct failure *failure)
{
    char path[BUNDLE_SIZE + 16];
    struct buffer text = {0};
    put_config(&text, spec);
    bool done = !text.failed || failure_set(failure, TTRPC_RESOURCE_EXHAUSTED, "no memory for a config.json");
    snprintf(path, sizeof path, "%s/config.json", bundle);
    if (done && !small_file_put(open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600),
                                (const char *)buffer_content(&text).data))
        done = failure_errno(failure, "cannot write %.100s", path);
    buffer_reset(&text);
    return done;
}

bool bundle_make(const char *id, const struct oci_spec *spec, struct failure *failure)
{
    char path[BUNDLE_SIZE];
    bundle_path(id, path);
    if (!tree_make(path, 0755))
        return failure_errno(failure, "cannot make %.100s", path);
    return write_config(path, spec, failure);
}

void bundle_remove(const char *id)
{
    char path[BUNDLE_SIZE];
    bundle_path(id, path);
    tree_remove(path);
}
