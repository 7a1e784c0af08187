"""Random faults in real jobs: does each end as it should, and how soon?

Every try starts a job of K stages in a process of its own, as a user does, lets one fault happen at a random place by
its seed, and judges what is left: exit code, what was printed, processes, shared memory, checkpoints, and for faults
that a job survives the weights:

    python benchmarks/faults.py --tries 200 --seed 0
    python benchmarks/faults.py --seed 0 --only 17          # the 18th of them alone, with its output

Time counts from the fault until the last process of the job is gone, the data loader's included, without the timeout
that the job was given to notice it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, table
from fault_job import METHODS

from stalewise.checkpoint.folder import complete_checkpoints, verify
from stalewise.errors import CheckpointError

JOB = Path(__file__).with_name("fault_job.py")
JOB_TIMEOUT_S = 120.0
GONE_TIMEOUT_S = 40.0
RECV_TIMEOUT_S = 2.0
LEAST_SILENCE_S = 5.0
START_TIMEOUT_S = 3.0
DISK = "size=160k"

EXCEPTIONS = {
    "forward with a graph": ("forward", "recompute"),
    "forward without a graph": ("forward", "evaluation"),
    "backward": ("backward",),
    "loss": ("forward",),
    "optimizer": ("update",),
    "data": ("load",),
    "loader process": ("load",),
}
"""Places, and the actions that a report of them names."""

SURVIVED = ("nothing", "pause", "late")
KILLS = ("SIGKILL", "SIGTERM")
TO_THE_PARENT = {"control-c": signal.SIGINT, "SIGTERM to the parent": signal.SIGTERM}
TO_THE_PARENT["SIGKILL to the parent"] = signal.SIGKILL
CONFIGURATIONS = {
    "other version": "runs with releases stalewise 0.0.1",
    "other seed": "were given another seed: ",
    "other method": "were given another method: ",
}
SAVING = ("kill while saving", "kill while renaming", "kill after renaming", "full disk")
KINDS = ("exception", "exception", *KILLS, "SIGSTOP", *SURVIVED[1:], *TO_THE_PARENT, "never", *CONFIGURATIONS, *SAVING)


def draw(seed: int, number: int) -> dict[str, Any]:
    """The fault of a try; the kinds take turns."""
    chance = random.Random(f"{seed}.{number}")
    kind = KINDS[number % len(KINDS)]
    stages = chance.choice((2, 3, 3, 4))
    method = chance.choice(list(METHODS))
    spec: dict[str, Any] = {
        "kind": kind,
        "stages": stages,
        "stage": chance.randrange(stages),
        "method": method,
        "micro_batches": 2 if method == "GPipe" else 1,
        "launcher": "torchrun" if kind in ("exception", "SIGKILL") and chance.random() < 0.2 else "launch",
    }
    if kind == "exception":
        spec["place"] = chance.choice(list(EXCEPTIONS))
        spec["batch"] = chance.randrange(1, 20)
        if spec["place"] == "forward without a graph":
            # Only where a recompute follows; the last stage never has one.
            spec["method"], spec["micro_batches"] = "DSP", 1
            spec["stage"] = chance.randrange(stages - 1)
        if spec["place"] == "loss":
            spec["stage"] = stages - 1
        if spec["place"] in ("data", "loader process"):
            spec["stage"] = 0
    elif kind in (*KILLS, "SIGSTOP", "pause", *TO_THE_PARENT):
        spec["action"] = chance.randrange(120)
    elif kind in CONFIGURATIONS:
        spec["stage"] = chance.randrange(1, stages)
    elif kind in SAVING:
        spec["saves"] = True
        if kind != "kill while saving":
            spec["stage"] = 0  # which completes every checkpoint
    if kind == "SIGSTOP":
        spec["recv_timeout_s"] = RECV_TIMEOUT_S
    if kind == "never":
        spec["start_timeout_s"] = START_TIMEOUT_S
    return spec


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a try ended.

    Args:
        complaints: what was not right.
        seconds: from the fault until the last process was gone; None where the job went on.
        output: everything that was printed.
    """

    complaints: list[str]
    seconds: float | None
    output: str


