"""What both engines share: how a run is made of local steps.

    train(batches)            cycle: since the last drain                   drain
    ──────────────────────────────────────────────────────────────────────────────────────
    another batch?  ─ yes ─►  local step n with all slots  ─► losses of batch n - m_0  ─┐
         │          ◄───────────────────────────────────────────────────────────────────┘
         └ no ─► pause: the batches in flight stay, the next train goes on with step n
              └► drain: the last m_0 steps with the backward slots alone; then n counts anew

A run can be saved after any step, and goes on in another process after that step (`snapshot`, `restore`); one that was
saved within a drain drains to the end first.

Every stage pauses after the same local step, and every rank yields the loss of batch n - m_0 after local step n: so
losses come in the same order, and at the same step, everywhere.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stalewise.engine.memory import StageUsage
from stalewise.engine.stage import Metric, Stage
from stalewise.engine.tree import Tree
from stalewise.errors import ConfigError
from stalewise.protocol.course import Orders
from stalewise.protocol.program import Program
from stalewise.protocol.trace import Trace

__all__ = ["Batches", "Cut", "Engine", "TakeSnapshot"]

Batches = Iterable[tuple[Tree, Tree]]
"""(input, target) per batch."""

StateDict = Mapping[str, Tensor]

TakeSnapshot = Callable[[int, dict[str, Any]], Callable[[dict[str, Any]], None]]
"""(stage, its state) -> (what lay on the links to it) -> None. The first call copies the state at once; the second
one comes as soon as the last message is known, which may be some steps later."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a run stands between two local steps; the same on every rank.

    Args:
        first_batch: global index of the first batch since the last drain.
        entered: batches since then.
        steps: local steps since then; more than `entered` within a drain.
        session_batches: batches taken from the iterable of the session that is open; None between sessions.
        gradient_differences: measured so far.
    """

    first_batch: int
    entered: int
    steps: int
    session_batches: int | None
    gradient_differences: list[tuple[int, list[float | None]]]

    @property
    def num_batches(self) -> int:
        """Batches that entered the pipeline: the next one's global index."""
        return self.first_batch + self.entered


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
        self._session_batches: int | None = None
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
        if self._is_draining:
            steps = itertools.chain(self._run((), True), steps)
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

    def cut(self) -> Cut:
        """Where the run stands."""
        return Cut(
            first_batch=self._first_batch,
            entered=self._entered,
            steps=self._steps,
            session_batches=self._session_batches,
            gradient_differences=list(self.gradient_differences),
        )

    def snapshot(self, take: TakeSnapshot) -> Cut:
        """Take a snapshot of every stage that this engine holds, between two of its local steps.

        Returns:
            Where they stand.

        Raises:
            ConfigError: where a step failed before.
        """
        if self._failed:
            self._check_usable()
        cut = self.cut()
        self._snapshot(take)
        return cut

    def restore(self, cut: Cut, stages: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on where another engine, of this program and these stages, stood.

        Args:
            cut: of that engine.
            stages: snapshots of the stages that this engine holds, which did nothing yet; see `check`.
        """
        self._failed = True
        self._restore(cut, stages)
        self._first_batch, self._entered, self._steps = cut.first_batch, cut.entered, cut.steps
        self.gradient_differences[:] = cut.gradient_differences
        self._failed = False

    def continue_after(self, num_batches: int) -> None:
        """Count on from so many batches, which other engines trained on."""
        self._first_batch = num_batches

    @property
    @abc.abstractmethod
    def held_stages(self) -> Sequence[Stage]:
        """The stages that this engine holds."""

    @property
    def has_begun(self) -> bool:
        """Whether a batch entered the pipeline."""
        return self.num_batches > 0

    @property
    def _is_draining(self) -> bool:
        return self._steps > self._entered

    def _run(self, batches: Batches | None, drain: bool) -> Iterator[list[Tensor]]:
        self._open(batches, drain)
        self._session_batches = 0
        while self._another_batch():
            losses = self._complete_step(None)
            self._entered += 1
            self._session_batches += 1
            yield losses
        self._session_batches = None
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
    def _snapshot(self, take: TakeSnapshot) -> None:
        """See `snapshot`."""

    @abc.abstractmethod
    def complete_snapshots(self) -> None:
        """Wait until snapshots that were taken have all messages that belong to them."""

    @abc.abstractmethod
    def check(self, stages: Mapping[int, Mapping[str, Any]]) -> None:
        """Make sure that snapshots are of the stages that this engine holds.

        Raises:
            CheckpointError: naming the first difference.
        """

    @abc.abstractmethod
    def _restore(self, cut: Cut, stages: Mapping[int, Mapping[str, Any]]) -> None:
        """See `restore`."""

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
    def orders(self) -> Orders:
        """What each stage of an elastic program chose, cycle by cycle; nothing where the program is fixed."""

    @abc.abstractmethod
    def statuses(self) -> list[dict[str, Any]]:
        """How each stage is doing (see `Interpreter.status`), where this process knows it."""
