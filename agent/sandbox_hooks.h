/* The guest's own hooks: programs in its image that run when containers begin and end. */
#ifndef AGENT_SANDBOX_HOOKS_H
#define AGENT_SANDBOX_HOOKS_H

#include "sandbox.h"

/* Programs of <directory>/{prestart,poststart,poststop}, in the order of their names. */
void hooks_find(const char *directory);
void hooks_forget(void);

#endif
