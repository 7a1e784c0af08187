"""What can go wrong in a job of `faults.py`, and what is drawn for each try."""

from __future__ import annotations

import random
import signal
from typing import Any

from fault_job import METHODS

RECV_TIMEOUT_S = 2.0
LEAST_SILENCE_S = 5.0
LINK_TIMEOUT_S = 5.0
START_TIMEOUT_S = 3.0
LINK_SEED = 1
LINK_BATCHES = 10
"""Fewer than elsewhere: each of them crosses a slow link several times."""


EXCEPTIONS = {
    "forward with a graph": ("forward", "recompute"),
    "forward without a graph": ("forward", "evaluation"),
    "backward": ("backward",),
    "loss": ("forward", "recompute"),
    "optimizer": ("update",),
    "data": ("load",),
    "loader process": ("load",),
}
"""Places, and the actions that a report of them names."""

LINK_BACK = ("link down and back", "loss and delay")
LINK = ("link down", *LINK_BACK)
"""Between two hosts, under torchrun."""

SURVIVED = ("nothing", "pause", "late", "restart", *LINK_BACK)
KILLS = ("SIGKILL", "SIGTERM")
TO_THE_PARENT = {"control-c": signal.SIGINT, "SIGTERM to the parent": signal.SIGTERM}
TO_THE_PARENT["SIGKILL to the parent"] = signal.SIGKILL
CONFIGURATIONS = {
    "other version": "runs with releases stalewise 0.0.1",
    "other seed": "were given another seed: ",
    "other method": "were given another method: ",
}
SAVING = ("kill while saving", "kill while renaming", "kill after renaming", "full disk")
KINDS = (
    "exception",
    "exception",
    *KILLS,
    "SIGSTOP",
    "pause",
    "late",
    *TO_THE_PARENT,
    "never",
    *CONFIGURATIONS,
    *SAVING,
    "restart",
    "restart",
    *LINK,
)


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
        "launcher": "launch",
    }
    if kind in ("exception", "SIGKILL", "restart") and chance.random() < 0.25:
        spec["launcher"] = "torchrun"
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
    elif kind in (*KILLS, "SIGSTOP", "pause", "restart", *TO_THE_PARENT, *LINK):
        spec["action"] = chance.randrange(120)
    elif kind in CONFIGURATIONS:
        spec["stage"] = chance.randrange(1, stages)
    elif kind in SAVING:
        spec["saves"] = True
        if kind != "kill while saving":
            spec["stage"] = 0  # which completes every checkpoint
    if kind == "SIGSTOP":
        spec["recv_timeout_s"] = RECV_TIMEOUT_S
    if kind == "restart":
        spec["saves"], spec["restarts"] = True, 1
    if kind in LINK:
        spec["stages"], spec["launcher"], spec["batches"] = 3, "torchrun", LINK_BATCHES
        spec["action"] %= 4 * LINK_BATCHES
        spec["stage"] %= 3
        if kind == "link down":
            spec["recv_timeout_s"] = LINK_TIMEOUT_S
    if kind == "never":
        spec["start_timeout_s"] = START_TIMEOUT_S
    return spec
