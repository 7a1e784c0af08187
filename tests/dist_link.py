"""A worker of a job whose link fails: trains, and waits before a batch until it is told to go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it in their first step, and that takes longer than a short timeout

sys.path.insert(0, str(Path(__file__).parent))

import dist_net

BATCHES = 16
HELD_BATCH = 8


def batches(folder: Path, held: bool) -> Iterator[Any]:
    """The same every time; held: says when it has come to the batch, and waits for an answer."""
    for index, batch in enumerate(dist_net.batches(BATCHES, 21)):
        if held and index == HELD_BATCH:
            Path(folder, "reached").touch()
            while not Path(folder, "go on").exists():
                time.sleep(0.005)
        yield batch


def train(folder: Path, *, held: bool, **options: Any) -> dict[str, Any]:
    """What a run leaves behind."""
    torch.set_num_threads(1)
    pipe = dist_net.pipeline(3, **options)
    losses = list(pipe.train(batches(folder, held) if pipe.rank == 0 else None))
    return {"losses": losses, "state": pipe.state_dict(), "optimizer": pipe.optimizer_state_dict(), "rank": pipe.rank}


def main() -> None:
    folder, timeout_s, held = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "held"
    result = train(folder, held=held, recv_timeout_s=timeout_s)
    torch.save(result, folder / f"result.{result.pop('rank')}.pt")


if __name__ == "__main__":
    main()
