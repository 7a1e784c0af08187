"""Where a store that stalewise hosts listens."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from stalewise.runtime.store import host_store

TIMEOUT = timedelta(seconds=10)


def addresses(port: int) -> set[str]:
    """At which something listens on this port (Linux)."""
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()]
    return {fields[1].split(":")[0] for fields in lines if fields[1].endswith(f":{port:04X}") and fields[3] == "0A"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_only_the_loopback_interface(host: str) -> None:
    store = host_store(host, 0, TIMEOUT)
    assert addresses(store.port) <= {"0100007F", "00000000000000000000000001000000"}
    other = TCPStore(host, store.port, is_master=False, timeout=TIMEOUT)
    other.set("name", "value")
    assert store.get("name") == b"value"


def test_all_interfaces_where_ranks_come_from_other_hosts() -> None:
    store = host_store("0.0.0.0", 0, TIMEOUT)
    assert addresses(store.port) & {"00000000", "0" * 32}


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError):
            host_store("127.0.0.1", taken.getsockname()[1], TIMEOUT)
