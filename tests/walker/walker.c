/* Walks filesystems as the kernel shows them, and says everything about every path: PID 1 of a guest of its own.
 *
 * /.walker/jobs    what to walk, a line each:  device start size fstype options
 *                  start and size in bytes make a partition of the device; two zeros take it whole;
 *                  fstype "-" is the root that we run in, without what is mounted in it and without /.walker;
 *                  options "-" are none
 * port "walker"    a virtio-serial port that takes the answer: JSON, an object a line (README.md)
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#define HOME "/.walker"
#define PATHS 8192
#define HUGE_PAGE ((uint64_t)2 << 20)
#define MAPPED ((void *)((uintptr_t)1 << 44)) /* where nothing else is, on a boundary of any huge page */

/* Output */

static char out[1 << 20];
static size_t used;
static int port = 2;

static void flush(void)
{
	for (size_t at = 0; at < used;) {
		ssize_t done = write(port, out + at, used - at);
		if (done < 0 && errno != EINTR)
			break;
		at += done > 0 ? (size_t)done : 0;
	}
	used = 0;
}

__attribute__((format(printf, 1, 2))) static void put(const char *format, ...)
{
	va_list list;
	if (sizeof out - used < 1024)
		flush();
	va_start(list, format);
	int size = vsnprintf(out + used, sizeof out - used, format, list);
	va_end(list);
	if (size > 0)
		used += (size_t)size;
}

static void put_hex(const void *data, size_t size)
{
	static const char digits[] = "0123456789abcdef";
	const unsigned char *bytes = data;
	for (size_t i = 0; i < size; i++) {
		if (sizeof out - used < 2)
			flush();
		out[used++] = digits[bytes[i] >> 4];
		out[used++] = digits[bytes[i] & 15];
	}
}

/* A line of its own, between those of paths: something that should work and did not. */
static void put_error(const char *what, const char *path)
{
	int number = errno;
	put("{\"error\":\"%s\",\"errno\":%d,\"path\":\"", what, number);
	put_hex(path, strlen(path));
	put("\"}\n");
}

/* What failed on the way to the current record; written after it. */
static struct {
	const char *what;
	int number;
} failures[16];
static int failed;

static void fail(const char *what)
{
	if (failed < 16) {
		failures[failed].what = what;
		failures[failed++].number = errno;
	}
}

/* SHA-256 (FIPS 180-4) */

