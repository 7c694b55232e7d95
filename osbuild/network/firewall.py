"""The only writer of nftables: what a guest sends, and nothing else, is forwarded, and who may drop a guest's frames.

Every function here works in the network namespace of the thread that calls it, as those of `links` do.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from osbuild.errors import HostError
from osbuild.network import links

_NFT_TABLE_F_OWNER, _NF_ACCEPT = 2, 1  # linux/netfilter/nf_tables.h, linux/netfilter.h
_NF_DROP, _FORWARD_HOOK = 0, 2  # linux/netfilter.h; the hook is the second of a bridge, too
_INET, _BRIDGE = 1, 7  # NFPROTO_*: of both IPs, of frames
_EQ, _NEQ = 0, 1  # linux/netfilter/nf_tables.h, as are the keys
_REGISTER: Final = 1
_NFT_META_NAMES: Final = {"iif": 6, "oif": 7}
_NFT_CT_STATE: Final = 0
_ESTABLISHED, _RELATED = 2, 4  # linux/netfilter/nf_conntrack_common.h: bits of a state
_IFNAMSIZ: Final = 16  # linux/if.h
_BEHIND, _BETWEEN = "behind", "between"
_FAMILIES: Final = {_INET: "inet", socket.AF_INET: "ip", socket.AF_INET6: "ip6", _BRIDGE: "bridge"}
_SWITCHES: Final = {socket.AF_INET: "bridge-nf-call-iptables", socket.AF_INET6: "bridge-nf-call-ip6tables"}


class Table:
    """Rules of ours for IPv4. They end with the last open file of their socket."""

    def __init__(self, tables: Any, name: str) -> None:  # Any: pyroute2's class, imported late
        self._tables, self._name = tables, name
        tables.table("add", kwarg={"name": name, "flags": _NFT_TABLE_F_OWNER})
        tables.chain("add", table=name, name=_BEHIND, hook="postrouting", type="nat", policy=_NF_ACCEPT)
        tables.chain("add", table=name, name=_BETWEEN, hook="forward", type="filter", policy=_NF_ACCEPT)

    @property
    def descriptor(self) -> int:
        return int(self._tables.fileno())

    def masquerade(self, address: str) -> None:
        """What one address sends farther goes out under that of the link it leaves by."""
        self._add(_BEHIND, _is_from(address, _EQ), _masquerade())

    def guard(self, link: str, address: str) -> None:
        """Behind a link is one address, and it gets answers only."""
        self._add(_BETWEEN, _is_link("iif", link), _is_from(address, _NEQ), _drop())
        self._add(_BETWEEN, _is_link("oif", link), _is_no_answer(), _drop())

    def shut_out(self, link: str, prefix: str) -> None:
        """What comes in by a link goes to links of such names only."""
        self._add(_BETWEEN, _is_link("iif", link), _begins_link("oif", prefix, _NEQ), _drop())

    def _add(self, chain: str, *expressions: list[Any]) -> None:
        self._tables.rule("add", table=self._name, chain=chain, expressions=expressions)


@contextlib.contextmanager
def table(name: str) -> Iterator[Table]:
    """A table that belongs to its socket, and ends with it, whoever ends us (Linux 5.12)."""
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.nftables.main import NFTables

    try:
        tables = NFTables(nfgen_family=socket.AF_INET)
    except OSError as problem:
        raise HostError(f"nftables cannot be had: {problem.strerror}", hint="modprobe nf_tables") from problem
    with contextlib.closing(tables):
        try:
            yield Table(tables, name)
        except NetlinkError as problem:
            raise HostError(
                f"no address can be masqueraded: {os.strerror(problem.code)}",
                hint="this kernel lacks nf_tables with nft_masq or nft_ct, or is older than 5.12",
            ) from problem


def _is_link(way: str, name: str) -> list[Any]:
    """Whether a packet's link, `iif` or `oif`, has this name."""
    return _compare_link(way, name.encode().ljust(_IFNAMSIZ, b"\0"), _EQ)


def _begins_link(way: str, prefix: str, operation: int) -> list[Any]:
    return _compare_link(way, prefix.encode(), operation)


