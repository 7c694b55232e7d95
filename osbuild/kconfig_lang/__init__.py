"""The language of Linux's Kconfig files, read and evaluated here: what a configuration comes to, and why.

    expression   tristate logic: `A && (B=m || !C)`
    macros       $(cc-option,-m64): text in, text out, asking the compiler where the tree does
    parser       a tree's Kconfig files -> Model
    model        symbols, choices and the blocks around them, as plain data with file and line
    evaluate     Model + what was asked for -> every symbol's value
    reasons      why a symbol has its value
    remedy       the fewest lines that give a symbol another value

Written from Documentation/kbuild in the kernel's tree, and held against the tree's own `conf` in the tests.
"""

from __future__ import annotations

from typing import Final

FORMAT: Final = 2  # of `Model.to_json`
