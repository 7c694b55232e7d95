"""An image whose files are written while it is not known yet what else will be in it.

Where files lie follows from their sizes; the metadata follow from every byte of them. So the disk, which is the slowest
of all, need not wait for the hashes: a thread writes the files where they will lie, and a plan that wants them
elsewhere in the end has an empty file to begin with.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from osbuild.content import Content
from osbuild.filesystem.base import NOTHING
from osbuild.filesystem.pieces import write_pieces
from osbuild.output import flushing, writing


class Begun:
    """An open file, and the thread that writes into it."""

    def __init__(self, descriptor: int, written: threading.Event, offset: int, contents: Mapping[int, Content]) -> None:
        self.descriptor = descriptor
        self.written = written  # to be set when all but little is written: see `flushing`
        self._offset = offset
        self._contents = contents
        self._over = False
        self._problems: list[BaseException] = []
        self._thread = threading.Thread(target=self._copy, name="copying")
        if contents:
            self._thread.start()

    def there(self, contents: Iterable[tuple[int, Content]]) -> Mapping[int, Content]:
        """Those of these contents that the file has: all of them when it was begun with the same, else none."""
        if not self._contents:
            return NOTHING
        self._thread.join()
        if self._problems:
            raise self._problems[0]
        if dict(contents) == self._contents:
            return self._contents
        os.ftruncate(self.descriptor, 0)
        return NOTHING

    def stop(self) -> None:
        """Nobody wants the rest."""
        self._over = True
        if self._contents:
            self._thread.join()

    def _copy(self) -> None:
        try:
            write_pieces(self.descriptor, self._offset, self._wanted())
        except BaseException as problem:
            self._problems.append(problem)

    def _wanted(self) -> Iterator[tuple[int, Content]]:
        for piece in self._contents.items():
            if self._over:
                return
            yield piece


@contextlib.contextmanager
def beginning(
    path: Path, *, needs: int = 0, offset: int = 0, contents: Iterable[tuple[int, Content]] = ()
) -> Iterator[Begun]:
    """A new file that takes the place of `path` when the block ends well, as with `writing`; flushed from now on.

    contents: what is likely to lie in it, each at its place behind `offset`, in order.
    """
    with writing(path, needs=needs) as descriptor, flushing(descriptor) as written:
        begun = Begun(descriptor, written, offset, dict(contents))
        try:
            yield begun
        finally:
            begun.stop()
