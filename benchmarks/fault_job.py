"""A job of K stages in which one fault happens; `faults.py` starts it as a user would, and judges how it ends.

    python benchmarks/fault_job.py FOLDER '{"kind": "exception", "place": "forward", "stage": 1, "batch": 12, ..}'

Signals are sent at any action of a stage's program, exceptions rise in the user's own code.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, Subset

import stalewise
from stalewise import methods
from stalewise.checkpoint import folder as checkpoint_folder
from stalewise.checkpoint import stage_file
from stalewise.engine.interpreter import Interpreter
from stalewise.engine.stage import Stage
from stalewise.methods import Method
from stalewise.protocol.actions import Action
from stalewise.runtime import meeting
from stalewise.runtime.job import restart_count

FEATURES = 8
SAMPLES = 4
BATCHES = 30
STOP_S = 1.0
"""Of a pause that a job survives."""

METHODS: dict[str, Any] = {
    "DSP": lambda stages: stalewise.DSP.minimal(num_stages=stages),
    "BP": lambda stages: methods.BP(stages=stages),
    "GPipe": lambda stages: methods.GPipe(stages=stages, micro_batches=2),
    "PipeDream": lambda stages: methods.PipeDream(stages=stages),
}
"""Stored graphs and recomputation, with and without micro-batches."""


class Boom(Exception):
    """An error of the user's."""


class Fault:
    """What happens in this process, and when.

    Args:
        folder: where processes leave their numbers and the time of the fault.
        spec: of the fault; see `faults.py`.
    """

    def __init__(self, folder: str, spec: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.spec = spec
        self.rank = int(os.environ["RANK"])
        self.is_here = self.rank == spec["stage"] and restart_count() == 0
        self._passes: dict[str, int] = {}

    def reached(self, place: str, per_batch: int = 1) -> None:
        """Called at every place of the user's code; raises where it is time."""
        count = self._passes[place] = self._passes.get(place, -1) + 1
        if self.is_here and self.spec.get("place") == place and count == self.spec["batch"] * per_batch:
            self.happen()

    def happen(self) -> None:
        """Now."""
        self.mark()
        match self.spec["kind"]:
            case "exception":
                raise Boom(f"on rank {self.rank}")
            case "link down" | "link down and back":
                while not (self.folder / "go on").exists():  # the link fails meanwhile
                    time.sleep(0.005)
            case "SIGKILL" | "restart" | "kill while saving" | "kill while renaming" | "kill after renaming":
                os.kill(os.getpid(), signal.SIGKILL)
            case "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            case "SIGSTOP":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "pause":
                wake = f"sleep {STOP_S}; kill -CONT {os.getpid()}"
                subprocess.Popen(["sh", "-c", wake], process_group=0, stdin=subprocess.DEVNULL)
                os.kill(os.getpid(), signal.SIGSTOP)
            case "control-c":  # as the terminal does it: the whole group in the foreground
                os.killpg(os.getpgid(os.getppid()), signal.SIGINT)
            case "SIGTERM to the parent":
                os.kill(os.getppid(), signal.SIGTERM)
            case "SIGKILL to the parent":
                os.kill(os.getppid(), signal.SIGKILL)

    def mark(self) -> None:
        """Note the time."""
        (self.folder / "fault").write_text(repr(time.monotonic()))

    def sit_at_actions(self) -> None:
        """Let it happen before the action with the number `spec["action"]` of this stage."""
        execute, fault = Interpreter.execute, self

        def counted(interpreter: Interpreter, action: Action, first_batch: int) -> None:
            fault._passes["action"] = count = fault._passes.get("action", -1) + 1
            if count == fault.spec["action"]:
                fault.happen()
            execute(interpreter, action, first_batch)

        Interpreter.execute = counted  # type: ignore[method-assign]

    def note_first_update(self) -> None:
        """The time of the first update of each life of the job."""
        update, path = Stage.update, self.folder / f"first.{restart_count()}.{self.rank}"

        def noted(stage: Stage) -> None:
            update(stage)
            if not path.exists():
                path.write_text(repr(time.monotonic()))

        Stage.update = noted  # type: ignore[method-assign]

    def sit_in_the_writer(self) -> None:
        """Let it happen while a checkpoint is written that is not the first."""
        saved, renamed = stage_file.StagePart.write, os.rename
        fault = self

        def write(part: Any, directory: Path) -> None:
            count = fault._passes["write"] = fault._passes.get("write", 0) + 1
            if count == 4 and fault.spec["kind"] == "kill while saving":
                (directory / f"stage{part.stage}.safetensors").write_bytes(b"half of it")
                fault.happen()
            saved(part, directory)

        def rename(old: Any, new: Any) -> None:
            if not Path(new).name.startswith("ckpt-"):
                renamed(old, new)
                return
            count = fault._passes["rename"] = fault._passes.get("rename", 0) + 1
            if count == 2 and fault.spec["kind"] == "kill while renaming":
                fault.happen()
            renamed(old, new)
            if count == 2 and fault.spec["kind"] == "kill after renaming":
                fault.happen()

        stage_file.StagePart.write = write  # type: ignore[method-assign, assignment]
        checkpoint_folder.os.rename = rename  # type: ignore[assignment]


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, fault: Fault) -> Tensor:
        ctx.fault = fault
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.fault.reached("backward", ctx.fault.spec["micro_batches"])
        return gradient, None


