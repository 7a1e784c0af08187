"""Makes the actions of slow steps take longer; see `protocol.stragglers`.

    |-- action: t --|-- busy: (factor - 1) t --|          both are the action's time in the trace

The additional time is measured against the action's own, so a step that is slow by 50% is so on any machine. To be busy
is to multiply matrices that nobody uses: a loop in Python would hold back the threads that send and receive.
"""

from __future__ import annotations

import time

import torch

from stalewise.protocol.stragglers import Slowing, Stragglers

__all__ = ["Brake"]

_CPU_SIZE = 96
_CUDA_SIZE = 1024


class Brake:
    """Slows one stage.

    Args:
        stragglers: of the run.
        stage: index of the stage.
        device: on which it computes. On a GPU the brake waits for every action's kernels, so as to know their time.
    """

    def __init__(self, stragglers: Stragglers, stage: int, device: torch.device) -> None:
        self._stragglers = stragglers
        self._stage = stage
        self._device = device
        self._update = -1
        self._slowing: Slowing | None = None
        self._spare_ns = 0
        size = _CUDA_SIZE if device.type == "cuda" else _CPU_SIZE
        self._matrix = torch.full((size, size), 1.0 / size, device=device)
        self._product = torch.empty_like(self._matrix)

    def hold(self, update: int, start_ns: int) -> None:
        """Let the action that has just ended take longer, if its step is slow.

        Args:
            update: local update that the action belongs to.
            start_ns: when it began, on `time.perf_counter_ns`.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elapsed_ns = time.perf_counter_ns() - start_ns
        if update != self._update:
            self._update, self._slowing = update, self._stragglers.slowing(self._stage, update)
            if self._slowing is not None and self._slowing.pause_s:
                time.sleep(self._slowing.pause_s)
        if self._slowing is None:
            return
        if self._slowing.sleep:
            time.sleep(self._slowing.sleep * elapsed_ns / 1e9)
        if self._slowing.busy:
            self._compute(round(self._slowing.busy * elapsed_ns))

    def _compute(self, duration_ns: int) -> None:
        """Be busy so long; what the last product takes beyond it counts for the next time."""
        end = time.perf_counter_ns() + duration_ns - self._spare_ns
        with torch.no_grad():
            while (now := time.perf_counter_ns()) < end:
                torch.mm(self._matrix, self._matrix, out=self._product)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
        self._spare_ns = now - end
