#define _GNU_SOURCE
#include "device.h"

#include "clock.h"
#include "place.h"
#include "small_file.h"
#include "storage.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define DEV "/dev/"

enum {
    LOWEST_ROOT_BUS = 0x20, /* of the buses that a NUMA guest has besides bus 0; slots are smaller */
    MOST_SLOT = 0x1f,
    MOST_FUNCTION = 7,
    RESCAN_MS = 1000, /* between two scans */
    MOST_ROOT_DEVICES = 16,
};

static const char *const refused[] = {"vfio-ap", "vfio-ap-cold", "vfio-pci", "vfio-pci-gk"};

static enum ttrpc_status missing(struct failure *failure, const char *kind, const char *where)
{
    failure_set(failure, TTRPC_INTERNAL, "waited in vain for a block device (%s) at %.100s", kind, where);
    return TTRPC_LATER;
}

static bool is_time(int64_t *last)
{
    int64_t now = clock_ms();
    if (*last != 0 && now - *last < RESCAN_MS)
        return false;
    *last = now;
    return true;
}

/* The entry of a directory that `matches`; false: there is none. */
static bool find_entry(const char *directory, bool (*matches)(const char *name, const void *what), const void *what,
                       char *name, size_t size)
{
    DIR *entries = opendir(directory);
    bool found = false;
    if (entries == NULL)
        return false;
    struct dirent *entry;
    while (!found && (entry = readdir(entries)) != NULL) {
        found = entry->d_name[0] != '.' && strlen(entry->d_name) < size && matches(entry->d_name, what);
        if (found)
            strcpy(name, entry->d_name);
    }
    closedir(entries);
    return found;
}

static bool begins_with(const char *name, const void *what)
{
    return strncmp(name, what, strlen(what)) == 0;
}

static bool ends_with(const char *name, const void *what)
{
    size_t length = strlen(what);
    return strlen(name) >= length && strcmp(name + strlen(name) - length, what) == 0;
}

/* Enter the entry that matches. */
static bool descend(char *path, bool (*matches)(const char *name, const void *what), const void *what)
{
    char name[128];
    size_t used = strlen(path);
    if (!find_entry(path, matches, what, name, sizeof name) || used + strlen(name) + 2 > PLACE_SIZE)
        return false;
    snprintf(path + used, PLACE_SIZE - used, "/%s", name);
    return true;
}

/* The block device that a device's directory in /sys has. */
static bool name_node(char *directory, struct device_node *node)
{
    char name[64];
    size_t used = strlen(directory);
    if (used + sizeof "/block" > PLACE_SIZE)
        return false;
    strcpy(directory + used, "/block");
    if (!find_entry(directory, begins_with, "", name, sizeof name))
        return false;
    for (char *at = name; *at != '\0'; at++)
        if (*at == '!') /* so /sys spells a slash */
            *at = '/';
    snprintf(node->path, sizeof node->path, DEV "%s", name);
    return true;
}

/* --- PCI --- */

static bool parse_hex(const char **at, unsigned long most, unsigned long *value)
{
    char *end;
    if (strspn(*at, "0123456789abcdefABCDEF") == 0)
        return false;
    *value = strtoul(*at, &end, 16);
    *at = end;
    return *value <= most;
}

struct pci_path {
    unsigned long root;
    size_t count;
    struct {
        uint8_t slot;
        uint8_t function;
    } steps[16];
};

static bool parse_steps(const char *at, struct pci_path *path)
{
    for (;; at++) {
        if (path->count == sizeof path->steps / sizeof path->steps[0])
            return false;
        unsigned long slot;
        unsigned long function = 0;
        if (!parse_hex(&at, MOST_SLOT, &slot))
            return false;
        if (*at == '.') {
            at++;
            if (!parse_hex(&at, MOST_FUNCTION, &function))
                return false;
        }
        path->steps[path->count].slot = (uint8_t)slot;
        path->steps[path->count++].function = (uint8_t)function;
        if (*at != '/')
            return *at == '\0';
    }
}

/* 02/01 is the device in slot 1 behind the bridge in slot 2; 20/00/01 the same on the root bus 0x20. */
static bool parse_pci(const char *text, struct pci_path *path)
{
    *path = (struct pci_path){0};
    const char *at = text;
    const char *slash = strchr(text, '/');
    unsigned long root;
    if (slash != NULL && strchr(slash + 1, '/') != NULL && parse_hex(&at, 0xff, &root) && *at == '/' &&
        root >= LOWEST_ROOT_BUS) {
        path->root = root;
        text = at + 1;
    }
    return parse_steps(text, path);
}

/* The root bus's directory in /sys/devices, which is not the same on all machines. */
static bool enter_root_bus(unsigned long bus, char *path)
{
    char link[64];
    char root[32];
    snprintf(link, sizeof link, "/sys/class/pci_bus/0000:%02lx/../..", bus);
    snprintf(root, sizeof root, "/pci0000:%02lx", bus);
    return realpath(link, path) != NULL && ends_with(path, root);
}

