"""Two hosts on one machine, joined by a link of any speed, delay and loss.

    ┌─ host-a, 10.77.0.1 ─┐      ┌─ tun_link.py ─┐      ┌─ host-b, 10.77.0.2 ─┐
    │ processes     link0 │ ◄──► │ rate, delay,  │ ◄──► │ link0     processes │
    └─────────────────────┘      │ loss, down    │      └─────────────────────┘
                                 └───────────────┘

A host is a set of namespaces: network, host name, mounts (for /etc/hosts), and processes. The last makes the end sure:
its first process ends when its input does, whatever became of this process, and the kernel ends all others with it. The
devices are gone with the process that holds them. No IPv6: its own packets would move the losses that a seed chooses.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from tools.shaping import Shape

__all__ = ["ADDRESSES", "HOSTS", "TwoHosts", "why_not"]

Host = Literal["host-a", "host-b"]
HOSTS: tuple[Host, Host] = ("host-a", "host-b")
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
DEVICE = "link0"
DEVICE_QUEUE_PACKETS = 10_000
END_S = 10.0

_UNSHARE = ["unshare", "--net", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
_FIRST_PROCESS = """
echo {name} > /proc/sys/kernel/hostname &&
mount --bind {hosts_file} /etc/hosts &&
for file in /proc/sys/net/ipv6/conf/*/disable_ipv6; do [ ! -e $file ] || echo 1 > $file; done &&
ip link set lo up &&
echo ready && exec cat
"""


@cache
def why_not() -> str | None:
    """Why this machine cannot have two hosts; None where it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is missing or not ours to open"
    # Asked of the system alone: an error in the tools here must be an error, and no reason to skip.
    try:
        done = subprocess.run(
            [*_UNSHARE, "ip", "tuntap", "add", "dev", DEVICE, "mode", "tun"], capture_output=True, text=True, timeout=60
        )
    except OSError as error:
        return f"a program is missing: {error}"
    if done.returncode:
        return f"namespaces and TUN devices are not allowed here (they need root): {done.stderr.strip()}"
    return None


class TwoHosts:
    """Two hosts and a link, which exist within a `with` block.

    Args:
        shape: of the link.

    Raises:
        OSError: on entering, where a program (`unshare`, `nsenter`, `ip`) is missing.
        RuntimeError: on entering, where the system does not allow it.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._stack = contextlib.ExitStack()
        self._first: dict[str, int] = {}
        self._link: subprocess.Popen[str] | None = None

    def __enter__(self) -> TwoHosts:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            hosts_file = Path(folder, "hosts")
            lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
            hosts_file.write_text("\n".join(lines) + "\n")
            for name in HOSTS:
                script = _FIRST_PROCESS.format(name=name, hosts_file=hosts_file)
                process = stack.enter_context(_started([*_UNSHARE, "sh", "-c", script]))
                self._first[name] = _only_child(process.pid)
            settings = {
                "namespaces": [f"/proc/{self._first[name]}/ns/net" for name in HOSTS],
                "device": DEVICE,
                "shape": asdict(self._shape),
            }
            program = [sys.executable, "-m", "tools.tun_link", json.dumps(settings)]
            self._link = stack.enter_context(_started(program, folder=Path(__file__).parents[1]))
            for here, there in (HOSTS, HOSTS[::-1]):
                self._ip(here, "address", "add", ADDRESSES[here], "peer", ADDRESSES[there], "dev", DEVICE)
                self._ip(here, "link", "set", DEVICE, "mtu", str(self._shape.mtu_bytes))
                self._ip(here, "link", "set", DEVICE, "txqueuelen", str(DEVICE_QUEUE_PACKETS), "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(
        self,
        host: Host,
        command: Sequence[str],
        *,
        output: IO[Any] | int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program on a host; it is ended at the latest with the host.

        Args:
            host: where.
            command: program and arguments.
            output: gets what it prints, errors too; None: it goes where this process prints.
            environment: on top of this process's own.
        """
        return subprocess.Popen(
            [*self._enter(host), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )

    def processes(self, host: Host) -> list[int]:
        """Process ids, as this process sees them, of what lives on a host."""
        first = self._first[host]
        own = os.readlink(f"/proc/{first}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if os.readlink(folder / "ns/pid") == own and int(folder.name) != first and state != "Z":
                    found.append(int(folder.name))
        return found

    def down(self) -> None:
        """Lose all packets from now on, those on their way too. The devices stay up: no end is told."""
        self._ask("down")

    def up(self) -> None:
        """Carry packets again."""
        self._ask("up")

    def reshape(self, shape: Shape) -> None:
        """Another delay, rate, loss and queue from now on; the devices keep their largest packet."""
        self._ask(json.dumps(asdict(shape)))

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Packets from host-a to host-b, and back: see `shaping.Counts`."""
        there, back = self._ask("counts")
        return there, back

    def _ask(self, command: str) -> Any:
        assert self._link is not None
        assert self._link.stdin is not None
        assert self._link.stdout is not None
        self._link.stdin.write(command + "\n")
        self._link.stdin.flush()
        return json.loads(self._link.stdout.readline())

    def _enter(self, host: Host) -> list[str]:
        return ["nsenter", "--target", str(self._first[host]), "--net", "--uts", "--pid", "--mount"]

    def _ip(self, host: Host, *arguments: str) -> None:
        done = subprocess.run([*self._enter(host), "ip", *arguments], capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def _started(command: Sequence[str], *, folder: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that says "ready" and ends when its input does, or is ended."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,  # Ctrl-C is for this process, which then ends them in order
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        if process.stdout.readline() != "ready\n":
            process.stdin.close()
            process.wait(END_S)
            raise RuntimeError(f"{command[0]}: {process.stderr.read().strip() or 'ended without a word'}")
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()


def _only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
