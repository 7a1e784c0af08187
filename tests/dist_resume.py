"""What the processes of tests/runtime/test_resume.py do."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
from dist_methods import VARIANTS
from resume_runs import method_of, pipeline, train

from stalewise.engine.stage import Stage

STOP = 11


def folder_of(folder: str, label: str) -> Path:
    """Of the checkpoints of one variant."""
    return Path(folder, label.replace(" ", "-"))


def save_all(folder: str) -> None:
    """Train every variant, saved amid it, with stages that are slow at random, so that some are steps ahead."""
    torch.set_num_threads(1)
    _slow_down(dist.get_rank() if dist.is_initialized() else 0)
    for label in VARIANTS:
        outcome = train(pipeline(method_of(label)), stop=STOP, folder=folder_of(folder, label))
        torch.save(vars(outcome), _result(folder, label))


def resume_all(folder: str) -> None:
    """Go on with every variant."""
    torch.set_num_threads(1)
    for label in VARIANTS:
        seen = torch.load(Path(folder, f"losses-{label}"))
        outcome = train(pipeline(method_of(label)), losses=seen, folder=folder_of(folder, label))
        torch.save(vars(outcome), _result(folder, label))


def move(folder: str) -> None:
    """Go on with other cuts."""
    torch.set_num_threads(1)
    pipe = pipeline(method_of("dsp"), cuts=(1, 6))
    point = pipe.resume(folder_of(folder, "dsp"), positioned=True)
    assert point is not None
    torch.save(
        [point.exact, point.losses, pipe.state_dict(), pipe.optimizer_state_dict(), pipe.num_batches],
        _result(folder, "moved"),
    )


def _result(folder: str, label: str) -> Path:
    return Path(folder, f"{label}-rank{dist.get_rank()}")


def _slow_down(rank: int) -> None:
    generator = random.Random(rank)
    update = Stage.update

    def slow(stage: Stage) -> None:
        update(stage)
        if generator.random() < 0.2:
            time.sleep(0.02)

    Stage.update = slow  # type: ignore[method-assign]
