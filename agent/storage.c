#define _GNU_SOURCE
#include "storage.h"

const struct ttrpc_method_row storage_calls[] = {
    {NULL, NULL},
};

const char *const storage_handlers[] = {NULL};
const char *const storage_device_handlers[] = {NULL};

enum ttrpc_status storage_mount(const struct storage *storages, size_t count, const char *owner,
                                struct failure *failure)
{
    (void)storages;
    (void)owner;
    if (count > 0)
        failure_set(failure, TTRPC_UNIMPLEMENTED, "no storages yet");
    return failure->status;
}

void storage_release(const char *owner)
{
    (void)owner;
}
