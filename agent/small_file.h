/* Files of one line or a few, in /proc, /sys and /etc: read whole, written at once. */
#ifndef AGENT_SMALL_FILE_H
#define AGENT_SMALL_FILE_H

#include <stdbool.h>
#include <stddef.h>

/* The text without its last newline, cut to what `size` holds; false, with errno and an empty text, if it cannot be read. */
bool small_file_read(const char *path, char *text, size_t size);

/* False, with errno, when not all of it was taken. The file must be there. */
bool small_file_write(const char *path, const char *text);

/* The rest of an open file, all of it if `size` has room; closes it. */
bool small_file_take(int file, char *text, size_t size);

/* One write(2) of the whole text, as files of the kernel want it; closes the file. */
bool small_file_put(int file, const char *text);

#endif
