/* Looks around in a container of a guest, and says what it finds: the smoke test's checks ask it.
 *
 * A question is words, each with a NUL behind it, and an empty word at its end. The answer is '+' or '-', how many
 * bytes follow, a newline, and those bytes: lines NAME VALUE, a file's contents, or why not. It ends with its input.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    MOST_WORDS = 8,
    LONGEST_QUESTION = 16 << 10,
    LONGEST_FILE = 1 << 20,
};

typedef bool verb(struct answer *answer, char **words, int count);

struct row {
    const char *name;
    int least; /* words behind the name */
    verb *take;
};

/* --- the answer --- */

bool say(struct answer *answer, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    int size = vsnprintf(answer->text + answer->size, sizeof answer->text - answer->size, format, values);
    va_end(values);
    if (size < 0 || (size_t)size >= sizeof answer->text - answer->size)
        return false;
    answer->size += (size_t)size;
    return true;
}

bool fail(struct answer *answer, const char *what)
{
    int number = errno;
    answer->size = 0;
    say(answer, "%s: %s", what, strerror(number));
    return false;
}

static void put(const char *bytes, size_t size)
{
    while (size > 0) {
        ssize_t done = write(STDOUT_FILENO, bytes, size);
        if (done < 0)
            exit(1);
        bytes += done;
        size -= (size_t)done;
    }
}

static void send(const struct answer *answer, bool good)
{
    char head[32];
    int size = snprintf(head, sizeof head, "%c%zu\n", good ? '+' : '-', answer->size);
    put(head, (size_t)size);
    put(answer->text, answer->size);
}

/* --- questions --- */

static bool take_file(struct answer *answer, char **words, int count)
{
    (void)count;
    int file = open(words[0], O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return fail(answer, words[0]);
    ssize_t size = 0;
    while (answer->size < sizeof answer->text &&
           (size = read(file, answer->text + answer->size, sizeof answer->text - answer->size)) > 0)
        answer->size += (size_t)size;
    if (size < 0)
        fail(answer, words[0]);
    close(file);
    return size >= 0;
}

static bool take_link(struct answer *answer, char **words, int count)
{
    (void)count;
    ssize_t size = readlink(words[0], answer->text, sizeof answer->text);
    answer->size = size < 0 ? 0 : (size_t)size;
    return size >= 0 || fail(answer, words[0]);
}

static const struct row rows[] = {
    {"file", 1, take_file},       {"link", 1, take_link},   {"list", 1, probe_list}, {"map", 1, probe_map},
    {"drain", 2, probe_drain},    {"node", 3, probe_node},  {"host", 0, probe_host}, {"random", 1, probe_random},
    {"clock", 0, probe_clock},    {"ping", 3, probe_ping},  {"talk", 3, probe_talk}, {"serve", 1, probe_serve},
    {"put", 2, probe_put},    {"at", 3, probe_at},        {"symlink", 2, probe_symlink},
    {"rename", 2, probe_rename}, {"remove", 1, probe_remove},
    {"calls", 0, probe_calls},
};

static bool answer_to(struct answer *answer, char **words, int count)
{
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (count > 0 && strcmp(rows[i].name, words[0]) == 0) {
            errno = EINVAL;
            return count - 1 >= rows[i].least ? rows[i].take(answer, words + 1, count - 1) : fail(answer, words[0]);
        }
    errno = ENOSYS;
    return fail(answer, count > 0 ? words[0] : "nothing");
}

/* How many words were read; -1 at the end. */
static int read_question(char *text, char **words)
{
    size_t size = 0, start = 0;
    int count = 0;
    for (;;) {
        int byte = getchar();
        if (byte == EOF || size == LONGEST_QUESTION)
            return -1;
        text[size++] = (char)byte;
        if (byte != '\0')
            continue;
        if (size - start == 1)
            return count;
        if (count < MOST_WORDS)
            words[count++] = text + start;
        start = size;
    }
}

int main(void)
{
    static struct answer answer;
    static char text[LONGEST_QUESTION];
    char *words[MOST_WORDS];
    for (int count; (count = read_question(text, words)) >= 0;) {
        answer.size = 0;
        send(&answer, answer_to(&answer, words, count));
    }
    return 0;
}