static const uint32_t K[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

#define TURN(value, bits) ((value) >> (bits) | (value) << (32 - (bits)))
/* Eight of these with the letters turned need no moves: under emulation that is three times as fast. */
#define ROUND(a, b, c, d, e, f, g, h, i)                                                                      \
	do {                                                                                                  \
		uint32_t one = h + (TURN(e, 6) ^ TURN(e, 11) ^ TURN(e, 25)) + (g ^ (e & (f ^ g))) + K[i] + w[i]; \
		d += one;                                                                                     \
		h = one + (TURN(a, 2) ^ TURN(a, 13) ^ TURN(a, 22)) + ((a & b) | (c & (a | b)));               \
	} while (0)

static void mix(uint32_t state[8], const unsigned char *block)
{
	uint32_t w[64];
	uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
	uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
	for (int i = 0; i < 16; i++) {
		memcpy(&w[i], block + 4 * i, 4);
		w[i] = __builtin_bswap32(w[i]);
	}
	for (int i = 16; i < 64; i++) {
		uint32_t x = w[i - 15], y = w[i - 2];
		w[i] = w[i - 16] + w[i - 7] + (TURN(x, 7) ^ TURN(x, 18) ^ x >> 3) + (TURN(y, 17) ^ TURN(y, 19) ^ y >> 10);
	}
	for (int i = 0; i < 64; i += 8) {
		ROUND(a, b, c, d, e, f, g, h, i);
		ROUND(h, a, b, c, d, e, f, g, i + 1);
		ROUND(g, h, a, b, c, d, e, f, i + 2);
		ROUND(f, g, h, a, b, c, d, e, i + 3);
		ROUND(e, f, g, h, a, b, c, d, i + 4);
		ROUND(d, e, f, g, h, a, b, c, i + 5);
		ROUND(c, d, e, f, g, h, a, b, i + 6);
		ROUND(b, c, d, e, f, g, h, a, i + 7);
	}
	uint32_t sums[8] = {a, b, c, d, e, f, g, h};
	for (int i = 0; i < 8; i++)
		state[i] += sums[i];
}

struct hash {
	uint32_t state[8];
	uint64_t total;
	unsigned char rest[64];
};

static void hash_begin(struct hash *hash)
{
	static const uint32_t first[8] = {
		0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
	};
	memcpy(hash->state, first, sizeof first);
	hash->total = 0;
}

static void hash_add(struct hash *hash, const unsigned char *data, size_t size)
{
	size_t have = hash->total % 64;
	hash->total += size;
	while (have + size >= 64) {
		size_t take = 64 - have;
		if (have) {
			memcpy(hash->rest + have, data, take);
			mix(hash->state, hash->rest);
		} else {
			mix(hash->state, data);
		}
		data += take;
		size -= take;
		have = 0;
	}
	memcpy(hash->rest + have, data, size);
}

static void put_hash(struct hash *hash)
{
	uint64_t bits = __builtin_bswap64(hash->total * 8);
	unsigned char end[128] = {0x80};
	size_t size = 64 - (hash->total + 8) % 64;
	memcpy(end + size, &bits, 8);
	hash_add(hash, end, size + 8);
	for (int i = 0; i < 8; i++)
		put("%08" PRIx32, hash->state[i]);
}

/* Files */

/* PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst), which our headers may be too old for. */
struct scan {
	uint64_t size, flags, start, end, walk_end, regions, region_count, max_pages, inverted, mask, any, wanted;
};
struct region {
	uint64_t start, end, categories;
};
#define SCAN _IOWR('f', 16, struct scan)
#define IS_HUGE ((uint64_t)1 << 6)

static uint64_t count_huge(uint64_t size)
{
	struct region regions[32];
	uint64_t start = (uintptr_t)MAPPED, end = start + (size + 4095) / 4096 * 4096, total = 0;
	int map = open(HOME "/proc/self/pagemap", O_RDONLY);
	while (start < end) {
		struct scan scan = {
			.size = sizeof scan, .start = start, .end = end, .regions = (uintptr_t)regions, .region_count = 32,
			.mask = IS_HUGE, .wanted = IS_HUGE,
		};
		int found = ioctl(map, SCAN, &scan);
		if (found < 0) {
			fail("PAGEMAP_SCAN");
			break;
		}
		for (int i = 0; i < found; i++)
			total += regions[i].end - regions[i].start;
		start = scan.walk_end;
	}
	close(map);
	return total;
}

/* Through mmap where files are mapped where they lie, which is what DAX is for; says how much huge pages map. */
static void read_mapped(int file, uint64_t size, struct hash *hash)
{
	uint64_t huge = 0;
	if (size) {
		void *data = mmap(MAPPED, size, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0);
		if (data == MAP_FAILED) {
			fail("mmap");
			return;
		}
		hash_add(hash, data, size);
		if (size >= HUGE_PAGE)
			huge = count_huge(size);
		munmap(data, size);
	}
	put(",\"huge\":%" PRIu64, huge);
}

static void read_plain(int file, struct hash *hash)
{
	static unsigned char data[1 << 18];
	ssize_t got;
	while ((got = read(file, data, sizeof data)) > 0)
		hash_add(hash, data, (size_t)got);
	if (got < 0)
		fail("read");
}

static void put_data_map(int file, off_t size)
{
	off_t at = 0, hole = 0;
	put(",\"data\":[");
	while (at < size) {
		off_t data = lseek(file, at, SEEK_DATA);
		if (data < 0) {
			if (errno != ENXIO)
				fail("SEEK_DATA");
			break;
		}
		hole = lseek(file, data, SEEK_HOLE);
		if (hole <= data) {
			fail("SEEK_HOLE");
			break;
		}
		put("%s[%jd,%jd]", at ? "," : "", (intmax_t)data, (intmax_t)hole);
		at = hole;
	}
	put("]");
}

/* FS_IOC_FIEMAP (linux/fiemap.h): where the filesystem itself says that a file has blocks. */
struct extent {
	uint64_t logical, physical, length, reserved[2];
	uint32_t flags, more[3];
};
struct extent_map {
	uint64_t start, length;
	uint32_t flags, mapped, count, reserved;
	struct extent extents[64];
};
#define MAP _IOC(_IOC_READ | _IOC_WRITE, 'f', 11, 32)

static void put_extents(int file, off_t size)
{
	static struct extent_map map;
	const char *comma = "";
	uint64_t at = 0;
	put(",\"extents\":[");
	do {
		map = (struct extent_map){.start = at, .length = (uint64_t)size - at, .count = 64};
		if (at >= (uint64_t)size)
			break;
		if (ioctl(file, MAP, &map)) {
			if (errno != EOPNOTSUPP) /* tmpfs */
				fail("FIEMAP");
			break;
		}
		for (uint32_t i = 0; i < map.mapped; i++, comma = ",") {
			at = map.extents[i].logical + map.extents[i].length;
			put("%s[%" PRIu64 ",%" PRIu64 "]", comma, map.extents[i].logical, at);
		}
	} while (map.mapped);
	put("]");
}

static void put_file(const char *path, off_t size, bool mapped)
{
	struct hash hash;
	int file = open(path, O_RDONLY | O_NOFOLLOW);
	if (file < 0) {
		fail("open");
		return;
	}
	put_data_map(file, size);
	put_extents(file, size);
	lseek(file, 0, SEEK_SET);
	hash_begin(&hash);
	if (mapped)
		read_mapped(file, (uint64_t)size, &hash);
	else
		read_plain(file, &hash);
	put(",\"sha256\":\"");
	put_hash(&hash);
	put("\"");
	close(file);
}

static void put_target(const char *path)
{
	char target[PATHS];
	ssize_t size = readlink(path, target, sizeof target);
	if (size < 0) {
		fail("readlink");
		return;
	}
	put(",\"target\":\"");
	put_hex(target, (size_t)size);
	put("\"");
}

static void put_xattrs(const char *path)
{
	static char names[1 << 16], value[1 << 16];
	ssize_t size = llistxattr(path, names, sizeof names);
	if (size < 0) {
		fail("listxattr");
		return;
	}
	put(",\"xattrs\":[");
	for (ssize_t at = 0; at < size; at += (ssize_t)strlen(names + at) + 1) {
		ssize_t got = lgetxattr(path, names + at, value, sizeof value);
		put("%s[\"", at ? "," : "");
		put_hex(names + at, strlen(names + at));
		put("\",");
		if (got < 0) {
			fail("getxattr");
			put("null]");
			continue;
		}
		put("\"");
		put_hex(value, (size_t)got);
		put("\"]");
	}
	put("]");
}

/* The walk */

struct visit {
	char *path;
	ino_t inode;
	mode_t mode;
};
static struct visit *visits;
static size_t visit_count, visit_room;

static void remember(const char *path, const struct stat *found)
{
	if (visit_count == visit_room) {
		visit_room = visit_room ? 2 * visit_room : 1024;
		visits = realloc(visits, visit_room * sizeof *visits);
		if (!visits)
			abort(); /* PID 1: the kernel panics, and the host sees an answer without an end */
	}
	visits[visit_count++] = (struct visit){strdup(path), found->st_ino, found->st_mode};
}

static void put_record(const char *path, const char *shown, const struct stat *found, int kind, ino_t listed, bool mapped)
{
	put("{\"path\":\"");
	put_hex(shown, strlen(shown));
	put("\",\"kind\":%d,\"listed\":%ju,\"mode\":%u,\"uid\":%ju,\"gid\":%ju,\"size\":%jd", kind, (uintmax_t)listed,
	    (unsigned)found->st_mode, (uintmax_t)found->st_uid, (uintmax_t)found->st_gid, (intmax_t)found->st_size);
	put(",\"seconds\":%jd,\"nanoseconds\":%ld,\"links\":%ju,\"inode\":%ju,\"major\":%u,\"minor\":%u,\"blocks\":%jd",
	    (intmax_t)found->st_mtim.tv_sec, found->st_mtim.tv_nsec, (uintmax_t)found->st_nlink,
	    (uintmax_t)found->st_ino, major(found->st_rdev), minor(found->st_rdev), (intmax_t)found->st_blocks);
	put_xattrs(path);
	if (S_ISREG(found->st_mode))
		put_file(path, found->st_size, mapped);
	if (S_ISLNK(found->st_mode))
		put_target(path);
	put("}\n");
	for (int i = 0; i < failed; i++) {
		errno = failures[i].number;
		put_error(failures[i].what, shown);
	}
	failed = 0;
}

struct name {
	struct name *next;
	ino_t inode;
	unsigned char kind;
	char text[];
};

/* The names in a directory, the last one first. */
static struct name *list(const char *path, const char *shown)
{
	struct name *names = NULL;
	struct dirent *entry;
	DIR *directory = opendir(path);
	if (!directory) {
		put_error("opendir", shown);
		return NULL;
	}
	while (errno = 0, (entry = readdir(directory))) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		struct name *made = malloc(sizeof *made + strlen(entry->d_name) + 1);
		made->next = names;
		made->inode = entry->d_ino;
		made->kind = entry->d_type;
		strcpy(made->text, entry->d_name);
		names = made;
	}
	if (errno)
		put_error("readdir", shown);
	closedir(directory);
	return names;
}

