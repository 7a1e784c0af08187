"""`stalewise checkpoint`: look at checkpoints without a model."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from stalewise.checkpoint.export import export_model
from stalewise.checkpoint.folder import complete_checkpoints, find_checkpoint, verify
from stalewise.checkpoint.manifest import Manifest

__all__ = ["checkpoint"]

checkpoint = typer.Typer(help="Show, verify or export checkpoints.", no_args_is_help=True, rich_markup_mode="rich")

Directory = Annotated[Path, typer.Argument(help="One checkpoint, a folder of them, or the folder of a run.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]


@checkpoint.command()
def show(directory: Directory, json: Json = False) -> None:
    """What is in a checkpoint (the newest of a folder), and which others lie beside it."""
    path = find_checkpoint(directory)
    described = describe(path)
    others = [str(other) for other in complete_checkpoints(path.parent) if other.name != path.name]
    if json:
        print(json_module.dumps({**described, "beside": others}))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in described.items():
        table.add_row(name.replace("_", " "), value if isinstance(value, str) else json_module.dumps(value))
    table.add_row("beside", "\n".join(others) or "no other")
    Console(highlight=False, soft_wrap=True).print(table)


@checkpoint.command(name="verify")
def verify_command(directory: Directory, json: Json = False) -> None:
    """Read every byte and compare it with the checksums; exit code 2 where one is wrong."""
    path = find_checkpoint(directory)
    manifest = verify(path)
    size = sum(record.size for record in manifest.files.values())
    if json:
        print(json_module.dumps({"checkpoint": str(path), "files": len(manifest.files), "bytes": size, "intact": True}))
    else:
        print(f"{path}: all {size} bytes of {len(manifest.files)} files are as they were written")


@checkpoint.command()
def export(
    directory: Directory,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("model.safetensors"),
) -> None:
    """Write the plain model, parameters and buffers of all stages by their names, as safetensors."""
    path = find_checkpoint(directory)
    count = export_model(path, out)
    print(f"{count} tensors of {path} are in {out}")


def describe(path: Path) -> dict[str, Any]:
    """What the manifest says, in words and numbers."""
    manifest = Manifest.read(path)
    cut = manifest.cut
    return {
        "checkpoint": str(path),
        "created": manifest.created,
        "stalewise": manifest.stalewise,
        "method": manifest.method_text,
        "stages": manifest.num_stages,
        "cuts": manifest.cuts,
        **manifest.settings,
        **manifest.environment,
        "batches": manifest.num_batches,
        "local_steps_since_drain": cut["steps"],
        "batches_since_drain": cut["entered"],
        "batches_of_session": cut["session_batches"],
        "bytes": sum(record.size for record in manifest.files.values()),
        "files": {name: record.size for name, record in sorted(manifest.files.items())},
        "stopped_ms": [round(1e3 * seconds, 2) for seconds in manifest.stopped_s],
    }
