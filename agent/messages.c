#include "messages.h"

#include "wire.h"

#include <stddef.h>
#include <string.h>

/* Everything in a row of this file is made by the tables of messages.h; only the kinds are spelled out here. */

enum kind {
    KIND_BOOL,
    KIND_U32,
    KIND_I32,
    KIND_U64,
    KIND_I64,
    KIND_TEXT,
    KIND_BYTES,
    KIND_TEXTS,
    KIND_NUMBERS,
    KIND_ADDRESSES,
    KIND_PAIRS,
    KIND_MAYBE_U32,
    KIND_ONE,
    KIND_MANY,
};

struct field_row {
    uint32_t number; /* 0 ends the rows */
    enum kind kind;
    size_t offset;
    const struct message_type *child;
};

struct message_type {
    const char *name;
    size_t size;
    const struct field_row *fields;
};

#define ROW_FIELD(type, number, KIND, name) {number, KIND_##KIND, offsetof(struct type, name), NULL},
#define ROW_ONE(type, number, child, name) {number, KIND_ONE, offsetof(struct type, name), &message_##child},
#define ROW_MANY(type, number, child, name) {number, KIND_MANY, offsetof(struct type, name), &message_##child},
#define ROWS(type, full_name) \
    static const struct field_row rows_##type[] = {MESSAGE_##type(type, ROW_FIELD, ROW_ONE, ROW_MANY){0}}; \
    const struct message_type message_##type = {full_name, sizeof(struct type), rows_##type};
MESSAGES(ROWS)

/* Stands for any of the structs of a pointer and a count, and for a pointer to any message. */
struct __attribute__((may_alias)) list {
    void *items;
    size_t count;
};
typedef void *__attribute__((may_alias)) any_pointer;

static bool merge(const struct message_type *type, struct span bytes, struct arena *arena, void *message);

const char *message_name(const struct message_type *type)
{
    return type->name;
}

static void begin(const struct message_type *type, void *message)
{
    for (const struct field_row *row = type->fields; row->number != 0; row++)
        if (row->kind == KIND_TEXT)
            *(const char **)((char *)message + row->offset) = "";
}

/* Room for one more element; capacities are powers of two from FIRST on, so the count tells them. */
static void *list_add(struct list *list, size_t size, struct arena *arena)
{
    enum { FIRST = 4 };
    size_t count = list->count;
    if (count == 0 || (count >= FIRST && (count & (count - 1)) == 0)) {
        void *items = arena_take(arena, size * (count == 0 ? FIRST : 2 * count));
        if (items == NULL)
            return NULL;
        if (count > 0)
            memcpy(items, list->items, size * count);
        list->items = items;
    }
    return (char *)list->items + size * list->count++;
}

static bool decode_text(struct span bytes, struct arena *arena, const char **text)
{
    if (!wire_is_utf8(bytes) || (bytes.size > 0 && memchr(bytes.data, '\0', bytes.size) != NULL))
        return false;
    *text = arena_text(arena, bytes.data, bytes.size);
    return *text != NULL;
}

static bool decode_pair(struct span bytes, struct arena *arena, struct pairs *pairs)
{
    struct pair *pair = list_add((struct list *)pairs, sizeof *pair, arena);
    if (pair == NULL)
        return false;
    *pair = (struct pair){.key = "", .value = ""};
    struct wire_reader reader = wire_read(bytes);
    struct wire_field field;
    while (wire_next(&reader, &field)) {
        if (field.tag == WIRE_TAG(1, WIRE_BYTES) && !decode_text(field.bytes, arena, &pair->key))
            return false;
        if (field.tag == WIRE_TAG(2, WIRE_BYTES) && !decode_text(field.bytes, arena, &pair->value))
            return false;
    }
    return !reader.malformed;
}