/* A name close to one that is there must not be found, unless it is there itself: the host knows. */
static void look_for_ghost(char *buffer, size_t end)
{
	struct stat found;
	char last = buffer[end - 1];
	buffer[end - 1] = (char)(last == '~' ? '!' : '~');
	if (!lstat(buffer + 2, &found)) {
		put("{\"ghost\":\"");
		put_hex(buffer + 1, end - 1);
		put("\"}\n");
	} else if (errno != ENOENT) {
		put_error("a name that is not there", buffer + 1);
	}
	buffer[end - 1] = last;
}

static dev_t home; /* of /.walker, when it is part of what is walked */
static ino_t home_inode;

/* buffer holds "./a/b"; what is shown starts at its second byte. */
static void walk(char *buffer, size_t size, ino_t listed, int kind, dev_t device, bool mapped)
{
	const char *path = size == 1 ? "." : buffer + 2, *shown = size == 1 ? "/" : buffer + 1;
	struct stat found;
	if (lstat(path, &found)) {
		put_error("lstat", shown);
		return;
	}
	if (found.st_dev == home && found.st_ino == home_inode)
		return;
	put_record(path, shown, &found, kind, listed ? listed : found.st_ino, mapped);
	remember(path, &found);
	if (!S_ISDIR(found.st_mode) || found.st_dev != device)
		return;
	for (struct name *names = list(path, shown), *next; names; names = next) {
		size_t length = strlen(names->text);
		if (size + 1 + length < PATHS) {
			buffer[size] = '/';
			memcpy(buffer + size + 1, names->text, length + 1);
			look_for_ghost(buffer, size + 1 + length);
			walk(buffer, size + 1 + length, names->inode, names->kind, device, mapped);
		}
		buffer[size] = 0;
		next = names->next;
		free(names);
	}
}

