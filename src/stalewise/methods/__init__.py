"""Training methods as data, one file each."""

from stalewise.methods.bp import BP
from stalewise.methods.dsp import DSP
from stalewise.methods.method import Method
from stalewise.methods.registry import METHOD_NAMES, build_method

__all__ = ["BP", "DSP", "METHOD_NAMES", "Method", "build_method"]
