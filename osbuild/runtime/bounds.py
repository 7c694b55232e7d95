"""What the programs of a guest may take of this host: limits of setrlimit(2), set before they start.

RLIMIT_CORE    none, as of every program that we start; and `dump-guest-core=off`, for where a core file goes into a
               pipe, as systemd's and apport's do, the kernel does not look at the limit
RLIMIT_NOFILE  FILES, whatever the shell's own is: queues of a card, files of a share
RLIMIT_FSIZE   the longest file: no byte is written behind that

One number holds for all files of a process, so QEMU's is that of the longest which may grow: the guest's memory where
another process shares it (a memfd is a file), the temporary file behind a disk that a guest may write to. The root
image is opened for reading only.

The limit only bounds: QEMU's threads block SIGXFSZ, so a guest would see a broken disk, or a console that takes no
more, and go on. Who ends it, and says why, is the watcher, at half of these: CONSOLE_LIMIT, and `disk_limit`. What
neither can do is count the files of a share; those lie in the run directory, and go with it.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from osbuild.arch import MIB
from osbuild.artifacts import DiskImage

if TYPE_CHECKING:
    from osbuild.runtime.base import Machine

FILES: Final = 4096
LONGEST: Final = 128 * MIB  # of logs, of files in a share, and of the console: twice what the watcher lets pass
SNAPSHOT: Final = 1024 * MIB  # that a guest may write to its disk: no smoke test needs a tenth of it


def longest_file(machine: Machine, *, shared: bool) -> int:
    """Bytes of the longest file that its QEMU may write; `shared`: another process has the guest's memory, too."""
    memory = machine.memory_mib * MIB if shared else 0
    return max(LONGEST, memory, 2 * disk_limit(machine))


def disk_limit(machine: Machine) -> int:
    """Bytes that a guest may write to its disk, which then lie in a temporary file; 0 where it may not write."""
    root = machine.root
    return SNAPSHOT if isinstance(root, DiskImage) and root.writable and not root.dax else 0


def limits(longest: int = LONGEST) -> Mapping[int, int]:
    """For `command.start`."""
    return {resource.RLIMIT_NOFILE: FILES, resource.RLIMIT_FSIZE: longest}
