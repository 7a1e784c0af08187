"""Random faults in real jobs: does each end as it should, and how soon?

Every try starts a job of K stages in a process of its own, as a user does, lets one fault happen at a random place by
its seed, and judges what is left: exit code, what was printed, processes, shared memory, checkpoints, and for faults
that a job survives the weights:

    python benchmarks/faults.py --tries 200 --seed 0
    python benchmarks/faults.py --seed 0 --record faults.jsonl   # in parts: what was right is not tried again
    python benchmarks/faults.py --seed 0 --only 17               # the 18th of them alone, with its output

Time counts from the fault until the last process of the job is gone, the data loader's included, without the timeout
that the job was given to notice it (0 where it needed less); for a restart, until every stage has done its first step
after it, which may take as long as the job's first start (it imports torch again, and so on) on top of the limit.
Faults of the link need root (namespaces and TUN devices), a full disk a mount namespace.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, table
from fault_judge import judge, weights_key
from fault_kinds import (
    LEAST_SILENCE_S,
    LINK,
    LINK_BACK,
    LINK_TIMEOUT_S,
    RECV_TIMEOUT_S,
    START_TIMEOUT_S,
    SURVIVED,
    draw,
)
from fault_link import run_over_link, why_not

JOB = Path(__file__).with_name("fault_job.py")
JOB_TIMEOUT_S = 120.0
LINK_JOB_TIMEOUT_S = 400.0
GONE_TIMEOUT_S = 40.0
PATIENCE_S = {
    "SIGSTOP": max(RECV_TIMEOUT_S, LEAST_SILENCE_S),
    "link down": max(LINK_TIMEOUT_S, LEAST_SILENCE_S),
    "never": START_TIMEOUT_S,
}
"""What the job was given to notice that something is missing."""

DISK = "size=160k"
POLL_S = 0.05
STOOD_STILL_S = 3.0
"""A try in which this process did not run for so long (it was stopped, the machine slept) says nothing."""

AGAIN = 10
"""Times that such a try is made at most."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a try ended.

    Args:
        stood_still_s: longest time for which this process itself did not run, and so perhaps the job neither.
        complaints: what was not right.
        seconds: from the fault until the last process was gone; None where the job went on.
        output: everything that was printed.
    """

    stood_still_s: float
    complaints: list[str]
    seconds: float | None
    output: str


class Pulse:
    """Notes from a thread of its own for how long this process did not run."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        before = time.monotonic()
        while not self._over.wait(POLL_S):
            now = time.monotonic()
            self.longest_s, before = max(self.longest_s, now - before - POLL_S), now


def run(spec: dict[str, Any], digests: dict[str, str], limits: dict[str, float]) -> Ended:
    """Run one job to its end and judge it; again where this process stood still meanwhile. See `run_once`."""
    for _ in range(AGAIN):
        ended = run_once(spec, digests, limits)
        if ended.stood_still_s <= STOOD_STILL_S:
            break
        print(f"    stood still for {ended.stood_still_s:.0f} s; once more", file=sys.stderr, flush=True)
    return ended


def run_once(spec: dict[str, Any], digests: dict[str, str], limits: dict[str, float]) -> Ended:
    """Run one job to its end and judge it.

    Args:
        spec: see `fault_kinds.draw`.
        digests: of the weights of undisturbed jobs, by method and stages.
        limits: seconds by launcher.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "checkpoints").mkdir()
        began = time.monotonic()
        (folder / "tmp").mkdir()
        with Pulse() as pulse:
            if spec["kind"] in LINK:
                over_link = run_over_link(spec, folder, LINK_JOB_TIMEOUT_S)
                code, left, gone = over_link.code, over_link.left, over_link.gone
            else:
                code, left, gone = _run_here(spec, folder)
        printed = ("host-a", "host-b") if spec["kind"] in LINK else ("output",)
        text = "".join((folder / name).read_text() for name in printed)
        complaints = [] if code is not None else ["was not over in time"]
        if left:
            complaints.append(f"left {left} processes")
        complaints += judge(spec, code, text, folder, digests)
        complaints += _leaks(spec, folder)
        seconds = None
        marked = folder / "fault"
        if marked.exists() and spec["kind"] not in ("pause", "late", "full disk", *LINK_BACK):
            fault, allowed_s = float(marked.read_text()), limits[spec["launcher"]]
            seconds = gone - fault - PATIENCE_S.get(spec["kind"], 0.0)
            if spec["kind"] == "restart":
                seconds = _latest(folder, "first.1.*", default=gone) - fault
                allowed_s += min(fault, _latest(folder, "first.0.*", default=fault)) - began
            seconds = max(0.0, seconds)
            if seconds > allowed_s:
                complaints.append(f"took {seconds:.1f} s")
        elif not marked.exists() and spec["kind"] not in ("nothing", "loss and delay"):
            complaints.append("never came to its fault")
        return Ended(stood_still_s=pulse.longest_s, complaints=complaints, seconds=seconds, output=text)


def _latest(folder: Path, pattern: str, *, default: float) -> float:
    """Of the times in these files."""
    return max((float(path.read_text()) for path in folder.glob(pattern)), default=default)


def _run_here(spec: dict[str, Any], folder: Path) -> tuple[int | None, int, float]:
    """Exit code (None: not over in time), processes left, and when the last one was gone."""
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            _command(spec, folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")},
            start_new_session=True,
        )
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while (code := process.poll()) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    left = _wait_until_gone(process.pid)
    gone = time.monotonic()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return code, len(left), gone


def _command(spec: dict[str, Any], folder: Path) -> list[str]:
    job = [str(JOB), str(folder), json.dumps(spec)]
    if spec["launcher"] == "torchrun":
        workers = ["--standalone", "--nproc-per-node", str(spec["stages"])]
        workers += ["--max-restarts", str(spec.get("restarts", 0))]
        return [sys.executable, "-m", "torch.distributed.run", *workers, *job]
    if spec["kind"] == "full disk":  # a file system of its own, which the job fills
        script = f"""
            mount -t tmpfs -o {DISK} tmpfs {folder}/checkpoints || exit 70
            "$@"; code=$?
            cp -r {folder}/checkpoints {folder}/kept
            exit $code"""
        return ["unshare", "-Urm", "sh", "-c", script, "sh", sys.executable, *job]
    return [sys.executable, *job]


def _leaks(spec: dict[str, Any], folder: Path) -> Iterator[str]:
    """Shared memory of the job's processes (Linux); with `launch`, which owns them, sockets in the file system."""
    pids = {path.suffix[1:] for path in folder.glob("process.*")}
    for path in Path("/dev/shm").glob("*"):
        if pids & set(re.split(r"[^0-9a-zA-Z]", path.name)):
            yield f"left shared memory {path.name}"
    for path in (folder / "tmp").rglob("*"):
        if path.is_socket() and spec["launcher"] == "launch":
            yield f"left the socket {path.name}"


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


