#define _GNU_SOURCE
#include "terminal.h"

#include "inside.h"
#include "mountfd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <termios.h>
#include <unistd.h>

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif
#ifndef DEVPTS_SUPER_MAGIC
#define DEVPTS_SUPER_MAGIC 0x1cd1
#endif

/* It is looked at before it is opened: a container's /dev/pts may hold anything. */
static bool is_ptmx(int fd)
{
    struct stat state;
    struct statfs filesystem;
    return fstat(fd, &state) == 0 && S_ISCHR(state.st_mode) && state.st_rdev == makedev(5, 2) &&
           fstatfs(fd, &filesystem) == 0 && filesystem.f_type == DEVPTS_SUPER_MAGIC;
}

static int open_master(int root)
{
    int found = inside_open_straight(root, "/dev/pts/ptmx", O_PATH);
    bool right = found >= 0 && is_ptmx(found);
    if (found >= 0)
        close(found);
    if (!right) {
        errno = ENXIO;
        return -1;
    }
    int master = inside_open_straight(root, "/dev/pts/ptmx", O_RDWR | O_NOCTTY);
    if (master >= 0 && !is_ptmx(master)) {
        close(master);
        errno = ENXIO;
        return -1;
    }
    return master;
}

bool terminal_resize(int master, uint32_t rows, uint32_t columns)
{
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
    return ioctl(master, TIOCSWINSZ, &size) == 0;
}

bool terminal_open(int root, const struct oci_box *size, struct terminal *terminal, struct failure *failure)
{
    int unlocked = 0;
    terminal->master = open_master(root);
    if (terminal->master < 0)
        return failure_errno(failure, "the container has no devpts on /dev/pts for a terminal");
    if (ioctl(terminal->master, TIOCSPTLCK, &unlocked) == 0)
        /* The other end by this one, not by a name that may be another's. */
        terminal->slave = ioctl(terminal->master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    else
        terminal->slave = -1;
    if (terminal->slave < 0) {
        failure_errno(failure, "cannot open a terminal");
        close(terminal->master);
        return false;
    }
    if (size != NULL && (size->height != 0 || size->width != 0))
        terminal_resize(terminal->master, size->height, size->width);
    return true;
}

bool terminal_be_console(int root, int slave, struct failure *failure)
{
    int target = inside_make_file(root, "/dev/console");
    int mount = target < 0 ? -1 : mountfd_copy(slave, false);
    bool done = mount >= 0 && mountfd_put(mount, target);
    if (!done)
        failure_errno(failure, "cannot make the terminal /dev/console");
    if (mount >= 0)
        close(mount);
    if (target >= 0)
        close(target);
    return done;
}

bool terminal_control(int slave)
{
    return ioctl(slave, TIOCSCTTY, 0) == 0;
}
