"""Keep the memory that one step frees for the next one, instead of giving it back to the system.

glibc maps every large tensor anew and unmaps it when it is freed; the system zeroes each of its pages again, in every
step. On ResNet-20 that is an eighth of the time of a step (docs/log.md). A training process needs the same memory in
the next step, so it keeps it: `keep_freed_memory` serves large blocks from the heap, and `allocator_environment`, for
a new process, backs the heap by huge pages where the system allows that on request.

STALEWISE_ALLOCATOR=system leaves everything as it is, as does a system without glibc, and another allocator that is
preloaded knows its own ways.
"""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["allocator_environment", "keep_freed_memory"]

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1
_GROWTH_BYTES = 64 << 20


def allocator_environment() -> dict[str, str]:
    """Variables for the environment of a training process."""
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if _ours_to_tune() else {}


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; says whether it does."""
    if not _ours_to_tune():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _GROWTH_BYTES))
    accepted = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)


def _ours_to_tune() -> bool:
    wanted = os.environ.get("STALEWISE_ALLOCATOR") != "system" and not os.environ.get("LD_PRELOAD")
    return wanted and platform.libc_ver()[0] == "glibc"
