"""Real packets of real processes over the link; skipped where the system does not allow it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dist_jobs import wait_until_gone
from tools.shaping import Direction, Shape
from tools.two_hosts import ADDRESSES, HOSTS, Host, TwoHosts, why_not

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

LIMIT_S = 60.0
TESTS = Path(__file__).parents[1]


def run(hosts: TwoHosts, host: Host, program: str) -> str:
    """What a Python program on a host prints."""
    process = hosts.start(host, [sys.executable, "-c", f"import socket, time\n{program}"], output=subprocess.PIPE)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output.decode()
    return output.decode()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


def send(hosts: TwoHosts, texts: list[str]) -> None:
    """Datagrams from host-a to host-b."""
    run(
        hosts,
        "host-a",
        "link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"for text in {texts!r}: link.sendto(text.encode(), ('host-b', 7000))",
    )


def receive(hosts: TwoHosts, count: int) -> Callable[[], list[str]]:
    """Takes datagrams on host-b from now on; the result waits for so many."""
    program = (
        "import socket\nlink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nlink.bind(('', 7000))\n"
        f"link.settimeout({LIMIT_S})\nprint('bound', flush=True)\n"
        f"for _ in range({count}): print(link.recv(99).decode(), flush=True)"
    )
    process = hosts.start("host-b", [sys.executable, "-c", program], output=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"bound\n"

    def received() -> list[str]:
        output, _ = process.communicate(timeout=2 * LIMIT_S)
        return output.decode().split()

    return received


def test_names_and_delay() -> None:
    """A round trip takes two delays or more; each host has its name, and knows the other's address."""
    with TwoHosts(Shape(delay_s=0.05)) as hosts:
        for host in HOSTS:
            own, other = run(
                hosts, host, "print(socket.gethostname(), *map(socket.gethostbyname, ('host-a', 'host-b')))"
            ).split(maxsplit=1)
            assert (own, other.split()) == (host, list(ADDRESSES.values()))
        # nobody listens there, and the answer that says so has come over the link
        text = run(
            hosts,
            "host-a",
            "start = time.monotonic()\ntry: socket.create_connection(('host-b', 7000))\n"
            "except ConnectionRefusedError: print(time.monotonic() - start)",
        )
        assert float(text) >= 0.1
    assert socket.gethostname() not in HOSTS


def test_rate() -> None:
    """1 MB over 16 Mbit/s takes half a second or more."""
    server = (
        "import socket\nserver = socket.create_server(('', 7000))\nprint('up', flush=True)\nlink, _ = server.accept()\n"
        "size = 0\nwhile data := link.recv(1 << 20): size += len(data)\nlink.sendall(str(size).encode())"
    )
    with TwoHosts(Shape(rate_bits_per_s=16e6, mtu_bytes=9000)) as hosts:
        process = hosts.start("host-b", [sys.executable, "-c", server], output=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        text = run(
            hosts,
            "host-a",
            "link = socket.create_connection(('host-b', 7000))\nstart = time.monotonic()\n"
            "link.sendall(bytes(1000000)); link.shutdown(1)\nsize = int(link.recv(99))\n"
            "print(size, time.monotonic() - start)",
        )
        assert process.wait(LIMIT_S) == 0
        process.stdout.close()
    size, seconds = text.split()
    assert int(size) == 1_000_000
    assert float(seconds) >= 0.5


def test_loss_by_seed() -> None:
    """Those datagrams get lost that the seed chooses, and no others."""
    shape = Shape(loss=0.3, seed=5)
    texts = [str(index) for index in range(60)]
    alone = Direction(shape, "there")
    for text in texts:
        alone.offer(text.encode(), 0)
    expected = [packet.decode() for packet in alone.due(0)]
    with TwoHosts(shape) as hosts:
        received = receive(hosts, len(expected))
        send(hosts, texts)
        assert received() == expected
        there, _ = hosts.counts()
    assert there == {"delivered": len(expected), "lost": 60 - len(expected), "overflowed": 0, "cut": 0}
    assert 30 < len(expected) < 54


def test_down_and_up() -> None:
    with TwoHosts(Shape()) as hosts:
        received = receive(hosts, 2)
        send(hosts, ["before"])
        wait_for(lambda: hosts.counts()[0]["delivered"] == 1)
        hosts.down()
        send(hosts, ["while it is down"])
        wait_for(lambda: hosts.counts()[0]["cut"] == 1)
        hosts.up()
        send(hosts, ["after"])
        assert received() == ["before", "after"]


SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(1000)"]


def leave_by_an_error() -> list[int]:
    """Processes that were on host-b when an error ended the block."""
    start_another = f"import subprocess, time; subprocess.Popen({SLEEP!r}); time.sleep(1000)"
    with contextlib.suppress(ZeroDivisionError), TwoHosts(Shape()) as hosts:
        sleeper = hosts.start("host-b", [sys.executable, "-c", start_another], output=subprocess.PIPE)
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == b"here\n"
        pids = hosts.processes("host-b")
        assert hosts.processes("host-a") == []
        raise ZeroDivisionError
    assert sleeper.wait(LIMIT_S) != 0
    sleeper.stdout.close()
    return pids


def test_nothing_is_left() -> None:
    """Also where the block ends by an error, and where a process on a host has children."""
    pids = leave_by_an_error()
    assert len(pids) == 2
    assert wait_until_gone(pids, LIMIT_S) == []
    assert "link0" not in {name for _, name in socket.if_nameindex()}


def test_nothing_is_left_of_a_killed_parent() -> None:
    program = f"""
import json, os, pathlib, subprocess
from tools.two_hosts import HOSTS, TwoHosts
from tools.shaping import Shape
with TwoHosts(Shape()) as hosts:
    for host in HOSTS:
        hosts.start(host, {SLEEP!r}, output=subprocess.PIPE).stdout.readline()
    own = pathlib.Path(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read_text().split()
    print(json.dumps([*map(int, own), *(pid for host in HOSTS for pid in hosts.processes(host))]), flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS, stdout=subprocess.PIPE, timeout=LIMIT_S)
    assert done.returncode == -signal.SIGKILL
    pids = json.loads(done.stdout)
    assert len(pids) >= 5, "two first processes, the link, and what was started"
    left = wait_until_gone(pids, LIMIT_S)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_an_unknown_command() -> None:
    with TwoHosts(Shape()) as hosts:
        assert hosts._ask("sideways") == {
            "error": "no command is called 'sideways'; there are down, up, counts and shapes"
        }
