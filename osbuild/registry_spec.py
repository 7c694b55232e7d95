"""What is asked of registries: apart from the rest, so that whoever reads an image need not load what writes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySpec:
    """How registries are to be reached."""

    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # registry host -> mirrors to try before it
    insecure: frozenset[str] = frozenset()  # HOST[:PORT]s that may be spoken to over plain HTTP, besides loopback
    auth_file: Path | None = None  # instead of $DOCKER_CONFIG/config.json or ~/.docker/config.json
    offline: bool = False  # the cache only
    seconds: float = 1800.0  # for a whole pull
