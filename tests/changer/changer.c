/* Changes the ext4 on /dev/vda as a guest would, for a long while: PID 1 of a guest of its own (tests/test_ext4_written.py).
 *
 * /many/name-N      of COUNT entries every third is removed, every third gets another name
 * /many/new-N       as many are made
 * /deep/entry-N     of ENTRIES, in an index of two levels, each is looked up, every seventh removed
 * /deep/more-N      links are added
 * /made/D/N         files in directories of which every other one is removed again
 * /marked, /plain   attributes are set, changed and removed
 * /holes            a hole is filled, another one is cut off
 * /large            is removed, and /larger written
 *
 * The end is the word after "changer=" on the kernel's command line: "unmount", or "cut" for a restart without it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define COUNT 6000
#define ENTRIES 100000
#define MORE 20000
#define CHECK(call) do { if ((call) < 0) fail(#call, __LINE__); } while (0)

static void end(void)
{
	reboot(RB_AUTOBOOT);
	_exit(1);
}

static void fail(const char *what, int line)
{
	printf("changer: line %d: %s: %s\n", line, what, strerror(errno));
	fflush(stdout);
	end();
}

static void fill(const char *path, size_t size, char letter)
{
	static char data[1 << 16];
	memset(data, letter, sizeof data);
	int file = open(path, O_CREAT | O_WRONLY, 0644);
	CHECK(file);
	while (size) {
		ssize_t done = write(file, data, size < sizeof data ? size : sizeof data);
		CHECK(done);
		size -= (size_t)done;
	}
	CHECK(close(file));
}

static void change_names(void)
{
	char path[200], other[200];
	for (int n = 0; n < COUNT; n++) {
		snprintf(path, sizeof path, "/mnt/many/name-%d", n);
		snprintf(other, sizeof other, "/mnt/many/%0*d-renamed", 20 + n % 100, n);
		if (n % 3 == 0)
			CHECK(unlink(path));
		if (n % 3 == 1)
			CHECK(rename(path, other));
		snprintf(path, sizeof path, "/mnt/many/new-%d", n);
		fill(path, (size_t)n % 5000, 'n');
	}
}

static void change_many_names(void)
{
	char path[200];
	struct stat found;
	for (int n = 0; n < ENTRIES; n++) {
		snprintf(path, sizeof path, "/mnt/deep/entry-%d", n);
		CHECK(stat(path, &found));
		if (n % 7 == 0)
			CHECK(unlink(path));
	}
	for (int n = 0; n < MORE; n++) {
		snprintf(path, sizeof path, "/mnt/deep/more-%d", n);
		CHECK(link("/mnt/marked", path));
	}
}

static void make_directories(void)
{
	char path[200];
	CHECK(mkdir("/mnt/made", 0755));
	for (int d = 0; d < 100; d++) {
		snprintf(path, sizeof path, "/mnt/made/%d", d);
		CHECK(mkdir(path, 0755));
		for (int n = 0; n < 20; n++) {
			snprintf(path, sizeof path, "/mnt/made/%d/%d", d, n);
			fill(path, 3000, 'd');
		}
	}
	for (int d = 0; d < 100; d += 2) {
		for (int n = 0; n < 20; n++) {
			snprintf(path, sizeof path, "/mnt/made/%d/%d", d, n);
			CHECK(unlink(path));
		}
		snprintf(path, sizeof path, "/mnt/made/%d", d);
		CHECK(rmdir(path));
	}
}

static void change_attributes(void)
{
	static char large[3000];
	memset(large, 'v', sizeof large);
	CHECK(setxattr("/mnt/marked", "user.inside", "changed", 7, XATTR_REPLACE));
	CHECK(removexattr("/mnt/marked", "user.outside"));
	CHECK(setxattr("/mnt/marked", "user.new", "n", 1, XATTR_CREATE));
	CHECK(setxattr("/mnt/plain", "user.large", large, sizeof large, XATTR_CREATE));
}

static void change_files(void)
{
	int file = open("/mnt/holes", O_RDWR);
	CHECK(file);
	CHECK(pwrite(file, "filled", 6, 1 << 20));
	CHECK(ftruncate(file, 5 << 20));
	CHECK(close(file));
	CHECK(unlink("/mnt/large"));
	fill("/mnt/larger", 12 << 20, 'l');
	CHECK(link("/mnt/plain", "/mnt/linked"));
	CHECK(symlink("plain", "/mnt/pointer"));
}

int main(void)
{
	char words[4096] = "";
	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mkdir("/mnt", 0755);
	CHECK(mount("proc", "/proc", "proc", 0, NULL));
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL); /* or the kernel has done it */
	int file = open("/proc/cmdline", O_RDONLY);
	CHECK(read(file, words, sizeof words - 1));
	CHECK(mount("/dev/vda", "/mnt", "ext4", 0, "data=ordered,errors=panic"));
	change_names();
	change_many_names();
	make_directories();
	change_attributes();
	change_files();
	if (strstr(words, "changer=unmount")) {
		CHECK(umount("/mnt"));
	} else {
		sync();
		fill("/mnt/unfinished", 1 << 20, 'u');
	}
	printf("changer: done\n");
	fflush(stdout);
	end();
}
