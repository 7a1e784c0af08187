"""What the numbers of a run mean, in sentences: what was reached, what limits the speed, what to try.

The rules, first match wins, for the one finding about speed:

    no step in steady state                          too short to tell
    one process                                      the stages take turns
    a stage computes 90% of the time or more         some stages have too much to do, or all are busy
    a link has slack 0                               the stages wait for each other by construction
    else                                             what the busiest stage does instead of computing
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stalewise.protocol.staleness import Staleness
from stalewise.report.run_folder import RunFolder
from stalewise.report.stragglers import longest_spell
from stalewise.report.timeline import Activity, StageUsage, Usage
from stalewise.report.wording import count, data_name, duration, link, listed, model_name, percent, plural

__all__ = ["Finding", "findings", "summary_sentence"]

_BUSY = 0.9
"""Utilisation from which a stage counts as busy all the time."""
_UNEVEN = 1.1
"""Utilisation of the bottleneck over the mean of all, from which another cut is worth trying."""
_SLOW = 1.25
"""Computing of a stage over that of the next slowest, from which it is told as a straggler."""
_NOTABLE = 0.1
"""Share of the time from which a side issue is told."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that the numbers say.

    Args:
        title: a clause that starts with a small letter, such as "stage 1 is the bottleneck".
        detail: the numbers behind it, a clause as well.
        advice: what to try, in sentences.
    """

    title: str
    detail: str
    advice: str


def summary_sentence(run: RunFolder, found: tuple[Finding, ...]) -> str:
    """The run in one sentence: what was trained, what it reached in which time, and what limits it."""
    subject = model_name(run.config.text("model") or "") or "The model"
    if data := run.config.text("data"):
        subject += f" on {data_name(data)}"
    ended = bool(run.summary)
    accuracy, loss = run.total("test_accuracy"), run.total("train_loss")
    if accuracy is not None:
        reached = f"reached {percent(accuracy)} test accuracy"
    elif loss is not None:
        reached = f"reached a training loss of {count(loss)}"
    else:
        reached = "was trained" if ended else "was being trained"
    words = [subject, reached if ended or not reached.startswith("reached") else f"had {reached}"]
    if (epochs := run.total("epochs")) is not None:
        planned = run.config.integer("epochs")
        whole = planned is None or planned == epochs
        words.append(f"after {plural(epochs, 'epoch') if whole else f'{count(epochs)} of {count(planned)} epochs'}")
    if (wall := run.total("wall_time_s")) is not None:
        words.append(f"in {duration(wall)}")
    if (rate := run.total("samples_per_s")) is not None:
        words.append(f"at {count(rate)} samples/s")
    if (processes := run.config.integer("processes")) is not None:
        words.append(f"on {plural(processes, 'process')} with a part of every batch each")
    elif (stages := run.num_stages) is not None:
        words.append(f"on {plural(stages, 'stage')}")
    sentence = " ".join(words)
    if not ended:
        sentence += " when its record ends"
    if found:
        sentence += f"; {found[0].title}: {found[0].detail}"
    return sentence + "."


def findings(run: RunFolder, usage: Usage | None) -> tuple[Finding, ...]:
    """What is worth knowing about the run, the most important first."""
    found = []
    if (wild := _diverged(run)) is not None:
        found.append(wild)
    if usage is not None and len(usage.stages) > 1:
        found.append(_speed(run, usage))
        found.extend(_side_issues(run, usage, told=found[-1]))
        found.extend(_slow_spell(run))
    if (surprise := _prediction(run)) is not None:
        found.append(surprise)
    return tuple(found)


def _prediction(run: RunFolder) -> Finding | None:
    """What the plan promised, where it did not come true."""
    predicted, measured = run.summary.number("predicted_step_s"), run.summary.number("measured_step_s")
    if not predicted or not measured or abs(measured / predicted - 1) < _NOTABLE:
        return None
    longer = measured > predicted
    return Finding(
        title=f"a step took {'longer' if longer else 'less'} than predicted",
        detail=f"{duration(measured)} measured, {duration(predicted)} predicted",
        advice="Something else used the machine in the run, or while the layers were profiled. If it stays so, plan "
        "again for the measured speeds with stalewise plan --from and the run folder.",
    )


def _diverged(run: RunFolder) -> Finding | None:
    first = next((point for point in run.batches if point.loss is not None and not math.isfinite(point.loss)), None)
    if first is None:
        return None
    rate = "" if first.lr is None else f", which was {first.lr:g}"
    stale = "" if run.staleness is None or run.staleness[0] == 0 else "; the more staleness, the smaller it must be"
    return Finding(
        title="training diverged",
        detail=f"the loss is not finite from batch {first.batch} on",
        advice=f"Lower the learning rate{rate}{stale}.",
    )


def _speed(run: RunFolder, usage: Usage) -> Finding:
    if not usage.window.steady:
        return Finding(
            title="the run is too short to tell what limits its speed",
            detail="no step of it is in steady state",
            advice="A step is in steady state once the first stage has forwarded as many batches as it has "
            "staleness; train for more batches between two drains.",
        )
    if run.config.text("engine") == "sequential":
        return Finding(
            title="all stages took turns in one process",
            detail="their shares show what each stage costs, not who waits for whom",
            advice="The distributed engine lets them work at the same time and gives the same weights.",
        )
    busiest = max(usage.stages, key=lambda stage: (stage.utilisation, -stage.stage))
    if busiest.utilisation >= _BUSY:
        return _busy(run, usage, busiest)
    locked = [stage for stage, slack in enumerate(run.staleness.slack[:-1]) if slack == 0] if run.staleness else []
    if run.staleness is not None and locked:
        return _locked(run.staleness, busiest, locked)
    return _waiting(run, busiest)


def _busy(run: RunFolder, usage: Usage, busiest: StageUsage) -> Finding:
    levels = [stage.utilisation for stage in usage.stages]
    mean = sum(levels) / len(levels)
    gain = busiest.utilisation / mean
    busy = [stage.stage for stage in usage.stages if stage.utilisation >= _BUSY or stage.stage == usage.bottleneck]
    others = [stage.utilisation for stage in usage.stages if stage.stage not in busy]
    idlest = min(usage.stages, key=lambda stage: (stage.utilisation, stage.stage))
    if gain < _UNEVEN or not others:
        return Finding(
            title="the pipeline is nearly full",
            detail=f"its stages compute {percent(mean, 0)} of the time on average, stage {idlest.stage} the "
            f"least with {percent(idlest.utilisation, 0)}",
            advice=f"With the same work spread evenly a step would be at most {gain:.2f} times faster. "
            "Beyond that it takes less work per sample, faster devices or more stages.",
        )
    if len(busy) == 1:
        title, verb = f"stage {busy[0]} is the bottleneck", "it computes"
    else:
        title, verb = f"stages {listed(map(str, busy))} are the bottleneck", "they compute"
    parts = {part.stage: part.layers for part in run.partition.stages} if run.partition else {}
    if all((layers := parts.get(stage)) is not None and layers[1] - layers[0] == 1 for stage in busy):
        advice = (
            "It holds a single layer, so it has none to give away: split that layer, or use more threads or a faster "
            "device there."
            if len(busy) == 1
            else "Each holds a single layer, so they have none to give away: split these layers, or use fewer stages."
        )
    elif run.partition is not None and run.partition.method == "profile":
        advice = (
            "The cuts were chosen from a profile, so whole layers may not divide better: try another number of "
            "stages, or a network of more and smaller layers."
        )
    else:
        advice = (
            f"Shift the cuts so that stage {idlest.stage} holds more of the layers, or let a profile choose the cuts."
        )
    return Finding(
        title=title,
        detail=f"{verb} {_span([levels[stage] for stage in busy])} of the time, "
        f"{'the others' if len(others) > 1 else f'stage {idlest.stage}'} {_span(others)}",
        advice=f"{advice} With the same work spread evenly a step would be up to {gain:.2f} times faster.",
    )


def _locked(staleness: Staleness, busiest: StageUsage, locked: list[int]) -> Finding:
    links = listed(map(link, locked))
    minimal = Staleness([2 * (len(staleness) - 1 - stage) for stage in range(len(staleness))])
    return Finding(
        title="the stages wait for each other",
        detail=f"no stage computes more than {percent(busiest.utilisation, 0)} of the time, and "
        f"{'link' if len(locked) == 1 else 'links'} {links} {'has' if len(locked) == 1 else 'have'} no slack",
        advice=f"A stale method lets them work apart: DSP with staleness {minimal} needs no stage to wait. "
        "It costs some accuracy in short training. In a method with micro-batches, use more of them.",
    )


def _waiting(run: RunFolder, busiest: StageUsage) -> Finding:
    stage = busiest.stage
    loss = max(
        (activity for activity in Activity if activity.is_wait or activity in (Activity.SEND, Activity.UNRECORDED)),
        key=lambda activity: busiest.shares[activity],
    )
    busy, share = percent(busiest.utilisation, 0), percent(busiest.shares[loss], 0)
    if loss is Activity.WAIT_LOADER:
        return Finding(
            title="the data loader is the limit",
            detail=f"stage {stage}, the busiest, computes {busy} of the time and waits {share} for data",
            advice="Use more loader workers, lighter augmentation or data that is decoded beforehand.",
        )
    if loss is Activity.SEND:
        return Finding(
            title="sending takes much of the time",
            detail=f"stage {stage}, the busiest, computes {busy} of the time and sends for {share}",
            advice="Cut where a layer's output is small, or use a faster link between the stages.",
        )
    if loss is Activity.UNRECORDED:
        return Finding(
            title="much time passes between the actions",
            detail=f"stage {stage}, the busiest, computes {busy} of the time and {share} is not recorded",
            advice="Larger batches make the time between actions weigh less.",
        )
    what = "activations" if loss is Activity.WAIT_ACTIVATION else "gradients"
    advice = "Larger batches make each message weigh less."
    if run.staleness is not None:
        more = _more_slack(run.staleness)
        advice += (
            f" Where steps are uneven or links slow, more slack absorbs it, such as staleness {more}; "
            "it costs some accuracy in short training."
        )
    return Finding(
        title="messages arrive late",
        detail=f"stage {stage}, the busiest, computes {busy} of the time and waits {share} for {what}",
        advice=advice,
    )


def _side_issues(run: RunFolder, usage: Usage, *, told: Finding) -> list[Finding]:
    found = []
    loader = max(usage.stages, key=lambda stage: stage.shares[Activity.WAIT_LOADER])
    share = loader.shares[Activity.WAIT_LOADER]
    if share >= _NOTABLE and "loader" not in told.title:
        found.append(
            Finding(
                title=f"stage {loader.stage} waits for data",
                detail=f"{percent(share, 0)} of its time goes to the data loader",
                advice="Use more loader workers, or data that is decoded beforehand.",
            )
        )
    cores, threads = run.environment.integer("cores"), run.environment.integer("threads_per_stage")
    devices = run.environment.texts("devices")
    wanted = len(devices) * threads if threads else 0
    if cores and wanted > cores and set(devices) == {"cpu"} and run.config.text("engine") == "distributed":
        found.append(
            Finding(
                title="the stages share cores",
                detail=f"{len(devices)} stages with {plural(threads or 0, 'thread')} each run on "
                f"{plural(cores, 'core')}",
                advice="Use fewer threads per stage or fewer stages, or spread the stages over more hosts.",
            )
        )
    return found


def _slow_spell(run: RunFolder) -> list[Finding]:
    """One part of the pipeline that was much slower than the rest for a good part of the run."""
    spell = longest_spell(run, factor=_SLOW)
    num_batches = run.batches[-1].batch + 1 if run.batches else 0
    if spell is None or spell.end_batch - spell.first_batch < _NOTABLE * num_batches:
        return []
    worst = spell.worst
    others = [
        f"stage {stage} waited {percent(share, 0)}"
        for stage, share in enumerate(worst.waits)
        if worst.kind != "compute" or stage != worst.stage
    ]
    if worst.kind == "compute":
        what = f"it computed {worst.factor:.1f} times as long as the next slowest stage"
        advice = (
            "Something else may run on its device, or the device is slower than the others: stalewise plan --from with "
            "this run's folder proposes cuts for the speeds that were measured. Spells that pass are absorbed by slack."
        )
    else:
        what = f"a step took {worst.factor:.1f} times as long as any stage computed"
        advice = (
            "Use more loader workers, or data that is decoded beforehand."
            if worst.kind == "loader"
            else "Cut where a layer's output is small, use a faster link there, or give that link more slack."
        )
    return [
        Finding(
            title=f"{worst.where} held the others up",
            detail=f"from batch {spell.first_batch} to {spell.end_batch} {what}; meanwhile {listed(others)}",
            advice=advice,
        )
    ]


def _more_slack(staleness: Staleness) -> Staleness:
    """The staleness with one more batch of slack on each link."""
    last = len(staleness) - 1
    return Staleness([entry + last - stage for stage, entry in enumerate(staleness)])


def _span(levels: list[float]) -> str:
    low, high = percent(min(levels), 0), percent(max(levels), 0)
    return low if low == high else f"{low} to {high}"
