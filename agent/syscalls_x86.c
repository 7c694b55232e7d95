#include "syscalls.h"

#ifdef __x86_64__
enum { SYSCALLS(SYSCALLS_ABSENT) };

#include <asm/unistd_32.h>

const int16_t syscalls_x86[] = SYSCALLS_TABLE;
#endif
