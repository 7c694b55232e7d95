#include "buffer.h"

#include <stdlib.h>
#include <string.h>

enum {
    SMALLEST = 1024,
    KEPT = 64 * 1024, /* capacity that an empty buffer may hold on to */
    LARGEST = 16 * 1024 * 1024, /* a whole frame in and a whole frame out fit several times */
};

uint8_t *buffer_reserve(struct buffer *buffer, size_t size)
{
    if (size > (size_t)LARGEST - buffer->size) {
        buffer->failed = true;
        return NULL;
    }
    size_t needed = buffer->size + size;
    if (needed > buffer->capacity) {
        size_t capacity = buffer->capacity < SMALLEST ? SMALLEST : buffer->capacity;
        while (capacity < needed)
            capacity *= 2;
        uint8_t *memory = malloc(capacity);
        if (memory == NULL) {
            buffer->failed = true;
            return NULL;
        }
        if (buffer->size > 0)
            memcpy(memory, buffer->memory + buffer->start, buffer->size);
        free(buffer->memory);
        buffer->memory = memory;
        buffer->capacity = capacity;
        buffer->start = 0;
    } else if (buffer->start + needed > buffer->capacity) {
        memmove(buffer->memory, buffer->memory + buffer->start, buffer->size);
        buffer->start = 0;
    }
    return buffer->memory + buffer->start + buffer->size;
}

void buffer_commit(struct buffer *buffer, size_t size)
{
    buffer->size += size;
}

void buffer_append(struct buffer *buffer, const void *data, size_t size)
{
    if (size == 0)
        return;
    uint8_t *room = buffer_reserve(buffer, size);
    if (room == NULL)
        return;
    memcpy(room, data, size);
    buffer->size += size;
}

void buffer_consume(struct buffer *buffer, size_t size)
{
    if (size > buffer->size)
        size = buffer->size;
    buffer->start += size;
    buffer->size -= size;
    if (buffer->size == 0) {
        buffer->start = 0;
        if (buffer->capacity > KEPT) {
            free(buffer->memory);
            buffer->memory = NULL;
            buffer->capacity = 0;
        }
    }
}

void buffer_reset(struct buffer *buffer)
{
    free(buffer->memory);
    *buffer = (struct buffer){0};
}

struct span buffer_content(const struct buffer *buffer)
{
    return (struct span){buffer->memory == NULL ? NULL : buffer->memory + buffer->start, buffer->size};
}