def run(spec: dict[str, Any], digests: dict[tuple[str, int], str], limits: dict[str, float]) -> Ended:
    """Run one job to its end and judge it.

    Args:
        spec: see `draw`.
        digests: of the weights of undisturbed jobs, by method and stages.
        limits: seconds by launcher.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "checkpoints").mkdir()
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                _command(spec, folder),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        complaints = []
        try:
            code = process.wait(JOB_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            complaints.append(f"was not over after {JOB_TIMEOUT_S:.0f} s")
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        left = _wait_until_gone(process.pid)
        gone = time.monotonic()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        text = (folder / "output").read_text()
        if left:
            complaints.append(f"left {len(left)} processes")
        complaints += _judge(spec, code, text, folder, digests)
        complaints += _left_in_memory(folder)
        seconds = None
        if (folder / "fault").exists() and spec["kind"] not in SURVIVED and spec["kind"] != "full disk":
            patience = {"SIGSTOP": max(RECV_TIMEOUT_S, LEAST_SILENCE_S), "never": START_TIMEOUT_S}
            seconds = gone - float((folder / "fault").read_text()) - patience.get(spec["kind"], 0.0)
            seconds = max(seconds, 0.0)
            if seconds > limits[spec["launcher"]]:
                complaints.append(f"took {seconds:.1f} s to be over")
        elif not (folder / "fault").exists() and spec["kind"] != "nothing":
            complaints.append("never came to its fault")
        return Ended(complaints=complaints, seconds=seconds, output=text)


def _command(spec: dict[str, Any], folder: Path) -> list[str]:
    job = [str(JOB), str(folder), json.dumps(spec)]
    if spec["launcher"] == "torchrun":
        workers = ["--standalone", "--nproc-per-node", str(spec["stages"])]
        return [sys.executable, "-m", "torch.distributed.run", *workers, *job]
    if spec["kind"] == "full disk":  # a file system of its own, which the job fills
        script = f"""
            mount -t tmpfs -o {DISK} tmpfs {folder}/checkpoints || exit 70
            "$@"; code=$?
            cp -r {folder}/checkpoints {folder}/kept
            exit $code"""
        return ["unshare", "-Urm", "sh", "-c", script, "sh", sys.executable, *job]
    return [sys.executable, *job]


def _judge(
    spec: dict[str, Any], code: int, output: str, folder: Path, digests: dict[tuple[str, int], str]
) -> Iterator[str]:
    """What is not right with exit code, output and files."""
    kind, stage = spec["kind"], spec["stage"]
    digest = (folder / "digest").read_text() if (folder / "digest").exists() else None
    if kind in SURVIVED:
        if code != 0 or output:
            yield f"exited with {code}"
        if kind == "nothing":
            digests[spec["method"], spec["stages"]] = str(digest)
        elif digest != digests[spec["method"], spec["stages"]]:
            yield "went on with other numbers"
        return
    if digest is not None:
        yield "went on as if nothing had happened"
    if kind in TO_THE_PARENT:
        number = TO_THE_PARENT[kind]
        if code not in (-number, 128 + number):
            yield f"exited with {code}"
        if "stalewise:" in output or "WorkerError" in output:
            yield "blamed a worker"
        return
    if code != 1:
        yield f"exited with {code}"
    pid = (folder / f"rank.{stage}").read_text()
    who = f"stage {stage} (rank {stage}, host {socket.gethostname()}, pid {pid})"
    if spec["launcher"] == "torchrun":
        yield from _judge_torchrun(spec, output, who)
        return
    _, separator, message = output.partition("stalewise.errors.WorkerError: ")
    if not separator or not output.startswith("Traceback (most recent call last):\n  File"):
        yield "printed something before the first cause"
    yield from _judge_message(spec, message, who)
    if output.count("WorkerError: ") != 1 or output.count(message.split("\n")[0]) != 1:
        yield "printed the first cause more than once"
    if kind in SAVING:
        yield from _judge_checkpoints(folder / ("kept" if kind == "full disk" else "checkpoints"))


def _judge_message(spec: dict[str, Any], message: str, who: str) -> Iterator[str]:
    kind, stage = spec["kind"], spec["stage"]
    header = message.split("\n")[0]
    if kind == "exception":
        actions = "|".join(EXCEPTIONS[spec["place"]])
        if not re.fullmatch(rf"{re.escape(who)} failed, batch {spec['batch']}, ({actions}):", header):
            yield f"does not name stage, batch and action: {header}"
        if message.count("Boom: on rank") != 1:
            yield "does not hold the user's error once"
    elif kind in KILLS or kind.startswith("kill "):
        name = kind if kind in KILLS else "SIGKILL"
        if not header.startswith(f"{who} was killed by {name}."):
            yield f"does not say who was killed: {header}"
        if "action" in spec and spec["action"] > 40 and not re.search(r"batch \d+", header):
            yield f"does not name a batch: {header}"
    elif kind == "SIGSTOP":
        if who not in message or "ReceiveTimeout: " not in message:
            yield f"does not name the stage that was stopped: {message.strip()}"
        if not re.search(r"batch \d+", message) and "evaluation" not in message and "session" not in message:
            yield f"does not name a batch: {message.strip()}"
    elif kind == "never":
        if f"ReceiveTimeout: rank {stage} did not start in {START_TIMEOUT_S:.4g} s; " not in message:
            yield f"does not name the rank that is missing: {message.strip()}"
    elif kind in CONFIGURATIONS:
        named = f"rank {stage}" if kind != "other version" else f"stage {stage} (rank {stage}, "
        if CONFIGURATIONS[kind] not in message or named not in message or "ConfigError: " not in message:
            yield f"does not name the difference: {message.strip()}"
    elif kind == "full disk" and "No space left on device" not in message:
        yield f"does not say that the disk is full: {message.strip()}"


def _judge_torchrun(spec: dict[str, Any], output: str, who: str) -> Iterator[str]:
    """torchrun prints its own summary, too; ours must hold the first cause once."""
    if spec["kind"] == "exception":
        header = rf"{re.escape(who)} failed, batch {spec['batch']}, ({'|'.join(EXCEPTIONS[spec['place']])}):"
        if len(re.findall(header, output)) != 1:
            yield "does not name stage, batch and action once"
    elif "SIGKILL" not in output and f"{who} is gone" not in output:
        yield "does not say who was killed"


def _judge_checkpoints(folder: Path) -> Iterator[str]:
    """Whatever can be seen is whole, and the first one is there."""
    found = complete_checkpoints(folder)
    if not found:
        yield "left no checkpoint"
    for path in found:
        try:
            verify(path)
        except CheckpointError as error:
            yield f"left a torn checkpoint: {error}"


def _left_in_memory(folder: Path) -> Iterator[str]:
    """Shared memory of the job's processes (Linux)."""
    pids = {path.suffix[1:] for path in folder.glob("process.*")}
    for path in Path("/dev/shm").glob("*"):
        if pids & set(re.findall(r"\d+", path.name)):
            yield f"left shared memory {path.name}"


