"""A job to whose ports others come while it trains: garbage, oversized lengths, ranks of other jobs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dist_net
import torch

BATCHES = 12
ATTACKED_BATCH = 5
STORE_MAGIC = 0x3C85F7CE
"""With which torch's store wants to be greeted; what comes after it is read as a request."""

MESSAGES = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"",
    bytes(64),
    b"\xff" * 4096,
    b"\x00" + STORE_MAGIC.to_bytes(4, "little") + b"\x01" + (1 << 62).to_bytes(8, "little") + b"x" * 64,
    b"\x00" + STORE_MAGIC.to_bytes(4, "little") + b"\xfe" * 64,
    b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x08touch bad\x85R.",
)
"""The last one is a pickle that would leave a file."""

RANKS = {
    "the same rank again": {},
    "a rank of a smaller job": {"WORLD_SIZE": "2"},
    "a rank of a larger job": {"RANK": "5", "WORLD_SIZE": "8"},
}
ANOTHER_RANK = "from stalewise.runtime.job import current_job; current_job(start_timeout_s=60)"


def listening() -> list[tuple[str, int]]:
    """Addresses and ports at which the processes of this session listen (Linux)."""
    inodes = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == os.getsid(0):
                inodes |= {os.readlink(file) for file in (folder / "fd").iterdir()}
        except OSError:  # it has ended
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in inodes:
                address, port = local.split(":")
                found.append((address, int(port, 16)))
    return found


def knock(ports: list[int]) -> list[socket.socket]:
    """Say all `MESSAGES` at each port; the connections stay open."""
    connections = []
    for port in ports:
        for message in MESSAGES:
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            connection.sendall(message)
            connections.append(connection)
    return connections


def come_as_ranks() -> dict[str, dict[str, Any]]:
    """Processes that take themselves for ranks of the job at this store; how each of them ends."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", ANOTHER_RANK],
            env={**os.environ, "RANK": "1", **changes},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, changes in RANKS.items()
    }
    outputs = {name: process.communicate()[0] for name, process in processes.items()}
    return {name: {"code": processes[name].returncode, "output": output} for name, output in outputs.items()}


def attacked(folder: Path) -> Iterator[Any]:
    """Batches; before one of them all others come, and some stay until the end."""
    connections: list[socket.socket] = []
    for index, batch in enumerate(dist_net.batches(BATCHES, 21)):
        if index == ATTACKED_BATCH:
            found = listening()
            connections = knock([port for _, port in found])
            (folder / "attack.json").write_text(json.dumps({"listening": found, "ranks": come_as_ranks()}))
        yield batch
    for connection in connections:
        connection.close()


def train(folder: str) -> None:
    """What every rank does."""
    torch.set_num_threads(1)
    os.chdir(folder)
    pipe = dist_net.pipeline(3)
    losses = list(pipe.train(attacked(Path(folder)) if pipe.rank == 0 else None))
    result = {"losses": losses, "state": pipe.state_dict(), "optimizer": pipe.optimizer_state_dict()}
    torch.save(result, Path(folder, f"result.{pipe.rank}.pt"))


def alone() -> dict[str, Any]:
    """What one process that nobody disturbs comes to."""
    pipe = dist_net.pipeline(3, engine="sequential")
    losses = list(pipe.train(dist_net.batches(BATCHES, 21)))
    return {"losses": losses, "state": pipe.state_dict(), "optimizer": pipe.optimizer_state_dict()}
