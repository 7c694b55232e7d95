"""Which signatures are found among many, which are enough, and what a registry cannot make of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osbuild import verification
from osbuild.errors import InputError
from tests.fake_registry import INDEX, Fault, Handler, always, answering, header, wrong_bytes
from tests.keys import key as key  # a fixture
from tests.keys import make_key
from tests.published import UploadRegistry, make, put
from tests.test_distribution import _surroundings as _surroundings  # a fixture
from tests.test_signatures import HOME, ROADS, json_at, look, sig_tag, written
from tests.test_signatures import _no_patience as _no_patience  # a fixture
from tests.test_signatures import build as build  # a fixture
from tests.test_signatures import plain as plain  # a fixture
from tests.test_signatures import server as server  # a fixture

pytest.importorskip("cryptography")


def test_what_was_signed_under_another_name_is_not_signed_under_this_one(
    server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    """Whoever can write to the registry could have put a build that was only to be tested beside the good ones."""
    test = put(server.address, build, sign=key, name="guests/staging:test")
    for path, document in list(server.documents.items()):
        server.documents[path.replace("guests/staging", HOME)] = document
    server.documents[f"{HOME}/manifests/1"] = server.documents[f"{HOME}/manifests/{test.digest}"]
    before = dict(server.documents)
    arm = make(tmp_path / "arm", "b", arch="aarch64", data=1)
    with pytest.raises(InputError, match=r"linux/amd64 .* is signed as '.*/guests/staging:test', not as '.*:1'"):
        put(server.address, arm, sign=key, add=True)
    assert server.documents[f"{HOME}/manifests/1"] == before[f"{HOME}/manifests/1"]
    assert not [path for path in server.documents.keys() - before.keys() if path.endswith(".sig")]
    assert all(each.other for each in look(server.address, key, tmp_path / "cache").signatures)
    put(server.address, build, sign=key)
    assert len(put(server.address, arm, sign=key, add=True).signed) == 3, "signed under this name first, it may stay"


def test_a_build_takes_the_place_of_every_variant_of_its_platform(plain: UploadRegistry, build: Path) -> None:
    old = put(plain.address, build, add=True)
    index = json_at(plain, "1")
    index["manifests"][0]["platform"]["variant"] = "v1"
    plain.add_manifest("1", json.dumps(index).encode(), INDEX, HOME)
    done = put(plain.address, make(build.with_name("new"), "b", data=1), add=True)
    assert done.platforms == ("linux/amd64",)
    (row,) = json_at(plain, "1")["manifests"]
    assert row["digest"] != index["manifests"][0]["digest"]
    assert done.digest != old.digest
    assert written(plain)[-1] == "1"


@pytest.mark.parametrize("link", ["//[", "https://[::zz]/", "//a]/", "ftp://x/"])
def test_a_next_page_at_no_address_is_a_reason_and_not_a_crash(
    link: str, build: Path, key: Path, tmp_path: Path
) -> None:
    with answering(UploadRegistry(referrers=True)) as server:
        digest = put(server.address, build, sign=key).digest
        server.faults["/referrers/"] = always(header("Link", f'<{link}>; rel="next"'))
        found = look(server.address, key, tmp_path / "cache")
        assert {each.road for each in found.signatures} == {"signature tag"}, "a place that is no use hides no other"
        assert any("lists more referrers is" in problem for problem in found.problems)
        del server.documents[f"{HOME}/manifests/{sig_tag(digest)}"]
        with pytest.raises(InputError, match=r"has no good signature .*lists more referrers is"):
            look(server.address, key, tmp_path / "cache")


def cut(count: int) -> Fault:
    """Fewer bytes than there are, of the right type, and nobody said how many will come."""

    def fault(handler: Handler, body: bytes, kind: str) -> None:
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.end_headers()
        handler.wfile.write(body[:count])

    return fault


@pytest.mark.parametrize(
    ("fault", "named"), [(cut(100), False), (cut(0), False), (wrong_bytes, True)],
    ids=["cut without a length", "nothing at all", "wrong bytes"],
)  # fmt: skip
def test_a_signature_that_comes_badly_is_asked_for_again(
    fault: Fault, named: bool, server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    """Wrong bytes are only seen where the digest is known."""
    digest = put(server.address, build, sign=key).digest
    rows = f"referrers/{digest}" if server.referrers else f"manifests/{digest.replace(':', '-')}"
    bundle = json.loads(server.documents[f"{HOME}/{rows}"][0])["manifests"][0]["digest"]
    for place in (f"/manifests/{bundle}", "/blobs/", *(() if named else (f"/{rows}", ".sig"))):
        server.faults[place] = [fault]
        found = look(server.address, key, tmp_path / "cache")
        assert not server.faults[place], f"{place} was asked for"
        assert {each.road for each in found.signatures} == ROADS[server.referrers], place
        assert found.problems == (), place


def test_a_signature_that_always_comes_badly_is_named_with_the_number_of_tries(
    plain: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    put(plain.address, build, sign=key)
    plain.faults["/blobs/"] = always(wrong_bytes)
    with pytest.raises(InputError, match=r"have another digest \(3 tries in"):
        look(plain.address, key, tmp_path / "cache")


@pytest.mark.parametrize("tag", [":1", "", ":9"], ids=["the oldest", "without a tag", "the newest"])
def test_of_more_names_than_are_looked_at_the_one_asked_for_is_found(
    tag: str, server: UploadRegistry, build: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that stays the same is published under one tag after the other."""
    monkeypatch.setattr(verification, "SIGNATURES_MAX", 3)
    for each in ("1", "latest", "3", "4", "5", "9"):
        put(server.address, build, sign=key, name=f"{HOME}:{each}")
    found = look(server.address, key, tmp_path / "cache", tag)
    name = f"{server.address}/{HOME}{tag or ':latest'}"
    here = {each.road for each in found.signatures if each.name == name and not each.other}
    assert here == (ROADS[server.referrers] if tag == ":9" else {"signature tag"})
    assert sum("6 signatures, of which the 3 newest were looked at" in each for each in found.problems) == 2
    arm = make(tmp_path / "arm", "b", arch="aarch64", data=1)
    put(server.address, arm, sign=key, name=f"{HOME}{tag or ':latest'}", add=True)


def test_what_another_key_signed_lately_does_not_hide_what_this_one_signed_under_the_name(
    plain: UploadRegistry, build: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "SIGNATURES_MAX", 2)
    other = make_key(tmp_path / "other.pem")
    put(plain.address, build, sign=key)
    for each in "234":
        put(plain.address, build, sign=other, name=f"{HOME}:{each}")
    (found,) = look(plain.address, key, tmp_path / "cache").signatures
    assert (found.road, found.other) == ("signature tag", False)