def _wait_until_gone(session: int) -> list[int]:
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while (left := _processes(session)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def _processes(session: int) -> list[int]:
    """Live processes of a session (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, own_session, *_ = stat.read_text().rpartition(")")[2].split()
            if int(own_session) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def summary(tries: list[tuple[dict[str, Any], Ended]]) -> str:
    """A row per kind of fault."""
    by_kind: defaultdict[str, list[Ended]] = defaultdict(list)
    for spec, ended in tries:
        by_kind[f"{spec['kind']}{' (torchrun)' if spec['launcher'] == 'torchrun' else ''}"].append(ended)
    by_kind["all"] = [ended for _, ended in tries]
    rows = []
    for kind, jobs in by_kind.items():
        seconds = [job.seconds for job in jobs if job.seconds is not None]
        rows.append(
            (
                kind,
                str(len(jobs)),
                str(sum(not job.complaints for job in jobs)),
                f"{statistics.median(seconds):.2f}" if seconds else "-",
                f"{max(seconds):.2f}" if seconds else "-",
            )
        )
    return table(("fault", "tries", "right", "median s", "longest s"), rows)


def main() -> int:
    """Run and print; 1 where an outcome was not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200, help="how many faults (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens where (default 0)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the tries to run, with their output")
    parser.add_argument("--limit-s", type=float, default=10.0, help="until a launched job is over (default 10)")
    parser.add_argument("--torchrun-limit-s", type=float, default=30.0, help="the same with torchrun (default 30)")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    limits = {"launch": arguments.limit_s, "torchrun": arguments.torchrun_limit_s}
    can_mount = shutil.which("unshare") is not None and not subprocess.call(
        ["unshare", "-Urm", "true"], stderr=subprocess.DEVNULL
    )
    digests: dict[tuple[str, int], str] = {}
    tries: list[tuple[dict[str, Any], Ended]] = []
    skipped: Counter[str] = Counter()
    for number in arguments.only or range(arguments.tries):
        spec = draw(arguments.seed, number)
        if spec["kind"] == "full disk" and not can_mount:
            skipped["a full disk needs a mount namespace, which this machine forbids"] += 1
            continue
        if spec["kind"] in SURVIVED and (spec["method"], spec["stages"]) not in digests:
            undisturbed = {**spec, "kind": "nothing", "stage": -1, "action": -1}
            tries.append((undisturbed, run(undisturbed, digests, limits)))
            _report(f"{number}, undisturbed", *tries[-1])
        tries.append((spec, run(spec, digests, limits)))
        _report(str(number), *tries[-1])
        if arguments.only:
            print(tries[-1][1].output)
    print(summary(tries))
    for reason, count in skipped.items():
        print(f"left out {count}: {reason}")
    return 1 if any(ended.complaints for _, ended in tries) else 0


def _report(number: str, spec: dict[str, Any], ended: Ended) -> None:
    """A line of progress, and all of what was wrong."""
    where = {
        key: spec[key] for key in ("launcher", "method", "stages", "stage", "place", "batch", "action") if key in spec
    }
    what = f"{number}: {spec['kind']} {' '.join(f'{key}={value}' for key, value in where.items())}"
    took = "" if ended.seconds is None else f", over in {ended.seconds:.2f} s"
    print(f"{what}: {'; '.join(ended.complaints) or 'right'}{took}", file=sys.stderr, flush=True)
    if ended.complaints:
        print("    " + ended.output.replace("\n", "\n    "), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
