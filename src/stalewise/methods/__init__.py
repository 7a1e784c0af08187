"""Training methods as data, one file each."""

from stalewise.methods.bp import BP
from stalewise.methods.ddg import DDG
from stalewise.methods.dni import DNI
from stalewise.methods.dsp import DSP
from stalewise.methods.fdg import FDG
from stalewise.methods.features_replay import FeaturesReplay
from stalewise.methods.gpipe import GPipe
from stalewise.methods.method import Method
from stalewise.methods.one_f_one_b import OneFOneB
from stalewise.methods.pipedream import PipeDream
from stalewise.methods.pipemare import PipeMare
from stalewise.methods.registry import METHOD_NAMES, build_method, describe_method, method_options, rebuild_method

__all__ = [
    "BP",
    "DDG",
    "DNI",
    "DSP",
    "FDG",
    "METHOD_NAMES",
    "FeaturesReplay",
    "GPipe",
    "Method",
    "OneFOneB",
    "PipeDream",
    "PipeMare",
    "build_method",
    "describe_method",
    "method_options",
    "rebuild_method",
]
