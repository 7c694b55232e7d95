"""How looking at a guest can end otherwise than well; raised by what looks, made into a verdict by who asked."""

from __future__ import annotations


class Wrong(Exception):  # noqa: N818 - a finding, not an error
    """A check saw something other than it should."""


class Unsaid(Wrong):
    """A check missed something on the console; it may have been said where nobody saw it."""


class Unclear(Exception):  # noqa: N818 - nor is this
    """A check could not see."""


class NotHere(Exception):  # noqa: N818 - nor this
    """What a check needs is not there: it is left out, and says so."""
