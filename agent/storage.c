#define _GNU_SOURCE
#include "storage.h"

const struct ttrpc_method_row storage_calls[] = {
    {NULL, NULL},
};

const char *const storage_handlers[] = {NULL};
const char *const storage_device_handlers[] = {NULL};
