"""A training process keeps the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from stalewise.runtime.allocator import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


def _kept_and_faults(monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[bool, int]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    printed = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    kept, faults = printed.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_page_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    kept, faults = _kept_and_faults(monkeypatch)
    assert kept
    # 20 tensors of 4096 pages each; an allocator that gives them back would meet each page again.
    assert faults < 100


def test_the_system_allocator_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = _kept_and_faults(monkeypatch, STALEWISE_ALLOCATOR="system")
    assert not kept


def test_a_preloaded_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = _kept_and_faults(monkeypatch, LD_PRELOAD="libm.so.6")
    assert not kept
