#include "wire.h"

#include <string.h>

enum {
    DEEPEST_GROUP = 64, /* the official parsers stop at 100 */
    LONGEST_VARINT = 10,
};

struct wire_reader wire_read(struct span message)
{
    /* NULL + 0 is not defined in C, and an empty message often has no bytes at all. */
    static const uint8_t nothing[1];
    const uint8_t *data = message.size == 0 ? nothing : message.data;
    return (struct wire_reader){.at = data, .end = data + message.size};
}

static size_t left(const struct wire_reader *reader)
{
    return (size_t)(reader->end - reader->at);
}

static bool fail(struct wire_reader *reader)
{
    reader->malformed = true;
    reader->at = reader->end;
    return false;
}

static bool read_varint(struct wire_reader *reader, uint64_t *value)
{
    uint64_t result = 0;
    for (unsigned i = 0; i < LONGEST_VARINT; i++) {
        if (reader->at == reader->end)
            return fail(reader);
        uint8_t byte = *reader->at++;
        if (i == LONGEST_VARINT - 1 && byte > 1)
            return fail(reader); /* more than 64 bits */
        result |= (uint64_t)(byte & 0x7f) << (7 * i);
        if ((byte & 0x80) == 0) {
            *value = result;
            return true;
        }
    }
    return fail(reader);
}

static bool read_tag(struct wire_reader *reader, uint32_t *tag)
{
    uint64_t value;
    if (!read_varint(reader, &value))
        return false;
    if (value > UINT32_MAX || value >> 3 == 0)
        return fail(reader);
    *tag = (uint32_t)value;
    return true;
}

static bool read_fixed(struct wire_reader *reader, unsigned size, uint64_t *value)
{
    if (left(reader) < size)
        return fail(reader);
    *value = 0;
    for (unsigned i = 0; i < size; i++)
        *value |= (uint64_t)reader->at[i] << (8 * i);
    reader->at += size;
    return true;
}

static bool read_bytes(struct wire_reader *reader, struct span *bytes)
{
    uint64_t size;
    if (!read_varint(reader, &size))
        return false;
    if (size > left(reader))
        return fail(reader);
    *bytes = (struct span){reader->at, (size_t)size};
    reader->at += size;
    return true;
}

static bool read_content(struct wire_reader *reader, struct wire_field *field)
{
    switch (field->tag & 7) {
    case WIRE_VARINT:
        return read_varint(reader, &field->value);
    case WIRE_FIXED64:
        return read_fixed(reader, 8, &field->value);
    case WIRE_BYTES:
        return read_bytes(reader, &field->bytes);
    case WIRE_FIXED32:
        return read_fixed(reader, 4, &field->value);
    default:
        return fail(reader);
    }
}

/* Everything up to the end of the group that `tag` began; without recursion, for the stack's sake. */
static bool skip_group(struct wire_reader *reader, uint32_t tag)
{
    uint32_t open[DEEPEST_GROUP];
    size_t depth = 0;
    open[depth++] = tag >> 3;
    while (depth > 0) {
        struct wire_field field = {0};
        if (!read_tag(reader, &field.tag))
            return false;
        switch (field.tag & 7) {
        case WIRE_GROUP_BEGIN:
            if (depth == DEEPEST_GROUP)
                return fail(reader);
            open[depth++] = field.tag >> 3;
            break;
        case WIRE_GROUP_END:
            if (open[--depth] != field.tag >> 3)
                return fail(reader);
            break;
        default:
            if (!read_content(reader, &field))
                return false;
        }
    }
    return true;
}

bool wire_next(struct wire_reader *reader, struct wire_field *field)
{
    while (reader->at != reader->end) {
        *field = (struct wire_field){0};
        if (!read_tag(reader, &field->tag))
            return false;
        if ((field->tag & 7) != WIRE_GROUP_BEGIN)
            return read_content(reader, field);
        if (!skip_group(reader, field->tag))
            return false;
    }
    return false;
}

bool wire_next_packed(struct wire_reader *reader, uint64_t *value)
{
    return reader->at != reader->end && read_varint(reader, value);
}

/* No overlong forms, no surrogates, nothing over U+10FFFF. */
size_t wire_utf8_length(struct span text)
{
    const uint8_t *at = text.data;
    uint8_t first = at[0];
    if (first < 0x80)
        return 1;
    size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || text.size < length)
        return 0;
    for (size_t i = 1; i < length; i++)
        if ((at[i] & 0xc0) != 0x80)
            return 0;
    if ((first == 0xe0 && at[1] < 0xa0) || (first == 0xed && at[1] > 0x9f) || (first == 0xf0 && at[1] < 0x90) ||
        (first == 0xf4 && at[1] > 0x8f))
        return 0;
    return length;
}

bool wire_is_utf8(struct span text)
{
    for (size_t at = 0; at < text.size;) {
        size_t length = wire_utf8_length((struct span){text.data + at, text.size - at});
        if (length == 0)
            return false;
        at += length;
    }
    return true;
}

bool wire_equals(struct span text, const char *other)
{
    return text.size == strlen(other) && (text.size == 0 || memcmp(text.data, other, text.size) == 0);
}

static void put_varint(struct buffer *out, uint64_t value)
{
    uint8_t bytes[LONGEST_VARINT];
    size_t size = 0;
    do {
        bytes[size++] = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
        value >>= 7;
    } while (value != 0);
    buffer_append(out, bytes, size);
}

void wire_put_uint(struct buffer *out, uint32_t number, uint64_t value)
{
    if (value == 0)
        return;
    put_varint(out, WIRE_TAG(number, WIRE_VARINT));
    put_varint(out, value);
}

static void put_delimited(struct buffer *out, uint32_t number, struct span bytes)
{
    put_varint(out, WIRE_TAG(number, WIRE_BYTES));
    put_varint(out, bytes.size);
    buffer_append(out, bytes.data, bytes.size);
}

void wire_put_bytes(struct buffer *out, uint32_t number, struct span bytes)
{
    if (bytes.size > 0)
        put_delimited(out, number, bytes);
}

void wire_put_text(struct buffer *out, uint32_t number, const char *text)
{
    wire_put_bytes(out, number, (struct span){(const uint8_t *)text, strlen(text)});
}

void wire_put_message(struct buffer *out, uint32_t number, const struct buffer *message)
{
    if (message->failed)
        out->failed = true;
    put_delimited(out, number, buffer_content(message));
}