def _compare_link(way: str, data: bytes, operation: int) -> list[Any]:
    from pyroute2.nftables.expressions import genex

    return [
        genex("meta", {"dreg": _REGISTER, "key": _NFT_META_NAMES[way]}),
        genex("cmp", {"sreg": _REGISTER, "op": operation, "data": _value(data)}),
    ]


def _is_from(address: str, operation: int) -> list[Any]:
    from pyroute2.nftables.expressions import ipv4addr

    return list(ipv4addr(src=address, op=operation))


def _is_no_answer() -> list[Any]:
    """Whether a packet belongs to nothing that went the other way before it."""
    from pyroute2.nftables.expressions import genex

    mask, nothing = (number.to_bytes(4, sys.byteorder) for number in (_ESTABLISHED | _RELATED, 0))
    return [
        genex("ct", {"dreg": _REGISTER, "key": _NFT_CT_STATE}),
        genex(
            "bitwise",
            {"sreg": _REGISTER, "dreg": _REGISTER, "len": 4, "mask": _value(mask), "xor": _value(nothing)},
        ),
        genex("cmp", {"sreg": _REGISTER, "op": _EQ, "data": _value(nothing)}),
    ]


def _masquerade() -> list[Any]:
    from pyroute2.nftables.expressions import masq

    return list(masq())


def _drop() -> list[Any]:
    from pyroute2.nftables.expressions import verdict

    return list(verdict(_NF_DROP))


def _value(data: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", data)]}


# --- Who drops what crosses a bridge ---------------------------------------------------------------------------------


def bridge_obstacles(bridge: str) -> tuple[str, ...]:
    """What of this host may have dropped frames between two ports of a bridge, in sentences."""
    called: frozenset[str] = frozenset()
    with contextlib.suppress(HostError):  # the bridge has gone
        called = links.bridge_calls(bridge)
    through = [name for family, name in _SWITCHES.items() if name in called or _switch(name)]
    families = {_BRIDGE} | {family for family, name in _SWITCHES.items() if name in through}
    if through:
        families.add(_INET)
    droppers = [name for family in sorted(families) for name in _droppers(family)]
    return explain_drops(bridge, through, droppers, older=_older())


def explain_drops(bridge: str, through: list[str], droppers: list[str], *, older: bool) -> tuple[str, ...]:
    """The sentences. through: br_netfilter's switches that are on; droppers: chains; older: there are legacy's."""
    said = []
    if through and (droppers or older):
        said.append(f"what crosses {bridge} passes the host's firewall ({', '.join(f'{name}=1' for name in through)})")
    if droppers:
        said.append(f"{' and '.join(droppers)} drops what no rule lets through")
    elif through and older:
        said.append("and the host has tables of iptables-legacy: iptables-legacy -S FORWARD shows them")
    return tuple(said)


def _droppers(family: int) -> Iterator[str]:
    for chain in _chains(family):
        hook = chain.get_attr("NFTA_CHAIN_HOOK")
        if hook is None or hook.get_attr("NFTA_HOOK_HOOKNUM") != _FORWARD_HOOK:
            continue
        if chain.get_attr("NFTA_CHAIN_POLICY") == _NF_DROP:
            table = chain.get_attr("NFTA_CHAIN_TABLE")
            yield f"the chain {chain.get_attr('NFTA_CHAIN_NAME')} of the table {_FAMILIES[family]} {table}"


def _chains(family: int) -> list[Any]:  # Any: as pyroute2 has them
    """None where they cannot be read: then nobody is blamed."""
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.nftables.main import NFTables

    try:
        with contextlib.closing(NFTables(nfgen_family=family)) as tables:
            return [chain for chain in tables.get_chains() if chain["nfgen_family"] == family]
    except (OSError, NetlinkError):
        return []


def _switch(name: str) -> bool:
    with contextlib.suppress(OSError):  # br_netfilter is not there
        return Path(f"/proc/sys/net/bridge/{name}").read_text().strip() == "1"
    return False


def _older() -> bool:
    """Whether iptables-legacy has tables here, of which netlink shows nothing."""
    for name in ("ip_tables_names", "ip6_tables_names"):
        with contextlib.suppress(OSError):
            if Path(f"/proc/thread-self/net/{name}").read_text().strip():
                return True
    return False
