/* Bytes that grow at the end and are taken from the front. Running out of memory is remembered, not fatal. */
#ifndef AGENT_BUFFER_H
#define AGENT_BUFFER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct span {
    const uint8_t *data;
    size_t size;
};

struct buffer {
    uint8_t *memory;
    size_t start; /* of the content in memory */
    size_t size; /* of the content */
    size_t capacity;
    bool failed; /* something did not fit: the content is not whole */
};

/* Room for `size` more bytes behind the content, or NULL. */
uint8_t *buffer_reserve(struct buffer *buffer, size_t size);
/* The first `size` reserved bytes are content now. */
void buffer_commit(struct buffer *buffer, size_t size);
void buffer_append(struct buffer *buffer, const void *data, size_t size);
void buffer_consume(struct buffer *buffer, size_t size);
/* Forget the content and give back the memory. */
void buffer_reset(struct buffer *buffer);
struct span buffer_content(const struct buffer *buffer);
/* The memory of all buffers there are. */
size_t buffer_held(void);

#endif
