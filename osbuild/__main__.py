"""python -m osbuild, and the command osbuilder."""

from __future__ import annotations

import gc
from typing import NoReturn


def main() -> NoReturn:
    """The program, without looking for garbage among its modules: that takes a third of the time to import them."""
    gc.disable()
    from osbuild import cli

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
