"""Links as a user types them."""

from __future__ import annotations

import re

from stalewise.errors import ConfigError

__all__ = ["parse_bandwidth", "parse_seconds"]

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def parse_bandwidth(text: str) -> float:
    """Bytes per second: "1Gbit/s", "100Mbps", "2.5GB/s" (b is a bit, B a byte).

    Raises:
        ConfigError: where it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)(bit|b|B)(?:/s|ps)\s*", text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"the bandwidth {text!r} is none; give bits or bytes per second, such as 1Gbit/s or 2GB/s.")
    return float(match[1]) * _PREFIXES[match[2].lower()] / (1 if match[3] == "B" else 8)


def parse_seconds(text: str) -> float:
    """Seconds: "20ms", "0.5s", "50us".

    Raises:
        ConfigError: where it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|ms|us)\s*", text.lower())
    if match is None:
        raise ConfigError(f"{text!r} is no time; give seconds with their unit, such as 20ms.")
    return float(match[1]) * _SECONDS[match[2]]
