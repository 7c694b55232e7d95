#include "syscalls.h"

enum { SYSCALLS(SYSCALLS_ABSENT) };

#ifdef __x86_64__
#include <asm/unistd_64.h>
#else
#include <asm/unistd.h>
#endif

const int16_t syscalls_native[] = SYSCALLS_TABLE;
