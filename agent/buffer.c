#include "buffer.h"

#include <stdlib.h>
#include <string.h>

enum {
    SMALLEST = 1024,
    KEPT = 4 * 1024, /* capacity that an empty buffer may hold on to */
    STEP = 256 * 1024, /* doubling ends here: of a frame of 4 MiB and its header, half of 8 MiB would be air */
    LARGEST = 16 * 1024 * 1024, /* a whole frame in and a whole frame out fit several times */
};

static size_t held;

size_t buffer_held(void)
{
    return held;
}

/* realloc, so that the C library can move pages instead of having both copies for a moment. */
static bool resize(struct buffer *buffer, size_t capacity)
{
    uint8_t *memory = realloc(buffer->memory, capacity);
    if (memory == NULL)
        return false;
    held = held - buffer->capacity + capacity;
    buffer->memory = memory;
    buffer->capacity = capacity;
    return true;
}

static void move_to_front(struct buffer *buffer)
{
    if (buffer->start > 0 && buffer->size > 0)
        memmove(buffer->memory, buffer->memory + buffer->start, buffer->size);
    buffer->start = 0;
}

static size_t round_up(size_t needed)
{
    size_t capacity = SMALLEST;
    while (capacity < needed && capacity < STEP)
        capacity *= 2;
    return needed <= capacity ? capacity : (needed + STEP - 1) / STEP * STEP;
}

uint8_t *buffer_reserve(struct buffer *buffer, size_t size)
{
    if (size > (size_t)LARGEST - buffer->size) {
        buffer->failed = true;
        return NULL;
    }
    size_t needed = buffer->size + size;
    if (buffer->start + needed > buffer->capacity)
        move_to_front(buffer);
    if (needed > buffer->capacity && !resize(buffer, round_up(needed))) {
        buffer->failed = true;
        return NULL;
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
    if (buffer->size == 0)
        buffer->start = 0;
    if (buffer->size == 0 && buffer->capacity > KEPT) {
        buffer_reset(buffer);
    } else if (buffer->capacity > STEP && buffer->size <= buffer->capacity / 4) {
        move_to_front(buffer);
        resize(buffer, round_up(buffer->size)); /* if not, it stays big */
    }
}

void buffer_reset(struct buffer *buffer)
{
    held -= buffer->capacity;
    free(buffer->memory);
    *buffer = (struct buffer){0};
}

struct span buffer_content(const struct buffer *buffer)
{
    return (struct span){buffer->memory == NULL ? NULL : buffer->memory + buffer->start, buffer->size};
}
