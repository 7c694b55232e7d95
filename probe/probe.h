#ifndef PROBE_H
#define PROBE_H

#include <stdbool.h>
#include <stddef.h>

struct answer {
    char text[1 << 20];
    size_t size;
};

/* Adds to an answer; false when there is no room. */
__attribute__((format(printf, 2, 3))) bool say(struct answer *answer, const char *format, ...);

/* Makes it the reason why there is none, from errno; false. */
bool fail(struct answer *answer, const char *what);

/* PATH: how many pages of 2 MiB the file is mapped with, and how many faults that took. */
bool probe_map(struct answer *answer, char **words, int count);

/* PATH MOST [LONGEST]: read the file, or every file below it that is on the same filesystem and no longer than LONGEST,
 * until MOST bytes were read: how many they were (a file of several names once, and holes not at all), what the page cache was before and after, and
 * which file is the largest that has no holes. */
bool probe_drain(struct answer *answer, char **words, int count);

/* PATH MAJOR MINOR: make that node of a block device, open it, and write to it what is there already. */
bool probe_node(struct answer *answer, char **words, int count);

/* PATH: what is in a directory, a line each: its name, kind, permissions, device number, and where a link points. */
bool probe_list(struct answer *answer, char **words, int count);

/* What this program sees of its machine: processors, memory. */
bool probe_host(struct answer *answer, char **words, int count);

/* SIZE: so many bytes, if they can be had without waiting. */
bool probe_random(struct answer *answer, char **words, int count);

bool probe_clock(struct answer *answer, char **words, int count);

/* ADDRESS COUNT SIZE: how many of so many echo requests with so much data, none of them in fragments, are answered. */
bool probe_ping(struct answer *answer, char **words, int count);

/* ADDRESS PORT SIZE: send so many bytes over TCP, and have them back unchanged. */
bool probe_talk(struct answer *answer, char **words, int count);

/* PORT: give back whatever comes there, beside all other questions, as long as this program lives. */
bool probe_serve(struct answer *answer, char **words, int count);

/* PATH TEXT: write it into the file, which is made or emptied. */
bool probe_put(struct answer *answer, char **words, int count);

/* PATH OFFSET SIZE: how long the file is, a newline, and what is read of it there. */
bool probe_at(struct answer *answer, char **words, int count);

/* TEXT PATH */
bool probe_symlink(struct answer *answer, char **words, int count);

/* PATH PATH */
bool probe_rename(struct answer *answer, char **words, int count);

/* PATH: a file, a link, or an empty directory. */
bool probe_remove(struct answer *answer, char **words, int count);

/* A line for each of some system calls that a filter may refuse: its name, and the number of its error or 0. */
bool probe_calls(struct answer *answer, char **words, int count);

#endif
