"""A signal ends the program wherever its main thread is: nothing swallows it, and no lock stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

_PROGRAM = """
import os, signal, sys, threading, time
from osbuild import signals
from osbuild.errors import Interrupted
def end():
    os.kill(os.getpid(), signal.SIGTERM)
signals.heed()
try:
{}
    time.sleep(30)
except Interrupted as interruption:
    signals.heed_no_more()
    print(interruption, flush=True)
    sys.exit(interruption.code)
"""
_ODD = "class Odd:\n    def __del__(self):\n        end()"
_LOOP = "import asyncio\nloop = asyncio.new_event_loop()"
_FORK = "\nimport subprocess\nsubprocess.run(['true'], preexec_fn=lambda: None)"


def run(body: str) -> subprocess.CompletedProcess[str]:
    """What came of a program in whose body a signal arrives."""
    text = _PROGRAM.format(textwrap.indent(textwrap.dedent(body), "    "))
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize(
    "body",
    [
        "end()",
        "threading.Timer(0.05, end).start()",  # while it sleeps
        f"{_ODD}\nOdd()",
        "import weakref\nclass Odd: pass\nodd = Odd()\nreference = weakref.ref(odd, lambda _: end())\ndel odd",
        f"os.register_at_fork(after_in_parent=end){_FORK}",
        f"os.register_at_fork(before=end){_FORK}",
        f"{_ODD}\nclass Two:\n    def __del__(self):\n        Odd()\n        time.sleep(0.05)\nTwo()",
        f"{_LOOP}\nloop.call_soon(end)\nloop.run_forever()",
    ],
    ids=[
        "at-once",
        "in-a-wait",
        "in-a-finalizer",
        "in-a-weak-reference",
        "after-a-fork",
        "before-a-fork",
        "twice",
        "in-asyncio",
    ],
)
def test_a_signal_is_never_lost(body: str) -> None:
    done = run(body)
    assert (done.returncode, done.stdout, done.stderr) == (143, "interrupted by SIGTERM\n", "")


def test_no_lock_that_others_need_is_left_behind() -> None:
    """Signals, each at a moment of chance while modules are imported and loggers made."""
    done = run("""
        import _imp, logging, random
        told, tell = os.pipe()
        sender = os.fork()
        if sender == 0:
            os.close(tell)
            signals.heed_no_more()
            while os.read(told, 1):
                time.sleep(random.random() / 1000)
                os.kill(os.getppid(), signal.SIGTERM)
            os._exit(0)
        os.close(told)
        for _ in range(300):
            signals.heed()
            try:
                os.write(tell, b".")
                while True:
                    sys.modules.pop("colorsys", None)
                    import colorsys
                    logging.getLogger("a.b")
                    logging.Logger.manager.loggerDict.clear()
            except Interrupted:
                if _imp.lock_held() or logging._lock._is_owned():
                    raise SystemExit("held")
        os.close(tell)
        os.waitpid(sender, 0)
        signals.heed()
        end()
    """)
    assert (done.returncode, done.stdout, done.stderr) == (143, "interrupted by SIGTERM\n", "")


def test_a_second_signal_ends_it_at_once() -> None:
    done = run("""
        try:
            end()
        finally:
            end()
            time.sleep(30)
    """)
    assert done.returncode == -signal.SIGTERM


def test_what_else_goes_wrong_in_a_callback_is_said_as_ever() -> None:
    done = run("class Odd:\n    def __del__(self):\n        raise ValueError('odd')\nOdd()\nend()")
    assert done.returncode == 143
    assert "ValueError: odd" in done.stderr
