"""How a pipeline is saved and resumed: what `Pipeline.save` and `Pipeline.resume` do.

resume   manifest ─┬─ same method, same cuts ─► every rank reads its stage ─► exactly where the run stood
                   └─ another ─► the old stages, drained in one process ─► state by parameter name
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stalewise.checkpoint.folder import verify
from stalewise.checkpoint.manifest import Manifest
from stalewise.checkpoint.writer import Attachment
from stalewise.engine.engine import Engine
from stalewise.engine.nonfinite import LossGuard
from stalewise.engine.randomness import restore_process_random_state
from stalewise.engine.sequential import SequentialEngine
from stalewise.engine.split import Chain
from stalewise.engine.stage import Stage
from stalewise.errors import CheckpointError, ConfigError
from stalewise.methods import Method, describe_method
from stalewise.protocol.program import StageProgram
from stalewise.runtime.elsewhere import Moved, move_in, move_out, saved_method, share
from stalewise.runtime.exchange import broadcast_json
from stalewise.runtime.job import Job
from stalewise.runtime.resuming import ResumePoint, agreed, cut_of, environment, locate, read_stages
from stalewise.runtime.saving import RunDescription, Saver

__all__ = ["Persistence"]

Cuts = tuple[int, ...]


class Persistence:
    """Of one pipeline.

    Args:
        chain: its layers.
        job: whose ranks are its stages, or None.
        device: of this process.
        assemble: (layers, cuts, stage, program) -> the stage, by the pipeline's recipes.
        settings: options of the pipeline that change numbers; see `Manifest`.
        token: of the run, the same on all ranks and in no other run.
        patience_s: how long rank 0 waits for the other ranks' parts of a checkpoint.
        guard: what becomes of batches whose loss is not finite.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        job: Job | None,
        device: torch.device,
        assemble: Callable[[Chain, Cuts, int, StageProgram], Stage],
        settings: Mapping[str, Any],
        token: str,
        patience_s: float,
        guard: LossGuard,
    ) -> None:
        self._chain = chain
        self._job = job
        self._rank = 0 if job is None else job.rank
        self._device = device
        self._assemble = assemble
        self._settings = dict(settings)
        self._token = token
        self._patience_s = patience_s
        self._guard = guard
        self._saver: Saver | None = None
        self._batches: Any = None
        self._moved: Moved | None = None
        self._position: tuple[int, str] | None = None
        self._loader_state: Any = None

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written.

        Raises:
            SaveError: saying why.
        """
        if self._saver is not None:
            self._saver.writer.check()

    def wait(self) -> None:
        """See `Pipeline.wait_saved`."""
        if self._saver is not None:
            self._saver.flush()
            if self._job is not None:
                broadcast_json(None, 0, self._job.group)

    def begin_reading(self, batches: Any) -> None:
        """A session begins; after a resume, see that its batches are the right ones.

        Args:
            batches: the iterable that the user gave, on rank 0.

        Raises:
            ConfigError: where it cannot be brought to where it stood when the checkpoint was saved.
        """
        self._batches = batches
        position, self._position = self._position, None
        if position is None or self._rank != 0:
            return
        taken, data = position
        load = getattr(batches, "load_state_dict", None)
        if data == "state" and callable(load):
            load(self._loader_state)
        elif taken or data == "state":
            raise ConfigError(
                f"the checkpoint was saved after {taken} batches of an iterable, and this {type(batches).__name__} "
                "cannot be brought there exactly. Give one with state_dict() and load_state_dict(), such as "
                f"torchdata's StatefulDataLoader, when you save and when you resume; or leave out its first {taken} "
                "batches yourself and call resume(.., positioned=True)."
            )

    def built(self, engine: Engine) -> None:
        """The stages are there: give them what was read before."""
        if self._moved is not None:
            moved, self._moved = self._moved, None
            move_in(moved, engine)

    def save(
        self,
        engine: Engine,
        directory: Path,
        *,
        cuts: Cuts,
        method: Method,
        keep: int | None,
        extra: Any,
        attachments: Sequence[Attachment],
        wait: bool,
    ) -> Path | None:
        """See `Pipeline.save`."""
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ConfigError(f"keep is {keep!r}; it must be a number of checkpoints of at least 1, or None for all.")
        try:
            # The caller may go on with its lists while the checkpoint is written.
            extra = json.loads(json.dumps(extra))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"extra cannot be saved: {error}; give JSON values only.") from None
        if self._saver is None:
            self._saver = self._build_saver(engine, cuts, method)
        stateful = self._rank == 0 and callable(getattr(self._batches, "state_dict", None))
        self._saver.save(
            directory,
            keep=keep,
            extra=extra,
            data="state" if stateful else "position",
            loader=self._batches.state_dict() if stateful else None,
            attachments=attachments,
        )
        if not wait:
            return None
        self.wait()
        newest = str(self._saver.writer.newest)
        return Path(newest if self._job is None else broadcast_json(newest, 0, self._job.group))

    def resume(
        self,
        directory: Path,
        *,
        engine: Engine | None,
        cuts: Cuts | None,
        method: Method,
        build: Callable[[Cuts, Method], Engine],
        positioned: bool,
        missing_ok: bool,
    ) -> ResumePoint | None:
        """See `Pipeline.resume`.

        Args:
            directory: of checkpoints, or one.
            engine: of the pipeline; None where its cuts are not known.
            cuts: of the pipeline, likewise.
            method: of the pipeline; where a plan is to decide a part of it, the checkpoint decides.
            build: makes the engine for given cuts and a method of which everything is decided.
            positioned: see `Pipeline.resume`.
            missing_ok: see `Pipeline.resume`.
        """
        path = locate(directory, self._job, missing_ok=missing_ok)
        if path is None:
            return None
        manifest = agreed(lambda: self._checked(path), self._job)
        if (same := _same_method(manifest, cuts, method)) is not None:
            point = self._resume_exactly(path, manifest, engine or build(tuple(manifest.cuts), same))
        else:
            point = self._resume_elsewhere(path, manifest, engine, method)
        if point.session_batches is not None and not positioned:
            self._position = point.session_batches, manifest.data
        return point

    def _build_saver(self, engine: Engine, cuts: Cuts, method: Method) -> Saver:
        description = RunDescription(
            num_stages=method.num_stages,
            cuts=cuts,
            layers=self._chain.names,
            method=describe_method(method),
            method_text=repr(method),
            seed=engine.held_stages[0].seed,
            settings=self._settings,
        )
        saver = Saver(engine, rank=self._rank, description=description, token=self._token, patience_s=self._patience_s)
        if self._job is not None:
            self._job.closers.append(saver.flush)
        return saver

    def _checked(self, path: Path) -> Manifest:
        manifest = verify(path, names=frozenset())
        if list(self._chain.names) != manifest.layers:
            raise CheckpointError(
                f"{path} is of another model: its layers are {', '.join(manifest.layers)}; this model's are "
                f"{', '.join(self._chain.names)}. Build the pipeline from the same model."
            )
        saved, own = manifest.settings["autocast"], self._settings["autocast"]
        if saved != own:
            raise CheckpointError(
                f"{path} was saved with autocast={saved!r}, and this pipeline has autocast={own!r}: its batches in "
                f"flight would be of both precisions. Resume with autocast={saved!r}, drain, and give its "
                "state_dict() and optimizer_state_dict() to a pipeline of the other precision."
            )
        return manifest

    def _differences(self, manifest: Manifest) -> str:
        """What is not as it was when the checkpoint was saved, and changes numbers from now on."""
        told = ""
        for name, own in self._settings.items():
            if (was := manifest.settings[name]) != own:
                told += f"; from here on {name} is {own} instead of {was}"
        now = environment()
        for name, unit in (("torch", "torch"), ("threads", "threads a stage")):
            if manifest.environment.get(name) != now[name]:
                was = manifest.environment.get(name)
                told += f"; it was saved with {unit} {was}, and this is {now[name]}: kernels may round differently"
        return told

    def _resume_exactly(self, path: Path, manifest: Manifest, engine: Engine) -> ResumePoint:
        indices = [stage.index for stage in engine.held_stages]

        def read() -> dict[int, Any]:
            _, stages = read_stages(path, indices, device=self._device)
            engine.check(stages)
            return stages

        stages = agreed(read, self._job)
        cut = cut_of(manifest)
        engine.restore(cut, stages)
        own = stages[indices[0]]
        if own["random"] is not None:
            restore_process_random_state(own["random"], self._device)
        self._loader_state = own["loader"]
        return ResumePoint(
            path=path,
            batches=cut.num_batches,
            session_batches=cut.session_batches,
            exact=manifest.settings == self._settings,
            losses=(),
            did=f"resumed at batch {cut.num_batches} from {path}{self._differences(manifest)}",
            extra=manifest.extra,
        )

    def _resume_elsewhere(self, path: Path, manifest: Manifest, engine: Engine | None, method: Method) -> ResumePoint:
        old = saved_method(manifest)
        if old is None:
            raise CheckpointError(
                f"{path} was saved by {manifest.method_text}, a method of your own, and this pipeline has "
                f"{method!r}; only a pipeline of that method and its cuts can finish its batches in flight. "
                "Resume it so, drain, and give its state_dict() to the new pipeline."
            )

        def moved_out() -> Moved:
            layers = self._chain.built()
            program = old.program()
            stages = [
                self._assemble(layers, tuple(manifest.cuts), index, program.stages[index])
                for index in range(manifest.num_stages)
            ]
            return move_out(path, manifest, SequentialEngine(program, stages, guard=self._guard))

        moved = share(moved_out, self._job)
        if engine is None:
            self._moved = moved
        else:
            move_in(moved, engine)
        self._loader_state = moved.loader
        return ResumePoint(
            path=path,
            batches=moved.num_batches,
            session_batches=cut_of(manifest).session_batches,
            exact=False,
            losses=tuple(moved.losses),
            did=(
                f"resumed at batch {moved.num_batches} from {path}: {len(moved.losses)} losses of batches in flight "
                f"came from {manifest.method_text} with cuts {tuple(manifest.cuts)}, which was drained; weights and "
                f"optimizer state were moved by name to {method!r}{self._differences(manifest)}"
            ),
            extra=manifest.extra,
        )


def _same_method(manifest: Manifest, cuts: Cuts | None, method: Method) -> Method | None:
    """The method with which a pipeline goes on exactly; None where its own method or cuts are others."""
    if manifest.num_stages != method.num_stages or (cuts or tuple(manifest.cuts)) != tuple(manifest.cuts):
        return None
    if manifest.method_text == repr(method):
        return method
    old = saved_method(manifest)
    if old is None or type(old) is not type(method):
        return None
    if not method.knows_staleness:
        method = method.with_staleness(old.staleness)
    if not method.is_decided:
        return old if old.with_activations("stored") == method.with_activations("stored") else None
    return method if old.program() == method.program() else None
