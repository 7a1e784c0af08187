"""The public interface: a model, a method, and the loops over batches."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stalewise._version import __version__
from stalewise.arguments import (
    check_compile,
    check_folder,
    check_functions,
    check_gradient_difference,
    check_numbers,
    check_precision,
    is_distributed,
    resolve_device,
)
from stalewise.checkpoint.batch_file import write_batch
from stalewise.checkpoint.writer import Attachment
from stalewise.engine.assemble import ParameterOptions, assemble_stage
from stalewise.engine.compiled import check_backend
from stalewise.engine.engine import Batches, Engine
from stalewise.engine.feed import iterate
from stalewise.engine.messages import Activation
from stalewise.engine.nonfinite import LossGuard, NonFinitePolicy, nonfinite_policy
from stalewise.engine.overlap import check_overlap
from stalewise.engine.precision import Precision
from stalewise.engine.sequential import SequentialEngine
from stalewise.engine.split import Chain, LayerSource
from stalewise.engine.stage import LossFunction, Metric, Stage
from stalewise.engine.tree import unflatten
from stalewise.errors import ConfigError, SaveError
from stalewise.methods import Method
from stalewise.plan.auto_depth import jitter_of_passes, plan_with_depth
from stalewise.plan.memory import StageMemory
from stalewise.plan.partition import LayerCost, Partition, check_cuts, fixed_partition
from stalewise.plan.planner import Plan
from stalewise.planning import JITTER_REPEATS, measure, optimizer_copies, parse_bytes, share_batch
from stalewise.protocol.course import Orders
from stalewise.protocol.program import StageProgram
from stalewise.protocol.stragglers import Straggler, Stragglers
from stalewise.protocol.trace import Trace
from stalewise.runtime.agreement import check_agreement
from stalewise.runtime.cores import warn_of_too_many_threads
from stalewise.runtime.distributed import DistributedEngine
from stalewise.runtime.exchange import all_gather_json, broadcast_json
from stalewise.runtime.job import current_job
from stalewise.runtime.patience import FIRST_S
from stalewise.runtime.payload import payload_groups
from stalewise.runtime.persistence import Persistence
from stalewise.runtime.resuming import ResumePoint

__all__ = ["Pipeline"]

EngineName = Literal["auto", "sequential", "distributed"]


class Pipeline:
    """Trains a model as a pipeline of stages with a method such as DSP.

    In a job of K processes (`stalewise.launch`, torchrun) rank k holds and runs stage k, and every method of this
    class is collective: all ranks call it. Elsewhere one process runs all stages one after another, with
    bitwise the same numbers (eager mode on the CPU, equal thread counts and cuts).

    Args:
        model: an `nn.Sequential`, or a list of modules that stands for `nn.Sequential(*list)`. An entry may be a
            function without arguments that builds the module; it is called only on the rank of its stage. Every
            rank builds the model; rank k's own values become stage k's. Plain `nn.Sequential`s inside are opened:
            their layers are layers of the model.
        method: what the stages do, such as `DSP.minimal(num_stages=3)`; it says how many stages there are.
        loss_fn: (output, target) -> the batch's mean loss as a scalar tensor; called on the last stage.
        optimizer: parameters (or parameter groups, see `param_groups`) -> a torch optimizer. Called once per stage
            that has trainable parameters, with these.
        lr_scheduler: optimizer -> scheduler, stepped once per update of its stage.
        partition: "profile" measures every layer with the first batch of the first `train` or `evaluate` (which is
            still trained), on all ranks at once, and finds the best split for their speeds; or the indices of the
            first layers of stages 1 .. K-1.
        memory_limit: bytes that a stage may hold, such as "2GiB"; a plan from a profile keeps to it. With
            `DSP(activations="auto")` the plan decides for each stage whether it recomputes or stores its graphs. It
            then calls `optimizer` once more, with a small parameter, to see how much state it keeps.
        engine: "auto" is "distributed" in a launched job and "sequential" elsewhere.
        device: "auto" is this rank's GPU (ranks share GPUs where there are fewer), else the CPU.
        seed: of the random layers; None: `torch.initial_seed()` of rank 0.
        clip_grad_norm: largest 2-norm of a stage's gradient; each stage clips its own.
        param_groups: (name, parameter) -> options of the optimizer, such as {"weight_decay": 0.0}; parameters with
            equal options form a group, in order of appearance. Names are those of the unsplit model.
        recv_timeout_s: how long a rank waits for one message of another, in seconds. None: 600 until it saw 20 local
            steps and one of the session, and in evaluations; then as long as 20 of the slowest steps so far, at least
            120; but 30 for a rank that shows no sign of life (its process is stopped, or its host is gone).
        start_timeout_s: how long a rank waits for the others to start, in seconds.
        gradient_difference_every: measure ||grad_BP - G|| / ||grad_BP|| of every stage each so many batches (see
            `gradient_differences`); None: never. It changes no number of the run.
        measure_memory: measure what every stage holds (see `memory`). It changes no number of the run; layers inside
            which torch forbids saved-tensor hooks (`torch.func.grad`, for example) cannot be measured.
        verbose: whether rank 0 prints the partition that a profile found.
        autocast: "bfloat16" computes forward, recompute and loss under torch's autocast, in `evaluate`, too; weights
            stay in float32. What crosses a cut may then be bfloat16, half as many bytes.
        compile: compile the layers of each stage with `torch.compile`: True (inductor), or the name of a backend.
            The first steps take long. Numbers are those of eager mode up to rounding, and the same on both engines. A
            profile still times layers in eager mode. Not with stored graphs that are backwarded with current weights.
        overlap: queue the forward of one batch beside the recompute and backward of another, where a stage recomputes
            and has a process of its own on a GPU; None: wherever that can be. It changes no number of the run.
        replay: the order of an elastic run (`orders` of that pipeline), which is repeated bitwise, on one process or
            many, with the same batches and drains; None: elastic stages decide by themselves.
        stragglers: make steps slow on purpose, to see what it costs; the same steps whatever the method. It changes no
            number of the run.
        nonfinite_loss: what becomes of a batch whose loss is NaN or infinite. "stop": no stage updates with it, and
            `train` raises where its loss is due. "skip": no stage updates with it (nor moves its optimizer or
            scheduler for it), its loss is yielded, and a pass that would make running statistics NaN or infinite leaves
            buffers as they were. "go-on": it is a batch like any other. But for the last, every stage looks at every
            loss before its backward, so a GPU is waited for once more a batch.
        nonfinite_folder: where "stop" saves the batch (`stalewise.checkpoint.batch_file.read_batch` reads it), of rank
            0; None: nowhere.

    Attributes:
        cuts: indices of the first layers of stages 1 .. K-1; None until they are known.
        partition: the split with what was measured of it; None until it is known.
        plan: what a profile led to; None with given cuts, and until it is known.

    Raises:
        ConfigError: where an argument is not valid, or ranks disagree (then on all of them).
        PlanError: where the model cannot be cut as asked.
    """

    def __init__(
        self,
        model: nn.Sequential | Sequence[LayerSource],
        *,
        method: Method,
        loss_fn: LossFunction,
        optimizer: Callable[[Any], Optimizer],
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        partition: Literal["profile"] | Sequence[int] = "profile",
        memory_limit: int | str | None = None,
        engine: EngineName = "auto",
        device: str | torch.device = "auto",
        seed: int | None = None,
        clip_grad_norm: float | None = None,
        param_groups: ParameterOptions | None = None,
        recv_timeout_s: float | None = None,
        start_timeout_s: float = FIRST_S,
        verbose: bool = True,
        gradient_difference_every: int | None = None,
        measure_memory: bool = False,
        stragglers: Stragglers | Straggler | Sequence[Straggler] | None = None,
        autocast: str | None = None,
        compile: bool | str = False,
        overlap: bool | None = None,
        replay: Sequence[Sequence[str]] | None = None,
        nonfinite_loss: NonFinitePolicy = "stop",
        nonfinite_folder: str | Path | None = None,
    ) -> None:
        check_functions(method, loss_fn, optimizer, lr_scheduler, param_groups)
        check_numbers(seed, clip_grad_norm, recv_timeout_s, start_timeout_s)
        check_gradient_difference(gradient_difference_every, method)
        self.method = method
        self.cuts: tuple[int, ...] | None = None
        self.partition: Partition | None = None
        self.plan: Plan | None = None
        self._memory_limit = None if memory_limit is None else parse_bytes(memory_limit)
        self._chain = Chain(model)
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._clip_grad_norm = clip_grad_norm
        self._param_groups = param_groups
        self._recv_timeout_s = recv_timeout_s
        self._verbose = verbose
        self._gradient_difference_every = gradient_difference_every
        self._measure_memory = measure_memory
        self._replay = None if replay is None else tuple(tuple(cycles) for cycles in replay)
        self._stragglers = Stragglers.of(stragglers)
        self._stragglers.check_stages(method.num_stages)
        self._precision = Precision(autocast)
        check_precision(self._precision, method)
        self._compile = check_compile(compile, method)
        self._job = current_job(start_timeout_s=start_timeout_s) if is_distributed(engine) else None
        decided = method if method.is_decided else method.with_activations("stored")
        check_folder("nonfinite_folder", nonfinite_folder)
        self._nonfinite_folder = None if nonfinite_folder is None else Path(nonfinite_folder)
        self._guard = LossGuard(
            policy=nonfinite_policy(nonfinite_loss, decided.program()),
            keep=None if nonfinite_folder is None else self._keep_nonfinite,
        )
        if self._job is None:
            self._chain = self._chain.built()
        self._device = resolve_device(device, self._job)
        check_backend(self._compile, self._device)
        self._overlap = check_overlap(overlap, device_type=self._device.type, distributed=self._job is not None)
        self._seed = torch.initial_seed() if seed is None else seed
        self._engine: Engine | None = None
        token = secrets.token_hex(4)
        if self._job is not None:
            self._seed, token = broadcast_json([self._seed, token], 0, self._job.group)
            check_agreement(self._job, self._given(partition, seed), num_stages=method.num_stages)
            self._devices: list[str] = all_gather_json(str(self._device), self._job.group)
            warn_of_too_many_threads(self._job, self._device)
        self._persistence = Persistence(
            self._chain,
            job=self._job,
            device=self._device,
            assemble=self._assemble,
            settings={"autocast": autocast, "clip_grad_norm": clip_grad_norm, "compile": self._compile},
            token=token,
            patience_s=recv_timeout_s or FIRST_S,
            guard=self._guard,
        )
        if partition != "profile":
            if isinstance(partition, str):
                raise ConfigError(f'partition is {partition!r}; it must be "profile" or cut indices, such as (2, 4).')
            if self._memory_limit is not None:
                raise ConfigError(
                    "memory_limit needs a profile, which says what a stage would hold, and the cuts are given. Use "
                    'partition="profile", or leave memory_limit out.'
                )
            if not method.knows_staleness:
                raise ConfigError(
                    'staleness is "auto", which needs a profile, and the cuts are given. Use partition="profile", or '
                    "give the staleness, such as that of an earlier run."
                )
            cuts = check_cuts(partition, len(self._chain), method.num_stages)
            self._build_fixed(cuts)
        else:
            check_cuts(range(1, method.num_stages), len(self._chain), method.num_stages)

    @property
    def rank(self) -> int:
        """Of this process; 0 where one process runs all stages."""
        return 0 if self._job is None else self._job.rank

    @property
    def devices(self) -> list[str]:
        """Of each stage."""
        if self._job is None:
            return [str(self._device)] * self.method.num_stages
        return self._devices

    @property
    def batches_in_flight(self) -> int:
        """Batches that were forwarded on the first stage but not yet backwarded on every stage."""
        return 0 if self._engine is None else self._engine.batches_in_flight

    @property
    def learning_rate(self) -> float | None:
        """Of this rank's stage, now (sequential: of the first stage that has an optimizer)."""
        return None if self._engine is None else self._engine.learning_rate

    def traces(self) -> list[Trace]:
        """What each stage did, and when, on the clock of rank 0; on every rank."""
        return [] if self._engine is None else self._engine.traces()

    @property
    def gradient_differences(self) -> list[tuple[int, list[float | None]]]:
        """(global batch index, difference per stage) of each measurement so far, on every rank.

        The difference is ||grad_BP - G|| / ||grad_BP||: G is what the stage applied for the batch, grad_BP what
        backpropagation gives for it with the weights that every stage had after as many updates as batches came before
        it, with the same masks and batch statistics. None for a stage without trained weights.
        """
        return [] if self._engine is None else list(self._engine.gradient_differences)

    def memory(self, *, each_category: bool = False) -> list[StageMemory]:
        """The most that each stage held so far between two of its actions, on every rank; see `plan.memory`.

        Looked at are the first steps of each cycle between drains (twice the largest lag and 8) and every 50th after.

        Args:
            each_category: the largest of every category, which need not be of one moment, instead of the moment with
                the largest total.

        Returns:
            Bytes by category, per stage; all 0 before the first step.

        Raises:
            ConfigError: where the pipeline was built without `measure_memory`, or its cuts are not known yet.
        """
        if not self._measure_memory:
            raise ConfigError(
                "memory is measured only where it is asked for. Build the Pipeline with measure_memory=True."
            )
        found = [usage.peaks if each_category else usage.peak for usage in self._built("memory").usages()]
        return [memory for memory in found if memory is not None]

    def resident_memory(self) -> list[int | None]:
        """Per stage, the most resident bytes that its process ever had (Linux; None elsewhere), on every rank.

        It counts everything: interpreter, libraries, workspaces. Where one process runs all stages, they share it.
        """
        return [usage.resident_bytes for usage in self._built("resident_memory").usages()]

    def bytes_sent(self) -> list[int]:
        """Per stage, bytes of activations, targets, gradients and losses sent to other stages in training so far.

        Headers and evaluations are not counted, so the numbers are those of the method, equal on both engines.
        """
        return [usage.bytes_sent for usage in self._built("bytes_sent").usages()]

    def orders(self) -> Orders:
        """Of an elastic method, what each stage chose so far, on every rank: for `replay`.

        Per stage a text for each cycle (from drain to drain): F forwards the next batch, R recomputes the next one to
        backward, B backwards it and updates. Nothing where staleness is fixed.
        """
        return self._built("orders").orders()

    def statuses(self) -> list[dict[str, Any]]:
        """How each stage is doing: JSON values, updated about twice a second; for displays."""
        return [] if self._engine is None else self._engine.statuses()

    def train(self, batches: Batches | None = None, *, drain: bool = True) -> Iterator[float]:
        """Train on batches and yield their losses.

        Args:
            batches: an iterable of (input, target), read by rank 0 only; other ranks may pass None. Inputs are
                tensors or nested tuples, lists or dicts of them, targets likewise (or None).
            drain: at the end, backward the batches in flight. False leaves them there: the next call goes on without
                filling the pipeline again, and their losses come with it or with `drain()`.

        Yields:
            The loss of each batch as a float, in batch order, the same on every rank, each once. Leaving the loop
            early drains.

        Raises:
            ConfigError: where a batch or what the model makes of it is not valid.
            NonFiniteLoss: where a loss is NaN or infinite and `nonfinite_loss` is "stop"; on ranks above 0 a
                WorkerError that names it.
            WorkerError: where another rank failed.
        """
        self._persistence.begin_reading(batches)
        batches = self._prepare(batches)
        if self._engine is None:
            return
        with closing(self._engine.train(batches, drain=drain)) as losses:
            for loss in losses:
                self._persistence.check()
                yield loss.item()

    def drain(self) -> Iterator[float]:
        """Backward the batches in flight and yield their losses."""
        return self.train((), drain=True)

    @property
    def num_batches(self) -> int:
        """Batches that entered the pipeline so far, over the whole run: the next one's global index."""
        return 0 if self._engine is None else self._engine.num_batches

    def save(
        self,
        directory: str | Path,
        *,
        keep: int | None = None,
        extra: Any = None,
        attachments: Sequence[Attachment] = (),
        wait: bool = False,
    ) -> Path | None:
        """Save everything that the run needs to go on, at any time, also in a loop over `train`.

        All ranks call it at the same place. Each waits until its stage is copied to host memory; the files are written
        in the background, into a folder that all ranks share, and become visible together by one rename. An error of
        that is raised by the next loss, `save`, or the end of the job.

        Args:
            directory: of all checkpoints of this run and of no other.
            keep: how many of the newest checkpoints stay; None: all.
            extra: a record of your own, JSON values; rank 0's counts.
            attachments: files of rank 0 that go into the checkpoint.
            wait: until the checkpoint is complete.

        Returns:
            Its folder where `wait` is on, else None.

        Raises:
            ConfigError: where the state holds what a checkpoint cannot hold, or another run uses the folder.
            SaveError: where this checkpoint, or the one before, could not be written.
        """
        return self._persistence.save(
            self._built("save"),
            Path(directory),
            cuts=self.cuts or (),
            method=self.method,
            keep=keep,
            extra=extra,
            attachments=attachments,
            wait=wait,
        )

    def wait_saved(self) -> None:
        """Wait until everything that was saved is on disk; all ranks call it.

        Raises:
            SaveError: where it could not be written.
        """
        self._persistence.wait()

    def resume(
        self, directory: str | Path, *, positioned: bool = False, missing_ok: bool = False
    ) -> ResumePoint | None:
        """Go on where a checkpoint was saved, before the first batch of this pipeline; all ranks call it.

        With the method and the cuts of the checkpoint, on one process or many, the run goes on bitwise as if it had
        not been interrupted: the batches in flight are there again, and the next call of `train` first yields the
        losses that are due. With others (also another number of stages) the batches in flight are finished with the old
        ones, and weights and optimizer state are moved by parameter name; nothing is skipped or repeated.

        The next `train` must begin with the batch after the last one that the checkpoint saw. An iterable with
        `load_state_dict` that had a `state_dict` when it was saved is brought there; for any other one, bring it there
        yourself (`ResumePoint.session_batches` says how many batches it had given) and say `positioned=True`.

        Args:
            directory: one checkpoint, or a folder of them: then the newest.
            positioned: you see to it that the next `train` begins with the right batch.
            missing_ok: return None where there is no checkpoint, as when a job begins.

        Raises:
            CheckpointError: where there is none, or it is damaged or of another model; nothing was loaded then.
            ConfigError: where this pipeline has trained already.
        """
        if self._engine is not None and self._engine.has_begun:
            raise ConfigError(
                f"this pipeline has trained on {self._engine.num_batches} batches already; resume a new one."
            )
        return self._persistence.resume(
            Path(directory),
            engine=self._engine,
            cuts=self.cuts,
            method=self.method,
            build=self._build_fixed,
            positioned=positioned,
            missing_ok=missing_ok,
        )

    def evaluate(self, batches: Batches | None, metric: Metric) -> float:
        """Forward batches through the pipeline in eval mode and average a metric.

        Args:
            batches: as for `train`.
            metric: (output, target) -> the batch's mean; called on the last stage.

        Returns:
            The mean over all samples, on every rank.

        Raises:
            ConfigError: where batches are in flight, or there is no batch.
        """
        if not callable(metric):
            raise ConfigError(f"metric is {metric!r}; it must be a function (output, target) -> mean over the batch.")
        batches = self._prepare(batches)
        if self._engine is None:
            raise ConfigError("evaluate got no batch; a mean needs at least one sample. Is the iterable used up?")
        return self._engine.evaluate(batches, metric)

    def state_dict(self) -> dict[str, Tensor]:
        """CPU copies of all parameters and buffers, with the names and in the order of the unsplit model."""
        return self._built("state_dict").state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load values for the whole model; each rank takes its stage's.

        Raises:
            ConfigError: where a name is missing or a shape differs.
        """
        self._built("load_state_dict").load_state_dict(state)

    def optimizer_state_dict(self) -> dict[str, Any]:
        """State and parameter groups of all optimizers, by parameter name; CPU copies."""
        return self._built("optimizer_state_dict").optimizer_state_dict()

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `optimizer_state_dict` gave, also where the cuts are others."""
        self._built("load_optimizer_state_dict").load_optimizer_state_dict(state)

    def _built(self, name: str) -> Engine:
        if self._engine is None:
            raise ConfigError(
                f'{name} was called before the cuts are known: partition="profile" finds them with the first '
                "batch. Call train or evaluate first, give partition=(cut, ..), or load into the model itself before."
            )
        return self._engine

    def _prepare(self, batches: Batches | None) -> Batches | None:
        """Make sure that the engine exists; where a profile is due, with the first batch."""
        if self._engine is not None:
            return batches
        first: list[Any] = []
        if self.rank == 0:
            iterator = iterate(batches)
            first = list(itertools.islice(iterator, 1))
            batches = itertools.chain(first, iterator)
        for batch in share_batch(first, self._job):
            measured = measure(
                self._chain,
                batch,
                self._loss_fn,
                device=self._device,
                job=self._job,
                num_stages=self.method.num_stages,
                precision=self._precision,
                repeats=3 if self.method.knows_staleness else JITTER_REPEATS,
            )
            counts_memory = self._memory_limit is not None or not self.method.is_decided
            self.plan = plan_with_depth(
                measured.layers,
                self.method,
                functools.partial(jitter_of_passes, measured.passes),
                target_bytes=measured.targets,
                batch=measured.batch(optimizer_copies(self._optimizer) if counts_memory else 1.0),
                memory_limit=self._memory_limit,
                slowdowns=measured.slowdowns,
            )
            self.method = self.plan.method
            self._build(self.plan.partition)
            if self.rank == 0 and self._verbose:
                print(self.plan.partition.table())
                if self.plan.depth is not None:
                    print(self.plan.depth.why())
        return batches

    def _layer_costs(self) -> list[LayerCost]:
        """The layers with nothing measured."""
        return [
            LayerCost(
                parameters=sum(p.numel() for p in layer.parameters()) if isinstance(layer, nn.Module) else 0,
                name=name,
                type=type(layer).__name__ if isinstance(layer, nn.Module) else "factory",
            )
            for name, layer in zip(self._chain.names, self._chain.layers, strict=True)
        ]

    def _build_fixed(self, cuts: tuple[int, ...], method: Method | None = None) -> Engine:
        """Cut where it is said.

        Args:
            cuts: of the stages.
            method: with everything decided that a plan was to decide; None: it is.
        """
        self.method = method or self.method
        recompute = [stage.recomputes for stage in self.method.program().stages]
        self._build(fixed_partition(self._layer_costs(), cuts, recompute=recompute))
        return self._built("build")

    def _build(self, plan: Partition) -> None:
        """Cut the model and make the engine."""
        self._chain.check_nothing_shared(plan.cuts)
        program = self.method.program()
        stages = range(self.method.num_stages) if self._job is None else [self._job.rank]
        built = [self._assemble(self._chain, plan.cuts, index, program.stages[index]) for index in stages]
        if self._job is None:
            self._engine = SequentialEngine(
                program,
                built,
                gradient_difference_every=self._gradient_difference_every,
                measure_memory=self._measure_memory,
                stragglers=self._stragglers,
                replay=self._replay,
                guard=self._guard,
            )
        else:
            self._engine = DistributedEngine(
                program,
                built[0],
                self._job,
                plan=self._plan_hash(plan.cuts),
                recv_timeout_s=self._recv_timeout_s,
                payload_groups=payload_groups(self._job, self._device),
                gradient_difference_every=self._gradient_difference_every,
                measure_memory=self._measure_memory,
                stragglers=self._stragglers,
                replay=self._replay,
                guard=self._guard,
            )
        self.partition = plan
        self.cuts = plan.cuts
        self._persistence.built(self._engine)

    def _assemble(self, chain: Chain, cuts: tuple[int, ...], index: int, program: StageProgram) -> Stage:
        return assemble_stage(
            chain.build(cuts, index),
            index=index,
            num_stages=len(cuts) + 1,
            device=self._device,
            seed=self._seed,
            optimizer=self._optimizer,
            lr_scheduler=self._lr_scheduler,
            loss_fn=self._loss_fn,
            clip_grad_norm=self._clip_grad_norm,
            param_groups=self._param_groups,
            program=program,
            precision=self._precision,
            compile=self._compile,
            protects_buffers=self._guard.policy == "skip",
            overlap=self._overlap,
        )

    def _keep_nonfinite(self, batch: int, loss: float, loaded: Activation) -> str:
        """Save a batch; says where it is, or why it is nowhere."""
        assert self._nonfinite_folder is not None
        value = (unflatten(loaded.structure, loaded.values), loaded.target)
        try:
            path = write_batch(self._nonfinite_folder, batch, value, loss=loss, stage=self.method.num_stages - 1)
        except SaveError as error:
            return f"It could not be saved: {error}"
        return f"It is saved in {path}."

    def _plan_hash(self, cuts: tuple[int, ...]) -> int:
        compute = [self._precision.autocast, self._compile]
        text = json.dumps([__version__, repr(self.method), cuts, *compute, self._chain.describe()])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def _given(self, partition: Any, seed: int | None) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {
            "version of stalewise": __version__,
            "method": repr(self.method),
            "partition": partition if isinstance(partition, str) else [*map(repr, partition)],
            "model": self._chain.describe(),
            "seed": seed,
            "clip_grad_norm": self._clip_grad_norm,
            "gradient_difference_every": self._gradient_difference_every,
            "memory_limit": self._memory_limit,
            "measure_memory": self._measure_memory,
            "stragglers": repr(self._stragglers),
            "autocast": self._precision.autocast,
            "compile": self._compile,
            "nonfinite_loss": self._guard.policy,
            "replay": None if self._replay is None else hashlib.blake2b(repr(self._replay).encode()).hexdigest(),
        }
