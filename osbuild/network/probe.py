"""The host's half of looking at a network: echo requests and bytes over TCP that come back as they went."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Final

from osbuild.findings import Wrong
from osbuild.network.base import Address, Outside

SECONDS: Final = 5.0  # for an answer
_TALK_SECONDS: Final = 20.0
_CHUNK: Final = 16 << 10
_ICMP_HEADER: Final = 8
_ECHO: Final = {4: (8, 0), 6: (128, 129)}  # request and reply: RFC 792, RFC 4443
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_DO, _IPV6_DONTFRAG = 10, 23, 2, 62  # linux/in.h, linux/in6.h


class Loopback:
    """This host, as the other end of a network that the VMM plays."""

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        return socket.socket(family, kind, protocol)


def ping(outside: Outside, address: Address, *, count: int, size: int) -> float:
    """Send so many echo requests, unfragmented, with so many bytes of data; the fastest answer's seconds.

    Wrong when one is not answered. OSError EMSGSIZE when so much does not fit into a packet here.
    """
    v6 = address.version == 6
    family, protocol = (
        (socket.AF_INET6, socket.IPPROTO_ICMPV6) if v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    )  # fmt: skip
    with outside.socket(family, socket.SOCK_RAW, protocol) as raw:
        if v6:
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DO)
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_DONTFRAG, 1)
        else:
            raw.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DO)
        took = []
        for turn in range(count):
            request = echo_request(address.version, os.getpid() & 0xFFFF, turn, os.urandom(size))
            began = time.monotonic()
            raw.sendto(request, (str(address), 0))
            if not _answered(raw, address.version, request, began + SECONDS):
                raise Wrong(f"{address} does not answer echo request {turn + 1} of {count} within {SECONDS:g} s")
            took.append(time.monotonic() - began)
    return min(took)


def echo_request(version: int, identity: int, sequence: int, data: bytes) -> bytes:
    """An ICMP echo request; of ICMPv6 the kernel makes the checksum, for it knows the addresses that are in it."""
    kind, _ = _ECHO[version]
    packet = struct.pack(">BBHHH", kind, 0, 0, identity, sequence) + data
    if version == 6:
        return packet
    return packet[:2] + struct.pack(">H", checksum(packet)) + packet[4:]


def checksum(data: bytes) -> int:
    """RFC 1071."""
    words = struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2))
    total: int = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def is_reply(version: int, request: bytes, packet: bytes) -> bool:
    """Whether a packet answers the request: of IPv4 a raw socket gives the header, too."""
    header = (packet[0] & 15) * 4 if version == 4 and packet else 0
    message = packet[header:]
    return message[:1] == bytes([_ECHO[version][1]]) and message[4:] == request[4:]


def _answered(raw: socket.socket, version: int, request: bytes, deadline: float) -> bool:
    while (left := deadline - time.monotonic()) > 0:
        raw.settimeout(left)
        with contextlib.suppress(TimeoutError):
            if is_reply(version, request, raw.recv(65536)):
                return True
    return False


def talk(connection: socket.socket, size: int) -> float:
    """Send bytes and have them back, both at once; how many seconds it took. Wrong when they are not the same."""
    data = hashlib.shake_128(b"talk").digest(size)
    began = time.monotonic()
    deadline, sent, got = began + _TALK_SECONDS, 0, bytearray()
    connection.setblocking(False)
    while len(got) < size:
        left = deadline - time.monotonic()
        sending = [connection] if sent < size else []
        ready = select.select([connection], sending, [], max(left, 0))
        if not any(ready):
            raise Wrong(f"of {size} bytes over TCP, {len(got)} came back within {_TALK_SECONDS:g} s")
        try:
            if ready[1]:
                sent += connection.send(data[sent : sent + _CHUNK])
            if ready[0]:
                piece = connection.recv(_CHUNK)
                if not piece:
                    raise Wrong(f"of {size} bytes over TCP, {len(got)} came back before the other end hung up")
                got += piece
        except BlockingIOError:
            continue
        except OSError as problem:
            raise Wrong(f"after {len(got)} of {size} bytes over TCP: {problem.strerror}") from problem
    if got != data:
        raise Wrong(f"{size} bytes over TCP came back changed")
    return time.monotonic() - began


def connect(outside: Outside, address: Address, port: int) -> socket.socket:
    """A TCP connection; Wrong when there is none to be had."""
    connection = outside.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.settimeout(SECONDS)
        connection.connect((str(address), port))
    except OSError as problem:
        connection.close()
        raise Wrong(f"no TCP connection to {address} port {port}: {problem.strerror or problem}") from problem
    return connection


@contextlib.contextmanager
def echoing(outside: Outside, address: str = "::") -> Iterator[int]:
    """Give back what anybody sends to a port, for the length of the block; which one the kernel chose."""
    v6 = ":" in address
    with outside.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM) as listener:
        if v6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, 0))
        listener.listen(8)
        listener.settimeout(0.1)
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        give_back(connection, done)

        thread = threading.Thread(target=serve, name="echo", daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            done.set()
            thread.join()


def give_back(connection: socket.socket, done: threading.Event) -> None:
    """What comes, until nobody has anything more to say, or the other end has gone (ECONNRESET, EPIPE)."""
    connection.settimeout(0.1)
    while not done.is_set():
        try:
            piece = connection.recv(_CHUNK)
        except TimeoutError:
            continue
        except OSError:
            return
        if not piece:
            return
        connection.settimeout(SECONDS)
        try:
            connection.sendall(piece)
        except OSError:  # half of it may be there: the rest would be out of step
            return
