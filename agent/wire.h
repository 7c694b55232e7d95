/* The protobuf wire format: reading that trusts nothing, writing that leaves out defaults. */
#ifndef AGENT_WIRE_H
#define AGENT_WIRE_H

#include "buffer.h"

enum wire_type {
    WIRE_VARINT = 0,
    WIRE_FIXED64 = 1,
    WIRE_BYTES = 2,
    WIRE_GROUP_BEGIN = 3,
    WIRE_GROUP_END = 4,
    WIRE_FIXED32 = 5,
};

/* What `struct wire_field.tag` is compared with: a known number of another type is an unknown field. */
#define WIRE_TAG(number, type) ((uint32_t)(number) << 3 | (uint32_t)(type))

struct wire_reader {
    const uint8_t *at;
    const uint8_t *end;
    bool malformed;
};

struct wire_field {
    uint32_t tag;
    uint64_t value; /* of a scalar */
    struct span bytes; /* of strings, bytes, submessages and packed lists */
};

struct wire_reader wire_read(struct span message);
/* The next field; groups are skipped. False at the end, and when malformed: look there afterwards. */
bool wire_next(struct wire_reader *reader, struct wire_field *field);
/* The next number of a packed list of varints, as wire_next. */
bool wire_next_packed(struct wire_reader *reader, uint64_t *value);
bool wire_is_utf8(struct span text);
/* The length of the UTF-8 sequence that a non-empty text begins with; 0: it begins with none. */
size_t wire_utf8_length(struct span text);
bool wire_equals(struct span text, const char *other);

void wire_put_uint(struct buffer *out, uint32_t number, uint64_t value);
void wire_put_bytes(struct buffer *out, uint32_t number, struct span bytes);
void wire_put_text(struct buffer *out, uint32_t number, const char *text);
/* A submessage or an element of a list: written even when it is empty. */
void wire_put_message(struct buffer *out, uint32_t number, const struct buffer *message);

#endif
