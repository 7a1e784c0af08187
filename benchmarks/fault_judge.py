"""What is not right with how a job of `faults.py` ended: exit code, output, files."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_kinds import CONFIGURATIONS, EXCEPTIONS, KILLS, SAVING, START_TIMEOUT_S, SURVIVED, TO_THE_PARENT

from stalewise.checkpoint.folder import complete_checkpoints, verify
from stalewise.errors import CheckpointError


def weights_key(spec: dict[str, Any]) -> str:
    """Of jobs that end with the same weights."""
    return f"{spec['method']} {spec['stages']} {spec.get('batches')}"


def judge(spec: dict[str, Any], code: int | None, output: str, folder: Path, digests: dict[str, str]) -> Iterator[str]:
    """What is not right with exit code, output and files."""
    kind, stage = spec["kind"], spec["stage"]
    digest = (folder / "digest").read_text() if (folder / "digest").exists() else None
    if kind in SURVIVED:
        if code != 0:
            yield f"exited with {code}"
        if kind == "restart":
            yield from _judge_restart(spec, output)
        elif output and spec["launcher"] == "launch":
            yield "printed something"
        if kind == "nothing":
            digests[weights_key(spec)] = str(digest)
        elif not digest or digest != digests.get(weights_key(spec)):
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
    if kind == "link down":
        yield from _judge_link(folder)
        return
    named = folder / f"rank.{stage}"
    pid = named.read_text() if named.exists() else "?"
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
        if len(re.findall(f"(?m)^{header}$", output)) != 1:
            yield "does not name stage, batch and action once"
    elif "SIGKILL" not in output and f"{who} is gone" not in output:
        yield "does not say who was killed"


def _judge_restart(spec: dict[str, Any], output: str) -> Iterator[str]:
    """The first life ended for one reason, which is said."""
    if spec["launcher"] == "torchrun":
        if output.count("SIGKILL") + output.count("is gone: ") + output.count("exitcode: -9") == 0:
            yield "does not say who was killed"
        return
    if output.count("stalewise: starting again, 1 of 1") != 1:
        yield "did not start again once"
    header = rf"stalewise: stage {spec['stage']} \(rank {spec['stage']}, host \S+, pid \d+\) was killed by SIGKILL\."
    if len(re.findall(header, output)) != 1:
        yield "does not say once who was killed"


def _judge_link(folder: Path) -> Iterator[str]:
    """Each host sees the other fall silent: it names a stage of the other, or one that waits for it, and when."""
    for host in ("host-a", "host-b"):
        text = (folder / host).read_text()
        causes = re.findall(r"(stage \d \(rank \d, host \S+, pid \d+\)) failed(?:, batch \d+)?(?:, [a-z ]+)?:", text)
        if len(set(causes)) != 1 or "ReceiveTimeout: " not in text:
            yield f"does not show one cause on {host}: {causes}"
        if not re.search(r"batch \d+|evaluation|session", text):
            yield f"does not name a batch on {host}"


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
