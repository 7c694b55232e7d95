/* Memory that is given back all at once: what one request decodes to. It has a limit, since a list of empty messages
 * takes two bytes each on the wire and a struct each here. */
#ifndef AGENT_ARENA_H
#define AGENT_ARENA_H

#include <stdbool.h>
#include <stddef.h>

struct arena {
    struct arena_block *blocks;
    size_t used; /* bytes, of all blocks */
    bool failed; /* something did not fit */
};

/* Zeroed and aligned for anything; NULL, and `failed`, when there is no room. */
void *arena_take(struct arena *arena, size_t size);
char *arena_text(struct arena *arena, const void *data, size_t size);
void arena_reset(struct arena *arena);

#endif
