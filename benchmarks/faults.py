"""How soon a job is over after one of its workers fails.

Starts a job of K workers, lets one stage raise an exception or kills its process amid the training, and measures the
time from that moment until every process of the job is gone, the data loader's included:

    python benchmarks/faults.py --tries 20 --stages 3

A try counts as reported if `launch` raised a WorkerError that names the stage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import stalewise

FAULTS = ("exception", "SIGKILL")
FEATURES = 64
CLASSES = 10
GONE_TIMEOUT_S = 30.0


# -- in the workers ----------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """A layer that fails in its n-th pass.

    Args:
        folder: where the time of the fault is noted.
        fault: one of `FAULTS`.
        passes: how many are done before; None: it never fails.
    """

    def __init__(self, folder: str, fault: str, passes: int | None) -> None:
        super().__init__()
        self._folder = folder
        self._fault = fault
        self._left = passes

    def forward(self, inputs: Tensor) -> Tensor:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                Path(self._folder, "fault").write_text(repr(time.monotonic()))
                if self._fault == "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("a fault of the benchmark")
        return inputs


class Samples(Dataset[tuple[Tensor, int]]):
    """Random images; whoever reads them leaves its process number."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        Path(self._folder, f"process.{os.getpid()}").touch()
        return torch.full((FEATURES,), index % 7 / 7.0), index % CLASSES


def train(folder: str, num_stages: int, stage: int, fault: str, passes: int) -> None:
    """Train until the fault."""
    rank = int(os.environ["RANK"])
    Path(folder, f"process.{os.getpid()}").touch()
    torch.manual_seed(0)
    layers = [
        nn.Sequential(
            nn.Linear(FEATURES, CLASSES if k == num_stages - 1 else FEATURES),
            Failing(folder, fault, passes if k == stage else None),
        )
        for k in range(num_stages)
    ]
    pipeline = stalewise.Pipeline(
        layers,
        method=stalewise.DSP.minimal(num_stages=num_stages),
        loss_fn=cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        partition=tuple(range(1, num_stages)),
    )
    loader: Any = DataLoader(Samples(folder), batch_size=16, num_workers=2) if rank == 0 else None
    for _ in pipeline.train(loader):
        pass


# -- in the parent -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Try:
    """One job.

    Args:
        seconds: from the fault until the last process was gone.
        reported: whether the error names the stage.
    """

    seconds: float
    reported: bool


def measure(num_stages: int, stage: int, fault: str, passes: int) -> Try:
    """Run one job to its end."""
    with tempfile.TemporaryDirectory() as folder:
        message = "no error"
        try:
            stalewise.launch(train, num_workers=num_stages, args=[folder, num_stages, stage, fault, passes])
        except stalewise.WorkerError as error:
            message = str(error)
        pids = [int(path.suffix[1:]) for path in Path(folder).glob("process.*")]
        while any(_lives(pid) for pid in pids):
            if time.monotonic() - float(Path(folder, "fault").read_text()) > GONE_TIMEOUT_S:
                break
            time.sleep(0.01)
        seconds = time.monotonic() - float(Path(folder, "fault").read_text())
        expected = "was killed by SIGKILL" if fault == "SIGKILL" else "a fault of the benchmark"
        return Try(seconds, message.startswith(f"stage {stage} ") and expected in message)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(FileNotFoundError):  # Linux: an orphan may stay as a zombie where nobody collects it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def table(results: dict[tuple[str, int], list[Try]]) -> Iterator[str]:
    """Lines with a row per fault and stage, and one for all of a fault."""
    yield f"{'fault':<10} {'stage':>5} {'tries':>6} {'reported':>9} {'median s':>9} {'longest s':>10}"
    for fault in FAULTS:
        rows = {str(stage): tries for (kind, stage), tries in results.items() if kind == fault}
        if len(rows) > 1:
            rows["all"] = [one for tries in rows.values() for one in tries]
        for stage, tries in rows.items():
            seconds = [one.seconds for one in tries]
            yield (
                f"{fault:<10} {stage:>5} {len(tries):>6} {sum(one.reported for one in tries):>9} "
                f"{statistics.median(seconds):>9.2f} {max(seconds):>10.2f}"
            )


def environment() -> Iterator[str]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(FileNotFoundError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    yield f"{os.cpu_count()} cores ({model}), load average {load}, {platform.system()} {platform.release()}"
    yield f"Python {platform.python_version()}, torch {torch.__version__}, stalewise {stalewise.__version__}"


def main() -> int:
    """Measure and print; 1 if a job was not over within the limit, or was not reported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20, help="per fault and stage (default 20)")
    parser.add_argument("--stages", type=int, default=3, help="K (default 3)")
    parser.add_argument("--batches", type=int, default=20, help="done before the fault (default 20)")
    parser.add_argument("--limit-s", type=float, default=10.0, help="the longest that is all right (default 10)")
    arguments = parser.parse_args()
    print("\n".join(environment()), flush=True)
    results: dict[tuple[str, int], list[Try]] = {}
    for fault in FAULTS:
        for stage in range(arguments.stages):
            tries = results[fault, stage] = []
            for number in range(arguments.tries):
                tries.append(measure(arguments.stages, stage, fault, arguments.batches))
                print(
                    f"\r{fault}, stage {stage}: {number + 1} of {arguments.tries}", end="", file=sys.stderr, flush=True
                )
            print(file=sys.stderr)
    print("\n".join(table(results)))
    everything = [one for tries in results.values() for one in tries]
    return 0 if all(one.reported and one.seconds <= arguments.limit_s for one in everything) else 1


if __name__ == "__main__":
    sys.exit(main())
