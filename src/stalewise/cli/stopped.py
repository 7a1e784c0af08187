"""What Ctrl-C leaves: a sentence that says how to go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stalewise.checkpoint.folder import complete_checkpoints
from stalewise.checkpoint.writer import wait_for_writers

__all__ = ["says_how_to_go_on"]


@contextmanager
def says_how_to_go_on(folder: Path) -> Iterator[None]:
    """Around a run in this folder."""
    try:
        yield
    except KeyboardInterrupt:
        wait_for_writers()
        if kept := complete_checkpoints(folder / "checkpoints"):
            print(f"stopped; {kept[0].name} is kept. To go on: stalewise train --resume {folder}", file=sys.stderr)
        else:
            print(
                f"stopped; {folder} has no checkpoint to go on from, which --checkpoint-every N would leave.",
                file=sys.stderr,
            )
        raise
