"""What a slow link between two hosts costs each method.

    python benchmarks/link.py
    python benchmarks/link.py --delay-ms 50 --rounds 3 --only dsp

Three stages on two hosts, joined by torchrun: stages 0 and 1 on one, stage 2 on the other. The hosts are namespaces of
this machine, and the link between them is a process that limits the rate and delays every packet (`tests/tools`).
Each round times every row twice in the same processes, in random order: with the link as fast as it can be ("quick",
through the same devices), and with its rate and delay ("slow"). The ratio of both is what the link costs the row.

It needs root on Linux, and says so where it is not allowed. One core is busy with the link itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import add_out, leave, machine, spread, table, verdict
from sides import TORCH_ROWS, OwnRow, OwnSide, Side, TorchRow, TorchSide, make_task, named
from vs_torch_pipelining import steady_step_s

from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import Job, current_job

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tools.shaping import Shape
from tools.two_host_job import RANKS_ON, started_job
from tools.two_hosts import HOSTS, TwoHosts, why_not

OWN_ROWS = (
    named("dsp (4,2,0)", "dsp", staleness=[4, 2, 0]),
    named("dsp (6,3,0)", "dsp", staleness=[6, 3, 0]),
    named("dsp (4,2,0) stored", "dsp", staleness=[4, 2, 0], activations="stored"),
    named("dsp (6,3,0) stored", "dsp", staleness=[6, 3, 0], activations="stored"),
    named("1f1b", "1f1b", micro_batched=True),
)
TARGET = 1.1
POLL_S = 0.005
LINKS = ("quick", "slow")


def _rows(only: Sequence[str]) -> list[OwnRow | TorchRow]:
    known = [*OWN_ROWS, *(row for row in TORCH_ROWS if row.label == "torch 1F1B")]
    return [row for row in known if not only or any(text.lower() in row.label.lower() for text in only)]


# -- in every worker -------------------------------------------------------------------------------------------------


class Runs:
    """Times rows over the link as it is wanted.

    Args:
        options: of the command line.
        job: of three ranks.
    """

    def __init__(self, options: dict[str, Any], job: Job) -> None:
        self._options = options
        self._job = job
        self._folder = Path(options["folder"])
        self._switches = 0
        self._began = time.monotonic()
        self._switch("quick")
        self._say("profiling, and building the rows")
        task = make_task(job, options["model"], options["batch_size"], options["split"])
        self.sides: dict[str, Side] = {}
        self.steps_s: dict[str, dict[str, float]] = {}
        for row in _rows(options["only"]):
            make = OwnSide if isinstance(row, OwnRow) else TorchSide
            side = make(task, row, options["micro_batches"] if row.micro_batched else 1)  # type: ignore[arg-type]
            self.sides[row.label] = side
            first = self._time(row.label, 8 + 2 * side.depth)
            self.steps_s[row.label] = dict.fromkeys(LINKS, first)

    def round(self, index: int) -> dict[str, dict[str, float]]:
        """Seconds per step, by row and link."""
        self._say(f"round {index + 1} of {self._options['rounds']}")
        found: dict[str, dict[str, float]] = {label: {} for label in self.sides}
        for link in random.Random(f"links {index}").sample(LINKS, len(LINKS)):
            self._switch(link)
            for label in random.Random(f"rows {index} {link}").sample([*self.sides], len(self.sides)):
                known = self.steps_s[label][link]
                count = max(10 + 3 * self.sides[label].depth, round(self._options["seconds"] / known))
                found[label][link] = self.steps_s[label][link] = self._time(label, count)
        return found

    def _time(self, label: str, count: int) -> float:
        side = self.sides[label]
        all_gather_json(None, self._job.group)
        ends = all_gather_json(side.run(count), self._job.group)
        # what was in flight when the link changed its pace, and the first steps at the new one
        return steady_step_s(ends, skipped=max(2 + side.depth, count // 5))

    def _switch(self, link: str) -> None:
        """Ask the parent for a link, and wait until it is there."""
        self._switches += 1
        if self._job.rank == 0:
            wanted = self._folder / "wanted.tmp"
            wanted.write_text(json.dumps([self._switches, link]))
            wanted.rename(self._folder / "wanted")
            while not (self._folder / f"switched.{self._switches}").exists():
                time.sleep(POLL_S)
        all_gather_json(None, self._job.group)

    def _say(self, text: str) -> None:
        if self._job.rank == 0:
            print(f"{time.monotonic() - self._began:6.0f} s  {text}", flush=True)


def worker(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    job = current_job()
    runs = Runs(options, job)
    rounds = [runs.round(index) for index in range(options["rounds"])]
    for side in runs.sides.values():
        side.close()
    if job.rank == 0:
        rows = [
            {"label": label, "cuts": side.cuts, "micro_batches": side.micro_batches}
            for label, side in runs.sides.items()
        ]
        Path(options["folder"], "results.json").write_text(json.dumps({"rows": rows, "rounds": rounds}))


# -- in the parent ---------------------------------------------------------------------------------------------------


def measure(options: dict[str, Any], shapes: dict[str, Shape], folder: Path) -> dict[str, Any]:
    """Run the job, and give it the link that it asks for."""
    arguments = [json.dumps({**options, "folder": str(folder)})]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.getenv("PYTHONPATH")]))}
    done, shown = 0, 0
    with (
        TwoHosts(shapes["quick"]) as hosts,
        started_job(hosts, Path(__file__), arguments, folder, environment) as agents,
    ):
        while any(agent.poll() is None for agent in agents.values()):
            if (wanted := folder / "wanted").exists():
                number, link = json.loads(wanted.read_text())
                if number > done:
                    hosts.reshape(shapes[link])
                    (folder / f"switched.{number}").touch()
                    done = number
            text = (folder / HOSTS[0]).read_text()
            print(text[shown:], end="", file=sys.stderr, flush=True)
            shown = len(text)
            if any(agent.poll() for agent in agents.values()):
                break  # the other host may wait for it for long
            time.sleep(POLL_S)
    if not (folder / "results.json").exists():
        raise SystemExit("\n".join(f"{host}:\n{(folder / host).read_text()}" for host in HOSTS) + "the job failed")
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def _print(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The table, and the verdict: on the quickest DSP row over the slow link."""
    lines, found = [], []
    for row in results["rows"]:
        times = [step[row["label"]] for step in results["rounds"]]
        slow, quick = ([1e3 * time[link] for time in times] for link in ("slow", "quick"))
        ratios = [one / other for one, other in zip(slow, quick, strict=True)]
        kept = ""
        if "dsp" in row["label"]:
            kept = "yes" if statistics.median(ratios) <= TARGET else "NO"
            found.append((statistics.median(slow), row["label"], statistics.median(ratios)))
        lines.append(
            [
                row["label"],
                str(row["micro_batches"]) if row["micro_batches"] > 1 else "-",
                ",".join(map(str, row["cuts"])),
                spread(quick, 1),
                spread(slow, 1),
                spread(ratios, 3),
                kept,
            ]
        )
    print(table(["row", "M", "cuts", "quick link ms", "slow link ms", "slow / quick", f"<= {TARGET}"], lines))
    if not found:
        return []
    _, label, ratio = min(found)
    return [verdict(f"slow over quick link, {label}, the quickest DSP row over the slow link", ratio, TARGET)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--delay-ms", type=float, default=20.0, help="of every packet, in each direction")
    parser.add_argument("--rate-mbit", type=float, default=1000.0, help="million bits per second, in each direction")
    parser.add_argument("--mtu", type=int, default=9000, help="largest packet in bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="per row, link and round")
    parser.add_argument("--micro-batches", type=int, default=4, help="of rows that split a batch")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--split", choices=["stored", "recompute", "own"], default="own", help="see `sides.Task`")
    add_out(parser)
    options = vars(parser.parse_args())
    out_file = options.pop("out")
    if not _rows(options["only"]):
        parser.error(f"no row is called so; there are {', '.join(row.label for row in _rows([]))}")
    if (reason := why_not()) is not None:
        print(f"skipped: {reason}")
        leave(out_file, options, {"skipped": reason})
        return
    quick = Shape(mtu_bytes=options["mtu"])
    slow = replace(quick, delay_s=options["delay_ms"] / 1e3, rate_bits_per_s=options["rate_mbit"] * 1e6)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} before the start")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, {"quick": quick, "slow": slow}, Path(folder))
    print(
        f"\n{options['model']}, batch {options['batch_size']}, {sum(RANKS_ON.values())} stages on {len(HOSTS)} hosts, "
        f"link {options['rate_mbit']:g} Mbit/s and {options['delay_ms']:g} ms each way, MTU {options['mtu']}, split "
        f"{options['split']}, {options['rounds']} rounds: median (min .. max)"
    )
    leave(out_file, options, results, _print(results))
    print(f"load {os.getloadavg()[0]:.1f} at the end; much above 4 says that others worked too")


if __name__ == "__main__":
    if "RANK" in os.environ:
        worker(json.loads(sys.argv[1]))
    else:
        main()
