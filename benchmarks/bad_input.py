"""Gives bad input to everything that takes input, and counts how it ends.

    python benchmarks/bad_input.py --tries 10000 --seed 0

Each try is refused with an error of stalewise that says what to do, or it ends the command: anything else (another
error, a try that is not over in time, bad input that is taken, something lost) is printed with the number by which
`--only` repeats it. Where good input is damaged at random, it may still be good: such tries count as harmless.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import bad_arguments
import bad_batches
import bad_commands
import bad_files
import torch
from bad_cases import Case

from stalewise import StalewiseError

LIMIT_S = 60.0
Maker = Callable[[Random, Path], Case]

KINDS: dict[str, Maker] = {
    "methods": bad_arguments.methods,
    "Pipeline": bad_arguments.pipeline,
    "TrainConfig": bad_arguments.config,
    "models": bad_arguments.models,
    "data sets": bad_arguments.data_names,
    "timing": bad_arguments.simulation,
    "planning": bad_arguments.planning,
    "theory": bad_arguments.theory,
    "launch": bad_arguments.launching,
    "batches": bad_batches.batches,
    "losses": bad_batches.losses,
    "layers": bad_batches.layers,
    "commands": bad_commands.commands,
    "data files": bad_files.data_files,
    "run folders": bad_files.run_folders,
    "output folders": bad_files.output_folders,
}


MODELS = """
import sys
from torch import nn

def fails(): raise ZeroDivisionError("in the model's own code")
def exits(): sys.exit(3)
def none(): return None
def empty(): return []
def numbers(): return [1, 2]
def needs(width): return [nn.Linear(width, 10)]
def build(): return [nn.Flatten(), nn.Linear(4, 10)]
"""
"""`module:function`s of a user's."""


class Late(BaseException):
    """A try took longer than the limit."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End what is inside after so many seconds."""

    def end(number: int, frame: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case) -> tuple[str, str]:
    """How a try ended, and with what."""
    try:
        with limited(LIMIT_S), contextlib.redirect_stdout(io.StringIO()):
            case.act()
    except StalewiseError as error:
        text = str(error)
        # What happened and what to do take more than a few words, and never a bare repr of another error.
        return ("refused", text) if len(text) > 30 and " " in text else ("unclear", text)
    except Late:
        return "late", f"not over in {LIMIT_S:g} s"
    except BaseException:
        return "raw", traceback.format_exc(limit=-6)
    return ("taken", "") if case.must_fail else ("harmless", "")


def attempt(number: int, seed: int, kinds: dict[str, Maker], folder: Path) -> tuple[str, Case]:
    """Try `number` of a run with this seed."""
    random = Random(f"{seed}/{number}")
    torch.manual_seed(number)
    kind = list(kinds)[number % len(kinds)]
    return kind, kinds[kind](random, folder)


def main() -> int:
    """Run and print; 1 if a try ended otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10_000, help="in all (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the tries (default 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first try, to share them (default 0)")
    parser.add_argument("--kinds", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--only", type=int, help="the number of a single try, which prints what it gives")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds = {name: KINDS[name] for name in (arguments.kinds.split(",") if arguments.kinds else KINDS)}
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    numbers = range(arguments.first, arguments.first + arguments.tries) if arguments.only is None else [arguments.only]
    shown: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        Path("bad_models.py").write_text(MODELS)
        Path("bad_broken.py").write_text("raise OSError('while it is imported')\n")
        for number in numbers:
            kind, case = attempt(number, arguments.seed, kinds, Path(scratch))
            verdict, detail = judge(case)
            counts[kind][verdict] += 1
            if arguments.only is not None or verdict not in ("refused", "harmless"):
                key = f"{kind} {verdict} {detail[-160:]}"
                shown[key] += 1
                if shown[key] == 1:
                    print(f"{verdict}: {kind}, try {number}: {case.what[:300]}\n{detail}", flush=True)
        os.chdir("/")
    return report(counts)


def report(counts: dict[str, Counter[str]]) -> int:
    """Print the counts; 1 where one of them should be 0."""
    heads = ["refused", "harmless", "raw", "late", "taken", "unclear"]
    total = sum(counts.values(), Counter[str]())
    print(f"{'kind':<16}" + "".join(f"{head:>10}" for head in heads))
    for kind, count in {**counts, "all": total}.items():
        print(f"{kind:<16}" + "".join(f"{count[head]:>10}" for head in heads))
    return int(any(total[head] for head in heads[2:]))


if __name__ == "__main__":
    sys.exit(main())
