"""crc32c of the package of that name, without the package: to find out its own version takes it longer than its work.

Its __init__ asks importlib.metadata, which imports a mail parser, for a number that nobody here wants.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Callable
from typing import Any, Final

_PACKAGE: Final = "crc32c"
_EXTENSION: Final = "crc32c._crc32c"


def _find() -> Callable[[bytes | memoryview, int], int]:
    package = importlib.util.find_spec(_PACKAGE)
    places = package.submodule_search_locations if package else None
    found = importlib.machinery.PathFinder.find_spec(_EXTENSION, places) if places else None
    if found is None or found.loader is None:  # an edition of it that is built in another way
        from crc32c import crc32c as theirs

        return theirs
    module: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.crc32c  # type: ignore[no-any-return]


crc32c: Final = _find()
