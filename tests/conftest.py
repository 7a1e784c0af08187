"""Settings of all tests: no test asserts a time, and examples are the same in every run."""

from hypothesis import settings

settings.register_profile("stalewise", deadline=None, derandomize=True)
settings.load_profile("stalewise")
