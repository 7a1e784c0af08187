"""Training methods as data, one file each."""

from stalewise.methods.bp import BP
from stalewise.methods.dsp import DSP
from stalewise.methods.method import Method

__all__ = ["BP", "DSP", "Method"]
