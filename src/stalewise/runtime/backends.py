"""Which backends this build of torch has."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["available_backends"]


def available_backends() -> list[str]:
    """Of "gloo" and "nccl", those that work here; empty where torch was built without torch.distributed."""
    if not dist.is_available():
        return []
    checks = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    return [name for name, is_available in checks.items() if is_available()]
