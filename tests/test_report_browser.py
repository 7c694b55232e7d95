"""report.html in a browser: nothing sticks out of a narrow window, and all text can be read, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.test_report_page import boot, report, written

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3 (AA)
# A page beside it, which may look into it: its own policy lets no script of its own run.
OUTSIDE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" style="border:0;width:%dpx;height:900px"></iframe><pre id="found">nothing</pre>
<script>
const page = document.getElementById("page");
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const light = colour => {
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = numbers(colour).slice(0, 3).map(v => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = page.contentWindow.getComputedStyle(at).backgroundColor;
    if (numbers(colour).length === 3) return colour;
  }
  return "rgb(255, 255, 255)";
};
page.onload = () => {
  const top = page.contentDocument.documentElement, texts = [];
  for (const element of page.contentDocument.body.querySelectorAll("*")) {
    const own = [...element.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
    if (!own.length) continue;
    const [a, b] = [light(page.contentWindow.getComputedStyle(element).color), light(ground(element))];
    texts.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), own[0].data.trim().slice(0, 40)]);
  }
  document.getElementById("found").textContent = JSON.stringify({
    wide: top.scrollWidth - top.clientWidth, texts: texts, ground: ground(page.contentDocument.body),
  });
};
page.src = "report.html";
</script>
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that a report can have, and with what is hard to break into lines."""
    made = tmp_path_factory.mktemp("page")
    verdicts = ("passed", "failed", "unknown", "skipped")
    cause = {"name": "silent", "sentence": "y" * 90, "line": "z" * 300, "hint": "a hint " * 30, "certain": False}
    checks = [{"name": f"check.{v}", "verdict": v, "detail": "d" * 200, "seconds": 0.5} for v in verdicts]
    calls = [
        {
            "call": "grpc.AgentService/" + "LongName" * 8, "about": "it", "verdict": v, "detail": "e" * 150,
            "seconds": 0.1, "calls": 1, "call_seconds": 0.01,
        } for v in verdicts
    ]  # fmt: skip
    bad = boot(name="initrd", verdict="failed", reason="x" * 150, cause=cause, checks=checks, calls=calls)
    (made / "image").mkdir()
    (made / "image/console.log").write_text("[    0.000000] " + "c" * 500 + "\n")
    bad["command"] = ["qemu-system-x86_64", "-append", "w" * 400]
    written(made, report(boot(), bad))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 768, 1400])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_nothing_sticks_out_and_all_text_can_be_read(width: int, scheme: str, home: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    found = looked_at(home, width, scheme)
    assert found["wide"] <= 0
    assert (sum(map(int, re.findall(r"\d+", found["ground"]))) < 3 * 128) is (scheme == "dark"), "it follows the scheme"
    assert len(found["texts"]) > 60
    assert [text for contrast, text in found["texts"] if contrast < LEAST_CONTRAST] == []


def looked_at(home: Path, width: int, scheme: str) -> dict[str, Any]:
    """What a page beside it finds."""
    (home / f"outside{width}.html").write_text(OUTSIDE % width)
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            f"--user-data-dir={home / 'profile'}", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            f"--window-size={width + 40},1000", "--virtual-time-budget=5000", "--dump-dom",
            f"file://{home}/outside{width}.html",
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert said is not None, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(said[1]))
    return found


@pytest.mark.slow
def test_the_test_would_see_what_sticks_out_and_what_is_too_pale(home: Path, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    page = (home / "report.html").read_text()
    spoilt = page.replace("</style>", ".dim { color: #ccc !important } section { min-width: 500px }</style>", 1)
    (tmp_path / "report.html").write_text(spoilt)
    found = looked_at(tmp_path, 320, "light")
    assert found["wide"] > 100
    assert any(contrast < LEAST_CONTRAST for contrast, _ in found["texts"])
