"""Settings of all tests: no test asserts a time, examples are the same in every run, every test and fixture starts
with one thread, as workers do (kernels may add in another order with more), torch keeps its warnings of closed
connections to itself, so that tests of what workers print see what stalewise prints, and that looks alike everywhere.
"""

import os
from collections.abc import Iterator

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pytest
import torch
from hypothesis import settings

settings.register_profile("stalewise", deadline=None, derandomize=True)
settings.load_profile("stalewise")
torch.set_num_threads(1)

_HOW_TO_PRINT = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "TERMINAL_WIDTH")
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
for _name in (*_HOW_TO_PRINT, *_OF_A_LAUNCHER):
    os.environ.pop(_name, None)
os.environ["COLUMNS"] = "120"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
