"""The fuzz target of the agent is built by hand, with clang; that it still fits the agent's sources is seen here."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.fuzz.agent_seeds import write_seeds
from tests.fuzz.fuzz_agent import build

# In place of libFuzzer.
_ALONE: Final = """
#include <stddef.h>
#include <stdint.h>
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most)
{
    (void)data;
    return size < most ? size : most;
}
int main(void)
{
    return 0;
}
"""


@pytest.mark.slow
def test_the_target_of_the_fuzzer_still_fits_the_agent(tmp_path: Path) -> None:
    (tmp_path / "alone.c").write_text(_ALONE)
    build(tmp_path / "target", ("-O0",), compiler="gcc", more=(tmp_path / "alone.c",))
    assert (tmp_path / "target").exists()


def test_there_are_seeds(tmp_path: Path) -> None:
    write_seeds(tmp_path / "corpus")
    assert len(list((tmp_path / "corpus").iterdir())) > 50
