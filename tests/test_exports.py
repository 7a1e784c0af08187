"""The public surface: what `import stalewise` gives, and nothing else by accident."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import stalewise
from stalewise import errors

PUBLIC = [
    "BP",
    "DSP",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Method",
    "NonFiniteLoss",
    "PeerLost",
    "Pipeline",
    "PlanError",
    "ProgramError",
    "ReceiveTimeout",
    "ResumePoint",
    "SaveError",
    "StalewiseError",
    "Straggler",
    "Stragglers",
    "TransportError",
    "WorkerError",
    "__version__",
    "launch",
]


def test_the_public_surface() -> None:
    assert stalewise.__all__ == PUBLIC
    assert all(hasattr(stalewise, name) for name in PUBLIC)


def test_whatever_else_can_be_seen_is_a_module_of_the_package() -> None:
    others = {name: value for name, value in vars(stalewise).items() if not name.startswith("_") and name not in PUBLIC}
    assert all(inspect.ismodule(value) and value.__name__ == f"stalewise.{name}" for name, value in others.items())


def test_everything_public_has_a_docstring() -> None:
    for name in PUBLIC:
        value = getattr(stalewise, name)
        assert name == "__version__" or inspect.getdoc(value), name
        if inspect.isclass(value):
            for member, function in vars(value).items():
                assert member.startswith("_") or not callable(function) or inspect.getdoc(function), (name, member)


def test_every_error_is_public_and_in_its_place() -> None:
    assert set(errors.__all__) <= set(PUBLIC)
    tree = {name: getattr(stalewise, name).__mro__[1].__name__ for name in errors.__all__}
    assert tree == {
        "CheckpointError": "ConfigError",
        "ConfigError": "StalewiseError",
        "DataError": "ConfigError",
        "NonFiniteLoss": "StalewiseError",
        "PeerLost": "TransportError",
        "PlanError": "ConfigError",
        "ProgramError": "StalewiseError",
        "ReceiveTimeout": "TransportError",
        "SaveError": "StalewiseError",
        "StalewiseError": "Exception",
        "TransportError": "StalewiseError",
        "WorkerError": "StalewiseError",
    }
    assert issubclass(stalewise.ConfigError, ValueError)


def test_the_version_is_that_of_the_distribution() -> None:
    assert stalewise.__version__ == importlib.metadata.version("stalewise")


def test_the_package_is_typed() -> None:
    assert (Path(stalewise.__file__).parent / "py.typed").is_file()


def test_the_protocol_and_the_methods_need_no_torch() -> None:
    """The style guide's arrow: `protocol` and `methods` know no torch (the package itself imports it for Pipeline)."""
    script = """
import sys
sys.modules["torch"] = None  # any import of torch fails
import types, pathlib, importlib
package = types.ModuleType("stalewise")
package.__path__ = [sys.argv[1]]
sys.modules["stalewise"] = package
for folder in ("protocol", "methods"):
    for file in sorted(pathlib.Path(sys.argv[1], folder).glob("*.py")):
        importlib.import_module(f"stalewise.{folder}.{file.stem}".removesuffix(".__init__"))
from stalewise.methods import DSP
from stalewise.protocol.validate import check
check(DSP.minimal(4).program())
"""
    package = str(Path(stalewise.__file__).parent)
    done = subprocess.run([sys.executable, "-c", script, package], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
