/* The guest around the agent: what PID 1 owes it, and what the kernel says of it. */
#ifndef AGENT_GUEST_H
#define AGENT_GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Mounts, console, environment, hostname, loopback. What fails is logged: half a guest can still say what is wrong. */
void guest_begin(void);
/* Standard input, output and error are open, on /dev/null where there was nothing. */
void guest_open_standard_files(void);
/* sync and power off; does not return. */
_Noreturn void guest_power_off(void);
/* One line that says what "/" is, so that a host sees whether it came up with dax. */
void guest_log_root(void);
/* The value of the kernel's word `name=…`; false, and an empty value, when there is none or it does not fit. */
bool guest_word(const char *name, char *value, size_t size);
/* The kernel's words have `name`, alone or with a value other than 0, false and no. */
bool guest_flag(const char *name);
uint64_t guest_memory_block_size(void);
bool guest_has_memory_probe(void);

#endif