static void write_file(const char *path, const char *text)
{
	int file = open(path, O_WRONLY);
	if (file < 0 || write(file, text, strlen(text)) < 0)
		put_error("write", path);
	close(file);
}

/* Every path again in another order, with nothing remembered. */
static void look_up_again(void)
{
	struct stat found;
	write_file(HOME "/proc/sys/vm/drop_caches", "3");
	while (visit_count) {
		struct visit *visit = &visits[--visit_count];
		if (lstat(visit->path, &found))
			put_error("lstat again", visit->path);
		else if (found.st_ino != visit->inode || found.st_mode != visit->mode) {
			errno = 0;
			put_error("another inode", visit->path);
		}
		free(visit->path);
	}
}

/* Mounts */

struct partition { /* struct blkpg_partition and blkpg_ioctl_arg of linux/blkpg.h */
	int64_t start, length;
	int number;
	char names[128];
};
struct request {
	int what, flags, size;
	void *data;
};

static int change_partition(const char *device, int what, int64_t start, int64_t length)
{
	struct partition partition = {.start = start, .length = length, .number = 1};
	struct request request = {.what = what, .size = sizeof partition, .data = &partition};
	int disk = open(device, O_RDONLY);
	if (disk < 0)
		return -1;
	int done = ioctl(disk, _IO(0x12, 105), &request);
	int number = errno;
	close(disk);
	errno = number;
	return done;
}

