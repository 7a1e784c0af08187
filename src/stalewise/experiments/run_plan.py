"""A plan for a run with what it is predicted to do, beside what a user might do instead."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stalewise.experiments.profiling import ModelProfile
from stalewise.methods import Method
from stalewise.plan.auto_depth import jitter_of_passes, plan_links, plan_times, plan_with_depth
from stalewise.plan.depth import Jitter
from stalewise.plan.planner import Link, Plan
from stalewise.timing import StepCosts, TimedProgram

__all__ = ["PlannedRun", "plan_run", "predict_step"]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A plan and its predictions; times in seconds per batch.

    Args:
        plan: cuts and activations.
        profile: that it was made from.
        step_s: predicted for the steady state: the maximum cycle mean of the program with the measured times.
        pace: who sets it, in words.
        one_process_s: of the unsplit model in one process with all cores.
        data_parallel_s: of K processes with a K-th of the batch each, all-reduce included; None where it cannot be.
    """

    plan: Plan
    profile: ModelProfile
    step_s: float
    pace: str
    one_process_s: float
    data_parallel_s: float | None

    @property
    def utilisation(self) -> tuple[float, ...]:
        """Part of a step that each stage computes."""
        return tuple((busy or 0.0) / self.step_s if self.step_s else 1.0 for busy in self.plan.stage_s)

    @property
    def alternatives(self) -> tuple[tuple[str, float], ...]:
        """What else there is, in words, with its time."""
        found = [(f"one process with {_count(os.cpu_count() or 1, 'thread')}", self.one_process_s)]
        if self.data_parallel_s is not None:
            found.append((f"data parallelism over {_count(self._num_stages, 'process')}", self.data_parallel_s))
        return tuple(found)

    def advice(self) -> list[str]:
        """How the alternatives compare, a sentence each."""
        lines = []
        for name, seconds in self.alternatives:
            ratio = self.step_s / seconds if seconds else math.inf
            than = f"{ratio:.2f}x faster than this plan" if ratio > 1 else f"{1 / ratio:.2f}x slower than this plan"
            lines.append(f"{name}: {1e3 * seconds:.1f} ms a batch, {than}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        plan = self.plan
        kept = plan.activations
        return {
            "method": repr(plan.method),
            "cuts": list(plan.partition.cuts),
            "activations": list(kept),
            "step_s": self.step_s,
            "samples_per_s": self.profile.batch_size / self.step_s if self.step_s else None,
            "pace": self.pace,
            "staleness": None if plan.depth is None else plan.depth.as_dict(),
            "memory_limit": plan.memory_limit,
            "link": {"bytes_per_s": _finite(plan.link.bytes_per_s), "latency_s": plan.link.latency_s},
            "one_process_s": self.one_process_s,
            "data_parallel_s": self.data_parallel_s,
            "stages": [
                {
                    "stage": index,
                    "layers": [cost.start, cost.end],
                    "parameters": cost.parameters,
                    "activations": kept[index],
                    "slowdown": plan.slowdowns[index],
                    "forward_s": cost.forward_s,
                    "recompute_s": cost.recompute_s,
                    "backward_s": cost.backward_s,
                    "busy_s": plan.stage_s[index],
                    "utilisation": self.utilisation[index],
                    "memory": None if plan.memory is None else plan.memory[index].as_dict(),
                }
                for index, cost in enumerate(plan.partition.stages)
            ],
        }

    @property
    def _num_stages(self) -> int:
        return self.plan.partition.num_stages


def plan_run(
    profile: ModelProfile,
    method: Method,
    *,
    memory_limit: int | None = None,
    link: Link | None = None,
    slowdowns: Sequence[float] | None = None,
    cuts: Sequence[int] | None = None,
    jitter: Jitter | None = None,
) -> PlannedRun:
    """The fastest plan, and what it is predicted to do.

    Args:
        profile: of the model and the devices.
        method: of as many stages as the profile had processes.
        memory_limit: see `plan_stages`.
        link: instead of the measured one.
        slowdowns: instead of the measured ones.
        cuts: instead of the best ones.
        jitter: of the stages, instead of what the profile's passes show; for a method that leaves its staleness open.

    Raises:
        PlanError: where nothing fits.
    """
    joined = link or Link(bytes_per_s=profile.link_bytes_per_s, latency_s=profile.link_latency_s)
    plan = plan_with_depth(
        profile.layers,
        method,
        lambda found: jitter or jitter_of_passes(profile.passes, found),
        target_bytes=profile.targets,
        batch=profile.batch,
        memory_limit=memory_limit,
        slowdowns=slowdowns or profile.slowdowns,
        link=joined,
        cuts=cuts,
    )
    step_s, pace = predict_step(plan, target_bytes=profile.targets)
    data_parallel_s = None
    if profile.data_parallel_s is not None:
        workers = plan.partition.num_stages
        gradients = sum(layer.gradient_bytes or 0 for layer in profile.layers)
        all_reduce_s = (
            2 * (workers - 1) / workers * gradients / joined.bytes_per_s + 2 * (workers - 1) * joined.latency_s
        )
        data_parallel_s = profile.data_parallel_s + all_reduce_s
    return PlannedRun(
        plan=plan,
        profile=profile,
        step_s=step_s,
        pace=pace,
        one_process_s=profile.one_process_s,
        data_parallel_s=data_parallel_s,
    )


def predict_step(plan: Plan, *, target_bytes: int = 0) -> tuple[float, str]:
    """Seconds per step in the steady state, exactly for the plan's times, and who sets the pace."""
    program = plan.method.program()
    timed = TimedProgram(program, StepCosts.of_kinds(program, plan_times(plan)), plan_links(plan, target_bytes))
    cycle = timed.cycle()
    return float(cycle.step_ns) / 1e9, timed.describe(cycle)


def _count(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
