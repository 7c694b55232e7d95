#include "json.h"

#include <stdio.h>
#include <string.h>

static void put(struct buffer *out, const char *text)
{
    buffer_append(out, text, strlen(text));
}

/* Of the bytes of UTF-8 only these three kinds must not stand in a text as they are. */
static void put_text(struct buffer *out, const char *text)
{
    put(out, "\"");
    while (*text != '\0') {
        size_t plain = 0;
        while ((unsigned char)text[plain] >= 0x20 && text[plain] != '"' && text[plain] != '\\')
            plain++;
        buffer_append(out, text, plain);
        text += plain;
        if (*text == '\0')
            break;
        char escaped[8];
        snprintf(escaped, sizeof escaped, "\\u%04x", (unsigned char)*text++);
        put(out, escaped);
    }
    put(out, "\"");
}

static void put_name(struct buffer *out, const char *name)
{
    struct span written = buffer_content(out);
    if (written.size > 0 && strchr("{[", written.data[written.size - 1]) == NULL)
        put(out, ",");
    if (name == NULL)
        return;
    put_text(out, name);
    put(out, ":");
}

void json_begin(struct buffer *out, const char *name, char bracket)
{
    put_name(out, name);
    buffer_append(out, &bracket, 1);
}

void json_end(struct buffer *out, char bracket)
{
    buffer_append(out, &bracket, 1);
}

void json_text(struct buffer *out, const char *name, const char *text)
{
    put_name(out, name);
    put_text(out, text);
}

void json_number(struct buffer *out, const char *name, long long number)
{
    char text[24];
    snprintf(text, sizeof text, "%lld", number);
    put_name(out, name);
    put(out, text);
}

void json_bool(struct buffer *out, const char *name, bool value)
{
    put_name(out, name);
    put(out, value ? "true" : "false");
}

void json_texts(struct buffer *out, const char *name, const struct texts *texts)
{
    json_begin(out, name, '[');
    for (size_t i = 0; i < texts->count; i++)
        json_text(out, NULL, texts->items[i]);
    json_end(out, ']');
}

void json_pairs(struct buffer *out, const char *name, const struct pairs *pairs)
{
    json_begin(out, name, '{');
    for (size_t i = 0; pairs != NULL && i < pairs->count; i++)
        json_text(out, pairs->items[i].key, pairs->items[i].value);
    json_end(out, '}');
}