class Layer(nn.Module):
    """Its passes are places for faults: those with a graph, and those without."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self._fault = fault

    def forward(self, inputs: Tensor) -> Tensor:
        place = "forward with a graph" if torch.is_grad_enabled() else "forward without a graph"
        self._fault.reached(place, self._fault.spec["micro_batches"])
        return _InBackward.apply(self.linear(inputs), self._fault)


class Optimizer(SGD):
    """Its step is a place for faults."""

    fault: Fault

    def step(self, closure: Any = None) -> None:
        self.fault.reached("optimizer")
        super().step(closure)


class Samples(Dataset[tuple[Tensor, int]]):
    """Read by processes of the data loader, each of which leaves its number."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def __len__(self) -> int:
        return number_of_batches(self._fault) * SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        (self._fault.folder / f"process.{os.getpid()}").touch()
        spec = self._fault.spec
        if spec.get("place") == "loader process" and index == spec["batch"] * SAMPLES:
            self._fault.happen()
        return torch.full((FEATURES,), index % 7 / 7.0), index % FEATURES


def number_of_batches(fault: Fault) -> int:
    """Of a run."""
    count: int = fault.spec.get("batches", BATCHES)
    return count


def batches(fault: Fault, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Through processes of a data loader, from a batch on."""
    samples = Subset(Samples(fault), range(skip * SAMPLES, number_of_batches(fault) * SAMPLES))
    loader = DataLoader(samples, batch_size=SAMPLES, num_workers=1, multiprocessing_context="fork")
    for batch in loader:
        fault.reached("data")
        yield batch


def main(folder: str, text: str) -> None:
    """What every rank does."""
    spec = json.loads(text)
    fault = Fault(folder, spec)
    (fault.folder / f"process.{os.getpid()}").touch()
    (fault.folder / f"rank.{fault.rank}").write_text(str(os.getpid()))
    if fault.is_here:
        if "action" in spec:
            fault.sit_at_actions()
        if spec["kind"].startswith("kill "):
            fault.sit_in_the_writer()
    while len(list(fault.folder.glob("rank.*"))) < spec["stages"]:  # no fault before all are there
        time.sleep(0.01)
    pipeline = build(fault)
    first, done = 0, 0
    if spec.get("restarts"):
        fault.note_first_update()
        point = pipeline.resume(fault.folder / "checkpoints", positioned=True, missing_ok=True)
        if point is not None:
            first = number_of_batches(fault) if point.session_batches is None else point.session_batches
            done = point.extra
    read = batches(fault, first) if fault.rank == 0 else None
    for count, _ in enumerate(pipeline.train(read), done):
        if spec.get("saves") and count % 5 == 4:
            if spec["kind"] == "full disk":
                fault.mark()
            pipeline.save(fault.folder / "checkpoints", extra=count + 1)
    pipeline.evaluate([(torch.ones(2, FEATURES), torch.tensor([0, 1]))], lambda output, target: 0.0)
    state = pipeline.state_dict()
    if fault.rank == 0:
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
        (fault.folder / "digest").write_text(digest)


def build(fault: Fault) -> stalewise.Pipeline:
    """The pipeline, unless this rank comes late, or another way."""
    spec = fault.spec
    stages = spec["stages"]
    seed, method = 0, METHODS[spec["method"]](stages)
    if fault.is_here:
        if spec["kind"] == "late":
            fault.mark()
            time.sleep(STOP_S)
        if spec["kind"] == "never":
            fault.mark()
            _wait_for_ever()
        if spec["kind"] == "other version":
            fault.mark()
            meeting.__version__ = "0.0.1"  # type: ignore[attr-defined]
        if spec["kind"] == "other seed":
            fault.mark()
            seed = 1
        if spec["kind"] == "other method":
            fault.mark()
            method = other_method(spec["method"], stages)
    torch.manual_seed(0)
    Optimizer.fault = fault

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # GPipe computes it before the recompute, too
            fault.reached("loss", spec["micro_batches"])
        return cross_entropy(output, target)

    return stalewise.Pipeline(
        [Layer(fault) for _ in range(stages)],
        method=method,
        loss_fn=loss_fn,
        optimizer=lambda parameters: Optimizer(parameters, lr=0.01),
        partition=tuple(range(1, stages)),
        seed=seed,
        recv_timeout_s=spec.get("recv_timeout_s"),
        start_timeout_s=spec.get("start_timeout_s", 600.0),
    )


def other_method(name: str, stages: int) -> Method:
    """Not the one that the others have."""
    made: Method = METHODS["BP" if name != "BP" else "DSP"](stages)
    return made


def _wait_for_ever() -> NoReturn:
    while True:
        signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    asked = json.loads(sys.argv[2])
    stalewise.launch(main, num_workers=asked["stages"], args=sys.argv[1:3], max_restarts=asked.get("restarts", 0))
