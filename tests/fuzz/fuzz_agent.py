"""libFuzzer over the agent's frames and messages, in a jail (see README.md).

    python -m tests.fuzz.fuzz_agent WORK run [libFuzzer options, as -max_total_time=1800]      (as root)
    python -m tests.fuzz.fuzz_agent WORK coverage      which lines the corpus of WORK reaches, by file

WORK/corpus is made when it is not there; findings come to WORK/findings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import osbuild
from osbuild.resources import resource
from tests.fuzz.agent_seeds import write_seeds

_HERE: Final = Path(__file__).parent
_LEFT_OUT: Final = ("main.c", "server.c")  # what has the loop and the sockets: the target stands in their place
_WRAPPED: Final = ("cgroup_limit_devices", "mknodat", "shared_make")
_FUZZED: Final = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
_COUNTED: Final = ("-fsanitize=fuzzer", "-fprofile-instr-generate", "-fcoverage-mapping")
# What a child says that dies by itself: ASan's reports go where they are found afterwards.
_SANITIZERS: Final = "log_path=/work/findings/asan:handle_abort=1:allocator_may_return_null=1"
_JAIL: Final = (sys.executable, "-m", "tests.fuzz.agent_jail")


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[2] not in ("run", "coverage"):
        sys.exit(__doc__)
    work = Path(sys.argv[1]).resolve()
    corpus = work / "corpus"
    (work / "findings").mkdir(parents=True, exist_ok=True)
    if not corpus.exists():
        write_seeds(corpus)
    return run(work, sys.argv[3:]) if sys.argv[2] == "run" else coverage(work)


def run(work: Path, options: list[str]) -> int:
    build(work / "fuzz_agent", _FUZZED)
    argv = ["/work/fuzz_agent", "/work/corpus", "-artifact_prefix=/work/findings/", "-timeout=30", "-rss_limit_mb=2048"]
    environment = {**os.environ, "ASAN_OPTIONS": _SANITIZERS, "UBSAN_OPTIONS": "print_stacktrace=1"}
    if "AGENT_ALONE" in os.environ:  # libFuzzer's watcher and LeakSanitizer's would be processes too many
        argv += ["-rss_limit_mb=0", "-detect_leaks=0"]
        environment["ASAN_OPTIONS"] += ":detect_leaks=0"
    return subprocess.run([*_JAIL, str(work), *argv, *options], env=environment, check=False).returncode


def coverage(work: Path) -> int:
    build(work / "count_agent", _COUNTED)
    argv = ["/work/count_agent", "-runs=0", "/work/corpus"]
    environment = {**os.environ, "LLVM_PROFILE_FILE": "/work/profile.%p"}
    subprocess.run([*_JAIL, str(work), *argv], env=environment, check=True)
    profiles = [str(path) for path in work.glob("profile.*")]
    subprocess.run([_tool("llvm-profdata"), "merge", "-o", str(work / "merged"), *profiles], check=True)
    report = (_tool("llvm-cov"), "report", str(work / "count_agent"), f"-instr-profile={work / 'merged'}")
    return subprocess.run(report, check=False).returncode


def build(out: Path, flags: tuple[str, ...], compiler: str = "", more: tuple[Path, ...] = ()) -> None:
    """Unit by unit: after a finding only what was mended is compiled again. `more` units are linked, too."""
    compiler = compiler or _tool("clang")
    headers = max(path.stat().st_mtime for path in resource("agent").glob("*.h"))
    units = [path for path in sorted(resource("agent").glob("*.c")) if path.name not in _LEFT_OUT]
    objects = Path(f"{out}.objects")
    objects.mkdir(exist_ok=True)
    made = []
    for unit in (*units, _HERE / "fuzz_agent.c", *more):
        made.append(objects / f"{unit.stem}.o")
        if made[-1].exists() and made[-1].stat().st_mtime > max(unit.stat().st_mtime, headers):
            continue
        version = f'-DAGENT_VERSION="{osbuild.__version__}"'
        compiled = (compiler, "-std=c11", "-O1", "-g", *flags, version, f"-I{resource('agent')}", "-c", str(unit))
        subprocess.run([*compiled, "-o", str(made[-1])], check=True)
    if out.exists() and out.stat().st_mtime > max(path.stat().st_mtime for path in made):
        return
    wrapped = (f"-Wl,--wrap={name}" for name in _WRAPPED)
    subprocess.run([compiler, *flags, *wrapped, *map(str, made), "-o", str(out)], check=True)


def _tool(name: str) -> str:
    """Debian calls them clang-14 where there is no package `clang`."""
    for program in (name, *(f"{name}-{version}" for version in range(21, 12, -1))):
        found = shutil.which(program)
        if found is not None:
            return found
    sys.exit(f"there is no {name}: apt-get install clang llvm libclang-rt-dev")


if __name__ == "__main__":
    sys.exit(main())