static void put_mount(const char *where)
{
	static char line[PATHS];
	struct statfs found;
	char wanted[64];
	FILE *mounts = fopen(HOME "/proc/mounts", "r");
	snprintf(wanted, sizeof wanted, " %s ", where);
	while (mounts && fgets(line, sizeof line, mounts))
		if (strstr(line, wanted))
			break;
	if (mounts)
		fclose(mounts);
	if (statfs(".", &found))
		put_error("statfs", where);
	put("{\"mounted\":\"");
	put_hex(line, strlen(line));
	put("\",\"type\":%ju,\"block\":%ju,\"total\":%ju,\"free\":%ju,\"inodes\":%ju,\"free_inodes\":%ju,\"name\":%ju}\n",
	    (uintmax_t)found.f_type, (uintmax_t)found.f_bsize, (uintmax_t)found.f_blocks, (uintmax_t)found.f_bfree,
	    (uintmax_t)found.f_files, (uintmax_t)found.f_ffree, (uintmax_t)found.f_namelen);
}

static void walk_here(const char *where, bool mapped)
{
	static char buffer[PATHS + 1];
	struct stat found;
	put_mount(where);
	strcpy(buffer, ".");
	if (stat(".", &found))
		put_error("stat", where);
	else
		walk(buffer, 1, 0, DT_DIR, found.st_dev, mapped);
	look_up_again();
}

static void walk_root(void)
{
	struct stat found;
	if (!stat(HOME, &found)) {
		home = found.st_dev;
		home_inode = found.st_ino;
	}
	if (chdir("/"))
		put_error("chdir", "/");
	walk_here("/", false);
}

static void walk_device(const char *name, int64_t start, int64_t size, const char *type, const char *options)
{
	char device[80];
	snprintf(device, sizeof device, HOME "/dev/%s", name);
	if (size) {
		if (change_partition(device, 1, start, size))
			put_error("BLKPG_ADD_PARTITION", name);
		size_t end = strlen(device);
		snprintf(device + end, sizeof device - end, device[end - 1] >= '0' && device[end - 1] <= '9' ? "p1" : "1");
	}
	if (mount(device, HOME "/mnt", type, MS_RDONLY, strcmp(options, "-") ? options : "")) {
		put_error("mount", name);
	} else {
		if (chdir(HOME "/mnt"))
			put_error("chdir", name);
		walk_here(HOME "/mnt", strstr(options, "dax") != NULL);
		if (chdir(HOME) || umount(HOME "/mnt"))
			put_error("umount", name);
	}
	snprintf(device, sizeof device, HOME "/dev/%s", name);
	if (size && change_partition(device, 2, 0, 0))
		put_error("BLKPG_DEL_PARTITION", name);
}

static int open_port(void)
{
	char path[400], name[32];
	struct dirent *entry;
	int found = -1;
	DIR *ports = opendir(HOME "/sys/class/virtio-ports");
	while (ports && found < 0 && (entry = readdir(ports))) {
		snprintf(path, sizeof path, HOME "/sys/class/virtio-ports/%s/name", entry->d_name);
		FILE *file = fopen(path, "r");
		if (!file)
			continue;
		snprintf(path, sizeof path, HOME "/dev/%s", entry->d_name);
		if (fgets(name, sizeof name, file) && !strcmp(name, "walker\n"))
			found = open(path, O_WRONLY);
		fclose(file);
	}
	if (ports)
		closedir(ports);
	return found;
}

int main(void)
{
	char line[512], device[32], type[32], options[256];
	int64_t start, size;
	mount("proc", HOME "/proc", "proc", 0, NULL);
	mount("sysfs", HOME "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", HOME "/dev", "devtmpfs", 0, NULL);
	int found = open_port();
	if (found >= 0)
		port = found;
	FILE *jobs = fopen(HOME "/jobs", "r");
	int log = open(HOME "/dev/kmsg", O_WRONLY);
	for (int number = 0; jobs && fgets(line, sizeof line, jobs); number++) {
		int fields = sscanf(line, "%31s %" SCNd64 " %" SCNd64 " %31s %255s", device, &start, &size, type, options);
		put("{\"job\":%d}\n", number);
		dprintf(log, "walker: job %d\n", number); /* so that the host knows what the kernel complains of */
		if (fields != 5)
			put_error("a line in jobs", line);
		else if (!strcmp(type, "-"))
			walk_root();
		else
			walk_device(device, start, size, type, options);
	}
	put("{\"end\":true}\n");
	flush();
	reboot(RB_AUTOBOOT);
	return 1;
}