static bool add_number(enum kind kind, uint64_t value, struct arena *arena, void *target)
{
    void *room = list_add(target, kind == KIND_NUMBERS ? sizeof(uint32_t) : sizeof(uint64_t), arena);
    if (room == NULL)
        return false;
    if (kind == KIND_NUMBERS)
        *(uint32_t *)room = (uint32_t)value;
    else
        *(uint64_t *)room = value;
    return true;
}

static bool decode_packed(enum kind kind, struct span bytes, struct arena *arena, void *target)
{
    struct wire_reader reader = wire_read(bytes);
    uint64_t value;
    while (wire_next_packed(&reader, &value))
        if (!add_number(kind, value, arena, target))
            return false;
    return !reader.malformed;
}

static bool decode_one(const struct message_type *type, struct span bytes, struct arena *arena, any_pointer *target)
{
    if (*target == NULL) {
        /* An empty struct must not be NULL, which says that the message is not there. */
        *target = arena_take(arena, type->size > 0 ? type->size : 1);
        if (*target == NULL)
            return false;
        begin(type, *target);
    }
    return merge(type, bytes, arena, *target); /* what comes twice is merged */
}

static bool decode_scalar(enum kind kind, uint64_t value, struct arena *arena, void *target)
{
    switch (kind) {
    case KIND_BOOL:
        *(bool *)target = value != 0;
        return true;
    case KIND_U32:
    case KIND_I32:
        *(uint32_t *)target = (uint32_t)value; /* what does not fit is cut, as protobuf says */
        return true;
    case KIND_U64:
    case KIND_I64:
        *(uint64_t *)target = value;
        return true;
    case KIND_MAYBE_U32:
        *(struct optional_u32 *)target = (struct optional_u32){.set = true, .value = (uint32_t)value};
        return true;
    case KIND_NUMBERS:
    case KIND_ADDRESSES:
        return add_number(kind, value, arena, target);
    default:
        return true; /* another type than ours: an unknown field */
    }
}

static bool decode_bytes(const struct field_row *row, struct span bytes, struct arena *arena, void *target)
{
    void *room;
    switch (row->kind) {
    case KIND_TEXT:
        return decode_text(bytes, arena, target);
    case KIND_BYTES:
        *(struct span *)target = bytes;
        return true;
    case KIND_TEXTS:
        room = list_add(target, sizeof(const char *), arena);
        return room != NULL && decode_text(bytes, arena, room);
    case KIND_NUMBERS:
    case KIND_ADDRESSES:
        return decode_packed(row->kind, bytes, arena, target);
    case KIND_PAIRS:
        return decode_pair(bytes, arena, target);
    case KIND_ONE:
        return decode_one(row->child, bytes, arena, target);
    case KIND_MANY:
        room = list_add(target, row->child->size, arena);
        return room != NULL && message_decode(row->child, bytes, arena, room);
    default:
        return true;
    }
}

static const struct field_row *find_row(const struct message_type *type, uint32_t number)
{
    for (const struct field_row *row = type->fields; row->number != 0; row++)
        if (row->number == number)
            return row;
    return NULL;
}

static bool merge(const struct message_type *type, struct span bytes, struct arena *arena, void *message)
{
    struct wire_reader reader = wire_read(bytes);
    struct wire_field field;
    while (wire_next(&reader, &field)) {
        const struct field_row *row = find_row(type, field.tag >> 3);
        if (row == NULL)
            continue;
        void *target = (char *)message + row->offset;
        bool delimited = (field.tag & 7) == WIRE_BYTES;
        if (!delimited && (field.tag & 7) != WIRE_VARINT)
            continue;
        if (!(delimited ? decode_bytes(row, field.bytes, arena, target)
                        : decode_scalar(row->kind, field.value, arena, target)))
            return false;
    }
    return !reader.malformed;
}

bool message_decode(const struct message_type *type, struct span bytes, struct arena *arena, void *message)
{
    memset(message, 0, type->size);
    begin(type, message);
    return merge(type, bytes, arena, message);
}
