"""Settings of all tests: no test asserts a time, examples are the same in every run, and torch keeps its warnings of
closed connections to itself, so that tests of what workers print see what stalewise prints.
"""

import os

from hypothesis import settings

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

settings.register_profile("stalewise", deadline=None, derandomize=True)
settings.load_profile("stalewise")
