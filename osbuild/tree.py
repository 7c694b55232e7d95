"""A root filesystem as a value."""

from __future__ import annotations


class Tree:
    """(being written)"""
