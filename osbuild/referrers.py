"""What a registry has that is about a manifest: the referrers API, the tag instead of it, and cosign's own tag.

referrers  GET /v2/NAME/referrers/DIGEST: an index of the manifests whose `subject` that is
tag        sha256-HEX: the same index, kept by those who push, at registries without that API
signatures sha256-HEX.sig: a manifest whose layers are signed payloads

Sources: OCI distribution-spec v1.1, "Listing Referrers" and "Referrers Tag Schema"; cosign, specs/SIGNATURE_SPEC.md.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Any, Final

from osbuild import oci
from osbuild.distribution import ACCEPT, Repository, check_whole, drain
from osbuild.errors import InputError
from osbuild.publication import IMAGE_INDEX
from osbuild.transport import TransientError
from osbuild.tree import quote

_PAGES_MAX: Final = 8
_NEXT: Final = re.compile(r'<([^<>]{1,4096})>\s*;\s*rel="?next"?', re.IGNORECASE)


def referrers_tag(digest: str) -> str:
    """Where an index of the referrers is kept when the registry keeps none."""
    return digest.replace(":", "-")


def signature_tag(digest: str) -> str:
    """Where cosign keeps the signatures of a manifest."""
    return f"{referrers_tag(digest)}.sig"


def listed(road: Repository, digest: str) -> list[oci.Json] | None:
    """What the registry knows to refer to a manifest; None when it keeps no account of that."""
    url, found = road.url(f"referrers/{digest}"), list[oci.Json]()
    for page in range(_PAGES_MAX):
        answer = road.insist(functools.partial(_page, road, url))
        if answer is None:
            return found if page else None
        data, link = answer
        found += _rows(oci.parse_json(data, f"{road}: the referrers of {digest}"), f"{road}: the referrers of {digest}")
        if not link:
            break
        url = road.locate(link, "lists more referrers")
    return found


def tagged(road: Repository, digest: str) -> tuple[oci.Json, list[oci.Json]] | None:
    """The index at the tag that stands for the referrers API, and its rows."""
    where = f"{road}:{referrers_tag(digest)}"
    if (data := fetch(road, f"manifests/{referrers_tag(digest)}", where)) is None:
        return None
    document = oci.parse_json(data, where)
    return document, _rows(document, where)


def signatures(road: Repository, digest: str) -> tuple[oci.Json, list[oci.Json]] | None:
    """The manifest with cosign's signatures, and its layers."""
    where = f"{road}:{signature_tag(digest)}"
    if (data := fetch(road, f"manifests/{signature_tag(digest)}", where)) is None:
        return None
    document = oci.parse_json(data, where)
    layers = document.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise InputError(f"{where}: no manifest of signatures")
    return document, layers


def fetch(road: Repository, path: str, what: str, most: int = oci.JSON_MAX, digest: str = "") -> bytes | None:
    """A small document of a repository; None when it is not there.

    What comes cut, or wrong where its digest is known, is asked for again.
    """

    def once() -> bytes | None:
        with road.send("GET", path, {"Accept": ACCEPT} if path.startswith("manifests/") else {}) as answer:
            if answer.status == 404:
                return None
            if answer.status != 200:
                raise road.refused(answer, what)
            data = answer.read(most)
            if path.startswith("manifests/"):
                check_whole(answer, data, what)
        if digest and f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise TransientError(f"the bytes that came for {digest} have another digest", wrong=True)
        return data

    return road.insist(once)


def _page(road: Repository, url: str) -> tuple[bytes, str] | None:
    """One page of the list, and where the next is. Registries without the API say so in many ways."""
    answer = road.send_to("GET", url, {"Accept": IMAGE_INDEX})
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
    if answer.status != 200 or kind != IMAGE_INDEX:
        drain(answer)
        return None
    with answer:
        link = _NEXT.search(answer.headers.get("Link", ""))
        data = answer.read(oci.JSON_MAX)
        check_whole(answer, data, str(road))
        return data, link[1] if link else ""


def _rows(document: oci.Json, where: str) -> list[Any]:
    rows = document.get("manifests")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where}: no index of referrers ({quote(str(document.get('mediaType'))[:100])})")
    return rows
