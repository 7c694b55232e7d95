#define _GNU_SOURCE
#include "copyfile.h"

const struct ttrpc_method_row copyfile_calls[] = {
    {NULL, NULL},
};