static bool find_pci(const struct pci_path *pci, char *path)
{
    if (!enter_root_bus(pci->root, path))
        return false;
    for (size_t i = 0; i < pci->count; i++) {
        char step[16]; /* behind the domain and the bus, of which there is one below each bridge */
        snprintf(step, sizeof step, ":%02x.%x", pci->steps[i].slot, pci->steps[i].function);
        if (!descend(path, ends_with, step))
            return false;
    }
    return true;
}

enum ttrpc_status device_find_pci(const char *where, char *directory, struct failure *failure)
{
    static int64_t last_scan;
    struct pci_path path;
    if (!parse_pci(where, &path)) {
        failure_set(failure, TTRPC_INVALID_ARGUMENT, "no PCI path (02/01, slots in hexadecimal): %.100s", where);
        return failure->status;
    }
    if (find_pci(&path, directory))
        return TTRPC_OK;
    if (is_time(&last_scan))
        (void)small_file_write("/sys/bus/pci/rescan", "1");
    if (find_pci(&path, directory))
        return TTRPC_OK;
    failure_set(failure, TTRPC_INTERNAL, "waited in vain for a device on PCI at %.100s", where);
    return TTRPC_LATER;
}

static enum ttrpc_status find_by_pci(const char *where, struct device_node *node, struct failure *failure)
{
    char directory[PLACE_SIZE];
    enum ttrpc_status status = device_find_pci(where, directory, failure);
    if (status != TTRPC_OK)
        return status;
    /* The device comes before its driver has found it. */
    return descend(directory, begins_with, "virtio") && name_node(directory, node) ? TTRPC_OK
                                                                                   : missing(failure, "PCI", where);
}

/* --- SCSI --- */

static bool parse_scsi(const char *where, unsigned long *id, unsigned long *lun)
{
    char *end;
    if (*where < '0' || *where > '9')
        return false;
    *id = strtoul(where, &end, 10);
    if (*end != ':' || end[1] < '0' || end[1] > '9')
        return false;
    *lun = strtoul(end + 1, &end, 10);
    return *end == '\0' && *id <= 255 && *lun <= 16383; /* what virtio-scsi can address */
}

static void scan_hosts(unsigned long id, unsigned long lun)
{
    DIR *hosts = opendir("/sys/class/scsi_host");
    if (hosts == NULL)
        return;
    struct dirent *host;
    while ((host = readdir(hosts)) != NULL) {
        char path[320];
        char address[32];
        snprintf(path, sizeof path, "/sys/class/scsi_host/%s/scan", host->d_name);
        snprintf(address, sizeof address, "0 %lu %lu", id, lun);
        if (host->d_name[0] != '.')
            (void)small_file_write(path, address);
    }
    closedir(hosts);
}

static bool find_scsi(unsigned long id, unsigned long lun, struct device_node *node)
{
    char path[PLACE_SIZE] = "/sys/class/scsi_device";
    char address[32]; /* behind the host's number; the channel is always 0 */
    snprintf(address, sizeof address, ":0:%lu:%lu", id, lun);
    if (!descend(path, ends_with, address))
        return false;
    strcat(path, "/device");
    return name_node(path, node);
}

static enum ttrpc_status find_by_scsi(const char *where, struct device_node *node, struct failure *failure)
{
    static int64_t last_scan;
    unsigned long id;
    unsigned long lun;
    if (!parse_scsi(where, &id, &lun)) {
        failure_set(failure, TTRPC_INVALID_ARGUMENT, "no SCSI address (id:lun): %.100s", where);
        return failure->status;
    }
    if (find_scsi(id, lun, node))
        return TTRPC_OK;
    if (is_time(&last_scan))
        scan_hosts(id, lun);
    return find_scsi(id, lun, node) ? TTRPC_OK : missing(failure, "SCSI", where);
}

/* --- the node --- */

static enum ttrpc_status find_by_name(const char *where, const char *prefix, struct device_node *node,
                                      struct failure *failure)
{
    char normal[PLACE_SIZE];
    if (!place_normalize(where, "the device", normal, failure))
        return failure->status;
    if (strncmp(normal, prefix, strlen(prefix)) != 0 || strlen(normal) >= sizeof node->path) {
        failure_set(failure, TTRPC_INVALID_ARGUMENT, "no device whose name begins with %s: %.100s", prefix, where);
        return failure->status;
    }
    strcpy(node->path, normal);
    return TTRPC_OK;
}

static bool is_root(dev_t number)
{
    dev_t numbers[MOST_ROOT_DEVICES];
    size_t count = storage_root_devices(numbers, MOST_ROOT_DEVICES);
    for (size_t i = 0; i < count; i++)
        if (numbers[i] == number)
            return true;
    return false;
}

