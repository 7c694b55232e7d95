#include "syscalls.h"

#ifdef __x86_64__
enum { SYSCALLS(SYSCALLS_ABSENT) };

#define __X32_SYSCALL_BIT 0
#include <asm/unistd_x32.h>

const int16_t syscalls_x32[] = SYSCALLS_TABLE;
#endif
