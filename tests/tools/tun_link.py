r"""A link between two network namespaces in user space: a TUN device in each, and this process between them.

    python -m tools.tun_link \
        '{"namespaces": ["/proc/7/ns/net", "/proc/9/ns/net"], "device": "link0", "shape": {"delay_s": 0.02}}'

It prints "ready" once both devices exist. Each line of its input is a command: "down", "up", "counts", or a new shape
as JSON; each is answered by a line with the packets of both directions so far, as JSON. It ends, and the devices with
it, when its input ends.
Needs root on Linux; knows nothing but Python's own library.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import struct
import sys
import time
from contextlib import suppress

from tools.shaping import Direction, Shape

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
PACKETS_AT_ONCE = 64
"""Taken from one device before the other gets its turn."""

LARGEST_PACKET_BYTES = 1 << 16


def open_device(namespace: str, name: str) -> int:
    """A new TUN device in a network namespace; it lives as long as the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    entered = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    if libc.setns(entered, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    os.close(entered)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


class Link:
    """Carries packets between two devices.

    Args:
        devices: of the two ends.
        shape: of both directions.
    """

    def __init__(self, devices: tuple[int, int], shape: Shape) -> None:
        self._devices = devices
        self.directions = (Direction(shape, "there"), Direction(shape, "back"))

    def take(self, end: int) -> None:
        """What this end has to send."""
        with suppress(BlockingIOError):
            for _ in range(PACKETS_AT_ONCE):
                packet = os.read(self._devices[end], LARGEST_PACKET_BYTES)
                self.directions[end].offer(packet, time.monotonic_ns())

    def deliver(self) -> float | None:
        """Hand over what has arrived; seconds until the next packet does, None where none is on its way."""
        for end, direction in enumerate(self.directions):
            for packet in direction.due(time.monotonic_ns()):
                with suppress(OSError):  # the device is not up: a packet more that is lost
                    os.write(self._devices[1 - end], packet)
        times = [direction.next_ns for direction in self.directions if direction.next_ns is not None]
        return max(0, min(times) - time.monotonic_ns()) / 1e9 if times else None

    def obey(self, command: str) -> str:
        """Do what a line says; the answer."""
        if command in ("down", "up"):
            for direction in self.directions:
                direction.switch(command == "up")
        elif command.startswith("{"):
            for direction in self.directions:
                direction.reshape(Shape(**json.loads(command)))
        elif command != "counts":
            return json.dumps({"error": f"no command is called {command!r}; there are down, up, counts and shapes"})
        return json.dumps([direction.counts.as_json() for direction in self.directions])

    def run(self) -> None:
        """Until the input ends."""
        commands = b""
        while True:
            ready, _, _ = select.select([*self._devices, 0], [], [], self.deliver())
            for end, device in enumerate(self._devices):
                if device in ready:
                    self.take(end)
            if 0 in ready:
                data = os.read(0, 1024)
                if not data:
                    return
                *lines, commands = (commands + data).split(b"\n")
                for line in lines:
                    print(self.obey(line.decode()), flush=True)


def main() -> None:
    settings = json.loads(sys.argv[1])
    here, there = (open_device(namespace, settings["device"]) for namespace in settings["namespaces"])
    link = Link((here, there), Shape(**settings["shape"]))
    print("ready", flush=True)
    link.run()


if __name__ == "__main__":
    main()
