"""What both engines share: how a run is made of local steps.

    train(batches)            cycle: since the last drain                   drain
    ──────────────────────────────────────────────────────────────────────────────────────
    another batch?  ─ yes ─►  local step n with all slots  ─► losses of batch n - m_0  ─┐
         │          ◄───────────────────────────────────────────────────────────────────┘
         └ no ─► pause: the batches in flight stay, the next train goes on with step n
              └► drain: the last m_0 steps with the backward slots alone; then n counts anew

Every stage pauses after the same local step, and every rank yields the loss of batch n - m_0 after local step n: so
losses come in the same order, and at the same step, everywhere.
"""

from __future__ import annotations

import abc
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from stalewise.engine.memory import StageUsage
from stalewise.engine.stage import Metric
from stalewise.engine.tree import Tree
from stalewise.errors import ConfigError
from stalewise.protocol.program import Program
from stalewise.protocol.trace import Trace

__all__ = ["Batches", "Engine"]

Batches = Iterable[tuple[Tree, Tree]]
"""(input, target) per batch."""

StateDict = Mapping[str, Tensor]


class Engine(abc.ABC):
    """Runs a program.

    Args:
        program: of the method.
        gradient_difference_every: batches between measurements of `gradient_probe`; None: never.

    Attributes:
        gradient_differences: (global index of a batch, difference per stage) of each measurement.
    """

    def __init__(self, program: Program, *, gradient_difference_every: int | None = None) -> None:
        self.program = program
        self.gradient_differences: list[tuple[int, list[float | None]]] = []
        self._gradient_difference_every = gradient_difference_every
        self._loss_lag = program.loss_lag
        self._backward_lag = max(stage.backward_lag for stage in program.stages)
        self._drain_steps = program.drain_steps
        self._first_batch = 0
        self._entered = 0
        self._steps = 0
        self._leaving = False
        self._running = False
        self._failed = False

    @property
    def batches_in_flight(self) -> int:
        """Batches forwarded by the first stage that not every stage has backwarded."""
        return self._entered - max(0, self._steps - self._drain_steps)

    @property
    def num_batches(self) -> int:
        """Batches that entered the pipeline so far, over all cycles: the next one's global index."""
        return self._first_batch + self._entered

    def train(self, batches: Batches | None, *, drain: bool) -> Generator[Tensor, None, None]:
        """Train on `batches` and yield their losses; see `Pipeline.train`."""
        self._check_usable()
        self._leaving = False
        self._running = True
        steps = self._run(batches, drain)
        try:
            for losses in steps:
                yield from losses
        except GeneratorExit:
            self._leaving = True
            for _ in steps:
                pass
            raise
        finally:
            self._running = False

    def drain(self) -> Iterator[Tensor]:
        """Backward the batches in flight and yield their losses."""
        yield from self.train((), drain=True)

    def evaluate(self, batches: Batches | None, metric: Metric) -> float:
        """The mean of `metric` over the samples of `batches`; see `Pipeline.evaluate`."""
        self._check_usable()
        if self.batches_in_flight:
            raise ConfigError(
                f"{self.batches_in_flight} batches are in flight; evaluate sees the weights only after their "
                "updates. Call drain() and take its losses first, or train(..., drain=True)."
            )
        return self._evaluate(batches, metric)

    def _run(self, batches: Batches | None, drain: bool) -> Iterator[list[Tensor]]:
        self._open(batches, drain)
        while self._another_batch():
            losses = self._complete_step(None)
            self._entered += 1
            yield losses
        if self._close():
            while self.batches_in_flight:
                yield self._complete_step(self._entered)
            self._first_batch += self._entered
            self._entered = self._steps = 0
        self._finish()

    def _complete_step(self, num_batches: int | None) -> list[Tensor]:
        step = self._steps
        try:
            self._execute_step(step, num_batches)
        except BaseException:
            self._failed = True
            raise
        self._steps += 1
        self._measure_gradients(step - self._backward_lag, num_batches)
        return self._losses_until(self._first_batch + step - self._loss_lag)

    def _measure_gradients(self, batch: int, num_batches: int | None) -> None:
        """Measure batch `batch` of this cycle, which every stage has just backwarded, where that is due."""
        every = self._gradient_difference_every
        index = self._first_batch + batch
        exists = batch >= 0 and (num_batches is None or batch < num_batches)
        if every is not None and exists and index % every == 0:
            self.gradient_differences.append((index, self._gradient_difference(index)))

    def _check_usable(self) -> None:
        if self._failed:
            raise ConfigError(
                "this pipeline failed within a step, so its stages no longer stand at the same batch. Build a new "
                "one and load the weights that you saved."
            )
        if self._running:
            raise ConfigError(
                "this pipeline is training already; finish or leave the loop over train() before the next call."
            )

    @abc.abstractmethod
    def _open(self, batches: Batches | None, drain: bool) -> None:
        """Begin to take batches."""

    @abc.abstractmethod
    def _another_batch(self) -> bool:
        """Whether batch `self.num_batches` exists; waits until that is known."""

    @abc.abstractmethod
    def _close(self) -> bool:
        """All batches were taken; returns whether the pipeline is to be drained."""

    @abc.abstractmethod
    def _finish(self) -> None:
        """The session is over: every message of it is handed on."""

    @abc.abstractmethod
    def _execute_step(self, step: int, num_batches: int | None) -> None:
        """Execute one local step of the stages that this engine holds."""

    @abc.abstractmethod
    def _losses_until(self, batch: int) -> list[Tensor]:
        """Losses not yet given, of the batches up to global index `batch`, in order."""

    @abc.abstractmethod
    def _gradient_difference(self, batch: int) -> list[float | None]:
        """The difference of each stage, measured now for a batch that every stage has backwarded."""

    @abc.abstractmethod
    def _evaluate(self, batches: Batches | None, metric: Metric) -> float:
        """Pipelined forward of all batches on a drained pipeline."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU of all stages' parameters and buffers, in the order of the stages."""

    @abc.abstractmethod
    def load_state_dict(self, state: StateDict) -> None:
        """Copy values, by name, into the stages that this engine holds."""

    @abc.abstractmethod
    def optimizer_state_dict(self) -> dict[str, Any]:
        """State and parameter groups of all stages' optimizers, by parameter name."""

    @abc.abstractmethod
    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `optimizer_state_dict`."""

    @property
    @abc.abstractmethod
    def learning_rate(self) -> float | None:
        """Of the first stage that this engine holds and that has an optimizer."""

    @abc.abstractmethod
    def traces(self) -> list[Trace]:
        """The records of all stages."""

    @abc.abstractmethod
    def usages(self) -> list[StageUsage]:
        """Memory and traffic of all stages so far."""

    @abc.abstractmethod
    def statuses(self) -> list[dict[str, Any]]:
        """How each stage is doing (see `Interpreter.status`), where this process knows it."""
