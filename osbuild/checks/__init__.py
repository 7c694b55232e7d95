"""CHECKS: what is looked at in a guest that was booted. A module and a row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from osbuild.artifacts import DiskImage, Initrd
from osbuild.errors import SpecError
from osbuild.modules import Modules
from osbuild.tree import quote

if TYPE_CHECKING:
    from osbuild.checks.base import CheckModule, Preparing
    from osbuild.runtime.base import Machine

WALK: Final = "agent"
NETWORK: Final = "network"
HOTPLUG: Final = "hotplug"
GUESTS: Final = "guests"
SHARES: Final = "shares"
CHECKS: Final[Mapping[str, CheckModule]] = Modules(
    {
        "agent.check": "osbuild.checks.agent_check",
        "agent.version": "osbuild.checks.agent_version",
        "agent.details": "osbuild.checks.agent_details",
        "root": "osbuild.checks.root",
        "nonce": "osbuild.checks.nonce",
        "dax": "osbuild.checks.dax",
        "verity": "osbuild.checks.verity",
        GUESTS: "osbuild.checks.guests",
        "resources": "osbuild.checks.resources",
        "container": "osbuild.checks.container",
        "entropy": "osbuild.checks.entropy",
        "clock": "osbuild.checks.clock",
        "metrics": "osbuild.checks.metrics",
        NETWORK: "osbuild.checks.network",
        HOTPLUG: "osbuild.checks.hotplug",
        SHARES: "osbuild.checks.shares",
        WALK: "osbuild.checks.walk",
        "poweroff": "osbuild.checks.poweroff",
    }
)
PREPARING: Final[Mapping[str, Preparing]] = Modules(
    {
        WALK: "osbuild.checks.walk",
        NETWORK: "osbuild.checks.network",
        HOTPLUG: "osbuild.checks.hotplug",
        SHARES: "osbuild.checks.shares",
    }
)
# What takes long, or needs what not every host has.
ON_REQUEST: Final = frozenset((WALK, "verity", GUESTS, "resources", "container", NETWORK, HOTPLUG, SHARES))
# What starts a container.
PROBING: Final = frozenset(
    ("dax", "verity", GUESTS, "resources", "container", "entropy", "clock", NETWORK, HOTPLUG, SHARES)
)
FIRST: Final = "agent.check"  # without it nothing else can be asked


def select(names: Iterable[str], machine: Machine, *, asked: Iterable[str] = ()) -> tuple[str, ...]:
    """The checks of these names, in order; of none, all that take no time and can be meant for this machine.

    `asked` are looked at in any case, and so is a network that was asked for, but by a walk, which plays with a card
    of its own; with a walk the end too, for its last call is the one that ends a guest.
    """
    wanted = set(names)
    if unknown := sorted(wanted - CHECKS.keys()):
        raise SpecError(f"no check {quote(unknown[0])}", hint=f"one of {', '.join(CHECKS)}")
    # A guest has one sandbox. The walk begins it, looks at how it began, and ends it; a container wants one before.
    if WALK in wanted and (others := sorted((wanted | set(asked)) & PROBING)):
        raise SpecError(
            f"--check {WALK} cannot share a guest with {', '.join(others)}: the walk begins the guest's only sandbox",
            hint=f"smoke twice: once with --check {WALK}, once with the others",
        )
    wanted = wanted | {FIRST} if wanted else usual(machine)
    wanted = wanted | set(asked)
    if WALK in wanted:
        wanted = wanted | {"poweroff"}
    elif machine.network:
        wanted = wanted | {NETWORK}
    return tuple(name for name in CHECKS if name in wanted)


def usual(machine: Machine) -> set[str]:
    """What is looked at when nobody says what."""
    return CHECKS.keys() - ON_REQUEST - (set() if mapped(machine) else {"dax"})


def mapped(machine: Machine) -> bool:
    """Whether its root is an NVDIMM mounted with DAX."""
    return _is_mapped(machine.root)


def _is_mapped(root: DiskImage | Initrd) -> bool:
    return isinstance(root, DiskImage) and root.dax and not root.verified


def _is_verified(root: DiskImage | Initrd) -> bool:
    return isinstance(root, DiskImage) and root.verified


# What can be looked at in some roots only, and in which.
_FOR: Final[Mapping[str, Callable[[DiskImage | Initrd], bool]]] = {
    "dax": _is_mapped, GUESTS: _is_mapped, "verity": _is_verified,
}  # fmt: skip


def share(names: Iterable[str], roots: Mapping[str, DiskImage | Initrd]) -> dict[str, tuple[str, ...]]:
    """Of the checks that were named, those for each root. What no root is for is asked of all, and told by all."""
    names = tuple(names)
    only = {name: {key for key, root in roots.items() if _FOR[name](root)} for name in names if name in _FOR}
    shares = {key: tuple(name for name in names if key in (only.get(name) or roots)) for key in roots}
    nothing = (FIRST,) if names else ()  # no name would be the usual checks
    return {key: found or nothing for key, found in shares.items()}


def prepare(machine: Machine, selected: Iterable[str]) -> Machine:
    """The machine with what the selected checks need."""
    for name in selected:
        if name in PREPARING:
            machine = PREPARING[name].prepare(machine)
    return machine