static enum ttrpc_status look_at(const char *kind, const char *where, struct device_node *node,
                                 struct failure *failure)
{
    struct stat status;
    int file = place_open(AT_FDCWD, node->path, O_PATH);
    if (file < 0 && errno == ENOENT)
        return missing(failure, kind, where);
    bool known = file >= 0 && fstat(file, &status) == 0;
    if (!known)
        failure_errno(failure, "cannot look at %.100s", node->path);
    if (file >= 0)
        close(file);
    if (!known)
        return failure->status;
    node->number = status.st_rdev;
    if (!S_ISBLK(status.st_mode))
        failure_set(failure, TTRPC_INVALID_ARGUMENT, "%.100s is no block device", node->path);
    else if (is_root(node->number))
        failure_set(failure, TTRPC_PERMISSION_DENIED, "%.100s holds the guest's own root", node->path);
    else
        return TTRPC_OK;
    return failure->status;
}

enum ttrpc_status device_find(const char *kind, const char *where, struct device_node *node, struct failure *failure)
{
    enum ttrpc_status status;
    if (strcmp(kind, DEVICE_SCSI) == 0)
        status = find_by_scsi(where, node, failure);
    else if (strcmp(kind, DEVICE_NVDIMM) == 0)
        status = find_by_name(where, DEV "pmem", node, failure);
    else if (strcmp(kind, DEVICE_MMIOBLK) == 0 || strncmp(where, DEV, strlen(DEV)) == 0)
        status = find_by_name(where, DEV, node, failure);
    else
        status = find_by_pci(where, node, failure);
    return status == TTRPC_OK ? look_at(kind, where, node, failure) : status;
}

/* --- for containers --- */

const char *const storage_device_handlers[] = {DEVICE_BLK, DEVICE_MMIOBLK, DEVICE_NVDIMM, DEVICE_SCSI, NULL};

static bool check_kind(const struct device *device, struct failure *failure)
{
    for (const char *const *kind = storage_device_handlers; *kind != NULL; kind++)
        if (strcmp(*kind, device->type) == 0)
            return true;
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++)
        if (strcmp(refused[i], device->type) == 0)
            return failure_set(failure, TTRPC_UNIMPLEMENTED, "this agent passes no %s devices on", refused[i]);
    return failure_set(failure, TTRPC_INVALID_ARGUMENT, "no kind of device: %.100s", device->type);
}

enum ttrpc_status storage_find_device(const struct device *device, char *node, size_t size, dev_t *number,
                                      bool *is_block, struct failure *failure)
{
    struct device_node found;
    if (!check_kind(device, failure))
        return failure->status;
    /* On a bus the id says where, otherwise the path does. */
    bool on_bus = strcmp(device->type, DEVICE_SCSI) == 0 || strcmp(device->type, DEVICE_BLK) == 0;
    const char *where = on_bus && *device->id != '\0' ? device->id : device->vm_path;
    enum ttrpc_status status = device_find(device->type, where, &found, failure);
    if (status != TTRPC_OK)
        return status;
    snprintf(node, size, "%s", found.path);
    *number = found.number;
    *is_block = true;
    return TTRPC_OK;
}

/* --- the root --- */

static bool read_number(const char *path, dev_t *number)
{
    char text[32];
    unsigned int major_number;
    unsigned int minor_number;
    if (!small_file_read(path, text, sizeof text) || sscanf(text, "%u:%u", &major_number, &minor_number) != 2)
        return false;
    *number = makedev(major_number, minor_number);
    return true;
}

static size_t add(dev_t number, dev_t *numbers, size_t count, size_t room);

static size_t add_slaves(const char *home, dev_t *numbers, size_t count, size_t room)
{
    char path[PLACE_SIZE];
    snprintf(path, sizeof path, "%s/slaves", home);
    DIR *slaves = opendir(path);
    if (slaves == NULL)
        return count;
    struct dirent *slave;
    dev_t number;
    while ((slave = readdir(slaves)) != NULL) {
        snprintf(path, sizeof path, "%s/slaves/%s/dev", home, slave->d_name);
        if (slave->d_name[0] != '.' && read_number(path, &number))
            count = add(number, numbers, count, room);
    }
    closedir(slaves);
    return count;
}

/* A device, the disk that it is a partition of, and what both are made of. */
static size_t add(dev_t number, dev_t *numbers, size_t count, size_t room)
{
    char home[64];
    char path[96];
    dev_t disk;
    for (size_t i = 0; i < count; i++)
        if (numbers[i] == number)
            return count;
    if (count == room)
        return count;
    numbers[count++] = number;
    snprintf(home, sizeof home, "/sys/dev/block/%u:%u", major(number), minor(number));
    snprintf(path, sizeof path, "%s/partition", home);
    bool is_partition = access(path, F_OK) == 0;
    snprintf(path, sizeof path, "%s/../dev", home); /* the link leads to the device, whose parent is the disk */
    if (is_partition && read_number(path, &disk))
        count = add(disk, numbers, count, room);
    return add_slaves(home, numbers, count, room);
}

size_t storage_root_devices(dev_t *numbers, size_t room)
{
    struct stat root;
    /* Major 0: no device, as for an initramfs. */
    if (stat("/", &root) != 0 || major(root.st_dev) == 0)
        return 0;
    return add(root.st_dev, numbers, 0, room);
}
