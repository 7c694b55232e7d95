"""What real guests left behind that were wrong in one way each: consoles, and the rest of the evidence beside them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Final

from osbuild import autopsy
from osbuild.autopsy import Evidence
from osbuild.report import SmokeReport
from tests.lab import Lab

HOME: Final = Path(__file__).parent / "consoles"
_HEAD_LINES: Final = 12
_TAIL_LINES: Final = 90
_LINE: Final = 400


def keep(name: str, lab: Lab, report: SmokeReport) -> None:
    """Write what a guest left behind, without what only this machine knows; of a console both ends are enough."""
    (evidence,) = lab.evidence
    fields = dataclasses.asdict(evidence)
    console = _anonymous(fields.pop("console"), lab).splitlines()
    lines = [line[:_LINE] for line in console]
    if len(lines) > _HEAD_LINES + _TAIL_LINES:
        lines[_HEAD_LINES:-_TAIL_LINES] = [f"[… {len(lines) - _HEAD_LINES - _TAIL_LINES} lines left out …]"]
    (HOME / f"{name}.log").write_text("".join(f"{line}\n" for line in lines))
    fields["log"] = _anonymous(fields["log"], lab)
    document = {"evidence": fields, "seconds": round(report.seconds, 1)}
    (HOME / f"{name}.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _anonymous(text: str, lab: Lab) -> str:
    for own, other in ((str(lab.home), "/tmp/test"), (sys.executable, "python3")):
        text = text.replace(own, other)
    return re.sub(rf"\b{re.escape(os.uname().nodename)}\b", "host", text)


def read(name: str) -> Evidence:
    """What was left of a guest."""
    document = json.loads((HOME / f"{name}.json").read_text())
    return Evidence(console=autopsy.console_text(HOME / f"{name}.log"), **document["evidence"])


def seconds(name: str) -> float:
    """How long it took until its cause was told."""
    return float(json.loads((HOME / f"{name}.json").read_text())["seconds"])
