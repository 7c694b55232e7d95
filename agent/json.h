/* JSON, written from its beginning to its end; commas come by themselves. A name is NULL in a list. */
#ifndef AGENT_JSON_H
#define AGENT_JSON_H

#include "buffer.h"
#include "messages.h"

/* '{' or '[', to be ended by the other one. */
void json_begin(struct buffer *out, const char *name, char bracket);
void json_end(struct buffer *out, char bracket);
/* UTF-8, as all texts of messages are. */
void json_text(struct buffer *out, const char *name, const char *text);
void json_number(struct buffer *out, const char *name, long long number);
void json_bool(struct buffer *out, const char *name, bool value);
void json_texts(struct buffer *out, const char *name, const struct texts *texts);
/* As an object; NULL: an empty one. */
void json_pairs(struct buffer *out, const char *name, const struct pairs *pairs);

#endif
