"""The store in which the ranks of a job meet, where stalewise hosts it: not on interfaces that nobody needs."""

from __future__ import annotations

import ipaddress
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["host_store"]

BACKLOG = 128


def host_store(host: str, port: int, timeout: timedelta, **options: Any) -> TCPStore:
    """Host a store; on the loopback interface alone where `host` is an address or name of it.

    torch by itself listens on all interfaces, whatever the host.

    Args:
        host: by which ranks reach it.
        port: 0 for any that is free; see `TCPStore.port`.
        timeout: of what is asked of it.
        options: further ones of `TCPStore`.

    Raises:
        RuntimeError: where the port is taken.
    """
    listening = _listen_on_loopback(host, port)
    if listening is not None:
        port = listening.getsockname()[1]
        options["master_listen_fd"] = listening.detach()  # the store closes it
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, **options)


def _listen_on_loopback(host: str, port: int) -> socket.socket | None:
    """None where the host is another interface, or the port cannot be had: torch may host a store there already."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not ipaddress.ip_address(address[0]).is_loopback:
            return None
        listening = socket.socket(family)
    except OSError:
        return None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        return None
    return listening