def summary(tries: list[dict[str, Any]]) -> str:
    """A row per kind of fault."""
    by_kind: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in tries:
        torchrun = one["spec"]["launcher"] == "torchrun" and one["spec"]["kind"] not in LINK
        by_kind[f"{one['spec']['kind']}{' (torchrun)' if torchrun else ''}"].append(one)
    by_kind["all"] = tries
    rows = []
    for kind, jobs in by_kind.items():
        seconds = [job["seconds"] for job in jobs if job["seconds"] is not None]
        rows.append(
            (
                kind,
                str(len(jobs)),
                str(sum(not job["complaints"] for job in jobs)),
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
    parser.add_argument("--first", type=int, default=0, help="number of the first try (default 0)")
    parser.add_argument("--record", type=Path, help="file that gets each outcome; right ones in it are not tried again")
    parser.add_argument("--limit-s", type=float, default=10.0, help="until a launched job is over (default 10)")
    parser.add_argument("--torchrun-limit-s", type=float, default=30.0, help="the same with torchrun (default 30)")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    outcomes = _recorded(arguments.record, arguments.seed)
    limits = {"launch": arguments.limit_s, "torchrun": arguments.torchrun_limit_s}
    cannot = {"full disk": _why_no_mount(), **dict.fromkeys(LINK, why_not())}
    digests: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    numbers = arguments.only or range(arguments.first, arguments.tries)
    for number in numbers:
        spec = draw(arguments.seed, number)
        if (reason := cannot.get(spec["kind"])) is not None:
            skipped[f"{spec['kind']}: {reason}"] += 1
            continue
        if number in outcomes and not outcomes[number]["complaints"] and not arguments.only:
            continue
        if spec["kind"] in SURVIVED and weights_key(spec) not in digests:
            undisturbed = {**spec, "kind": "nothing", "stage": -1, "action": -1, "launcher": "launch", "saves": False}
            _report(f"{number}, undisturbed", undisturbed, run(undisturbed, digests, limits))
        ended = run(spec, digests, limits)
        _report(str(number), spec, ended)
        outcomes[number] = {"seed": arguments.seed, "number": number, "spec": spec}
        outcomes[number] |= {"complaints": ended.complaints, "seconds": ended.seconds}
        if arguments.record is not None:
            with arguments.record.open("a") as file:
                file.write(json.dumps(outcomes[number]) + "\n")
        if arguments.only:
            print(ended.output)
    shown = [outcomes[number] for number in numbers if number in outcomes]
    print(summary(shown))
    for reason, count in skipped.items():
        print(f"left out {count}: {reason}")
    return 1 if any(one["complaints"] for one in shown) else 0


def _recorded(path: Path | None, seed: int) -> dict[int, dict[str, Any]]:
    """The last outcome of each try."""
    if path is None or not path.exists():
        return {}
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {one["number"]: one for one in found if one["seed"] == seed}


def _why_no_mount() -> str | None:
    if shutil.which("unshare") and not subprocess.call(["unshare", "-Urm", "true"], stderr=subprocess.DEVNULL):
        return None
    return "it needs a mount namespace, which this machine forbids"


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
