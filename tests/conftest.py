"""Settings of all tests: no test asserts a time, examples are the same in every run, every test and fixture starts
with one thread, as workers do (kernels may add in another order with more), and torch keeps its warnings of closed
connections to itself, so that tests of what workers print see what stalewise prints.
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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
