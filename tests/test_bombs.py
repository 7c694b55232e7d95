"""Images that are refused only after a million members are refused in bounded memory and time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.measured import run_measured

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        pytest.param("long names", "take more than 335544320 bytes", marks=pytest.mark.slow),
        pytest.param("attributes", "take more than 335544320 bytes", marks=pytest.mark.slow),
        ("through a link", "all paths together"),
        pytest.param("files", "take more than 335544320 bytes", marks=pytest.mark.slow),
        pytest.param("directories", "no entry of their own", marks=pytest.mark.slow),
        pytest.param("through many links", "too long to follow", marks=pytest.mark.slow),
        pytest.param("empty", "more than 1000000 ", marks=pytest.mark.slow),
        pytest.param("whiteouts", "take more than 335544320 bytes", marks=pytest.mark.slow),
    ],
)
def test_a_million_members_are_refused_below_400_mb(kind: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done, kibibytes = run_measured([sys.executable, "-m", "tests.bombs", kind], seconds=1000)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert rule in found["refusal"]
    assert "\n" not in found["refusal"]
    assert kibibytes << 10 < 400_000_000
    assert found["seconds"] < 60  # of processor time
