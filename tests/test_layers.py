"""torch.distributed lives in one package."""

from __future__ import annotations

import ast
from pathlib import Path

import stalewise

SOURCE = Path(stalewise.__file__).parent


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_only_the_runtime_imports_torch_distributed() -> None:
    users = {
        path.relative_to(SOURCE).parts[0]
        for path in SOURCE.rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imported(path))
    }
    assert users == {"runtime"}
