"""The report of a run: one HTML file that holds everything it shows."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from stalewise.protocol.staleness import LinkState, Staleness
from stalewise.report import figures
from stalewise.report.atomic import atomic_text
from stalewise.report.elastic import elastic_section
from stalewise.report.findings import findings, summary_sentence
from stalewise.report.page import (
    Markup,
    cards,
    columns,
    details,
    element,
    figure,
    listing,
    page,
    pairs,
    section,
    table,
)
from stalewise.report.record import Record
from stalewise.report.run_folder import EpochPoint, Partition, RunFolder
from stalewise.report.timeline import Activity, StageUsage, Timeline, Usage
from stalewise.report.wording import (
    NOT_RECORDED,
    count,
    data_name,
    duration,
    link,
    listed,
    method_name,
    model_name,
    percent,
    plural,
    size,
    span,
)

__all__ = ["write_report"]

_MEASURED_STEPS = 100
_DRAWN_STEPS = range(8, 17)
"""Fewest and most steps in the picture; between them it shows one batch from its forward to its backward."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder.

    The file needs no other file, no script and no network. It appears only when it is complete, and replaces
    an older one. What the folder does not hold is named, not guessed.

    Args:
        run_dir: the folder of a run that ended, or was stopped.

    Returns:
        The path of the report.

    Raises:
        ConfigError: where config.json or metrics.jsonl is missing, or a file is malformed.
    """
    run = RunFolder.read(Path(run_dir))
    usage = run.timeline.usage(run.timeline.window(_MEASURED_STEPS)) if run.timeline else None
    found = findings(run, usage)
    title = model_name(run.config.text("model") or "") or run.path.resolve().name
    if data := run.config.text("data"):
        title += f" on {data_name(data)}"
    text = page(
        f"{title} · stalewise",
        element(
            "header",
            element("div", _byline(run), class_="eyebrow"),
            element("h1", title),
            element("p", summary_sentence(run, found), class_="lead"),
            cards(_key_numbers(run, usage)),
        ),
        *(
            element(
                "div",
                element(
                    "p",
                    element("strong", f"{finding.title[0].upper()}{finding.title[1:]}"),
                    f": {finding.detail}.",
                ),
                element("p", element("strong", "To try. "), finding.advice),
                class_="finding",
            )
            for finding in found
        ),
        _curves(run),
        _time(run, usage),
        _partition(run),
        _method(run),
        *elastic_section(run),
        section(
            "Configuration and environment",
            columns(
                element("div", element("h3", "Configuration"), _record(run.config)),
                element("div", element("h3", "Environment"), _record(run.environment, leave_out=("command",))),
            ),
        ),
        _repeat(run),
        _footer(run, usage),
    )
    path = run.path / "report.html"
    with atomic_text(path) as file:
        file.write(text)
    return path


def _byline(run: RunFolder) -> str:
    parts = ["stalewise run report"]
    if version := run.environment.text("stalewise"):
        parts[0] = f"stalewise {version} run report"
    if method := _method_title(run):
        parts.append(method)
    if started := run.environment.text("started"):
        parts.append(_date(started))
    if host := run.environment.text("host"):
        parts.append(host)
    return " · ".join(parts)


def _method_title(run: RunFolder) -> str:
    method = run.config.text("baseline") or run.config.text("method")
    if method is None:
        return ""
    queue = run.config.integers("queue")
    if method == "dsp" and queue is not None and run.staleness is not None:
        return f"DSP({','.join(map(str, queue))};{','.join(map(str, run.staleness))})"
    return method_name(method)


def _date(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


def _key_numbers(run: RunFolder, usage: Usage | None) -> list[tuple[str, str, str]]:
    numbers = []
    accuracies = [point for point in run.epochs if point.test_accuracy is not None]
    if accuracies or run.total("test_accuracy") is not None:
        note = ""
        if accuracies:
            best = max(accuracies, key=lambda point: point.test_accuracy or 0.0)
            note = f"best {percent(best.test_accuracy)}, epoch {best.epoch}"
            if best.epoch == run.epochs[-1].epoch:
                note = "highest of all epochs"
        numbers.append(("Test accuracy", percent(run.total("test_accuracy")), note))
    numbers.append(("Training loss", count(run.total("train_loss")), _test_loss(run.epochs)))
    numbers.append(("Samples per second", count(run.total("samples_per_s")), ""))
    epochs, batches = run.total("epochs"), run.total("batches")
    size_note = ", ".join(
        plural(value, noun) for value, noun in ((epochs, "epoch"), (batches, "batch")) if value is not None
    )
    numbers.append(("Time", duration(run.total("wall_time_s")), size_note))
    if usage is not None:
        busiest = usage.stages[usage.bottleneck]
        numbers.append(("Step time", duration(usage.step_s), f"median of stage {busiest.stage}"))
        if len(usage.stages) > 1:
            note = f"computes {percent(busiest.utilisation, 0)} of the time"
            numbers.append(("Bottleneck", f"stage {busiest.stage}", note))
    return numbers


def _test_loss(epochs: tuple[EpochPoint, ...]) -> str:
    last = epochs[-1].test_loss if epochs else None
    return "" if last is None else f"test loss {count(last)}"


def _curves(run: RunFolder) -> Markup:
    shown = []
    losses = [point for point in run.batches if figures.is_finite(point.loss)]
    if losses or any(figures.is_finite(point.test_loss) for point in run.epochs):
        caption = "Training loss of each batch"
        if len(losses) > 1:
            caption += f", and its mean over {figures.smoothing(len(losses))} batches"
        shown.append(figure(figures.loss_curve(run.batches, run.epochs), f"{caption}.", title="Loss"))
    if any(figures.is_finite(point.test_accuracy) for point in run.epochs):
        shown.append(
            figure(figures.accuracy_curve(run.epochs), "Test accuracy after each epoch.", title="Test accuracy")
        )
    if not shown:
        return section("Training", element("p", "No loss and no accuracy was recorded.", class_="muted"))
    return section("Training", columns(*shown))


def _time(run: RunFolder, usage: Usage | None) -> Markup:
    title = "How the stages spent their time"
    if run.timeline is None or usage is None:
        return section(title, element("p", "No timeline was recorded.", class_="muted"))
    window = usage.window
    if window.steady:
        basis = f"{plural(window.num_steps, 'step')} in steady state ({duration(window.seconds)})"
    else:
        basis = (
            f"the whole run ({duration(window.seconds)}), warm-up and drain included, because it has too few "
            "steps for a steady state"
        )
    rows = [_stage_row(run, stage) for stage in usage.stages]
    head = (
        "Stage",
        "Utilisation",
        "Bubble",
        "Wait for activations",
        "Wait for gradients",
        "Wait for loader",
        "Step time, median",
        "from 10% to 90%",
        "Staleness",
        "Staleness, measured",
        "Inputs kept, at most",
    )
    return section(
        title,
        _picture(run, run.timeline),
        figure(
            figures.time_shares(usage),
            f"Shares of the time of each stage, over {basis}.",
            wide=True,
            title="Time shares",
        ),
        table(head, rows, text=(0, 1)),
        element(
            "p",
            f"Measured over {basis}. Staleness is measured as the batches by which the latest forward is ahead "
            "of a backward.",
            class_="muted",
        ),
    )


def _picture(run: RunFolder, timeline: Timeline) -> Markup:
    wanted = (run.staleness[0] if run.staleness is not None else 0) + 4
    window = timeline.window(min(max(wanted, _DRAWN_STEPS.start), _DRAWN_STEPS.stop - 1))
    batch = figures.followed_batch(timeline, window)
    caption = (
        f"{plural(window.num_steps, 'step')} from the middle of the run; the number in a box is its batch."
        if window.steady
        else "The whole run; the number in a box is its batch."
    )
    if batch is not None and timeline.num_stages > 1:
        caption += f" Batch {batch} is outlined: follow it down the stages and back up."
    if (run.path / "trace.json").is_file():
        caption += " The whole run is in trace.json, which ui.perfetto.dev opens."
    return figure(figures.timeline_picture(timeline, window, batch=batch), caption, wide=True, title="Timeline")


def _stage_row(run: RunFolder, stage: StageUsage) -> list[str]:
    staleness = run.staleness[stage.stage] if run.staleness is not None else None
    bar = f'<span class="meter"><i style="width:{100 * stage.utilisation:.0f}%"></i></span>'
    spread = NOT_RECORDED
    if stage.step_p10_s is not None and stage.step_p90_s is not None:
        spread = span(stage.step_p10_s, stage.step_p90_s)
    return [
        _stage(stage.stage),
        Markup(bar + percent(stage.utilisation)),
        percent(stage.bubble),
        percent(stage.shares[Activity.WAIT_ACTIVATION]),
        percent(stage.shares[Activity.WAIT_GRADIENT]),
        percent(stage.shares[Activity.WAIT_LOADER]),
        duration(stage.step_s),
        spread,
        count(staleness),
        count(stage.staleness),
        count(None if staleness is None else staleness + 1),
    ]


def _stage(stage: int) -> Markup:
    return Markup(f'<span class="swatch" style="background:{figures.stage_colour(stage)}"></span>stage {stage}')


def _partition(run: RunFolder) -> Markup:
    title = "Which layers each stage held"
    partition = run.partition
    if partition is None or not (partition.layers or partition.stages):
        return section(title, element("p", "No partition was recorded.", class_="muted"))
    content = []
    if partition.layers:
        svg, meaning = figures.partition_bar(partition)
        how = {
            "profile": " The cuts were chosen from a profile of the layers.",
            "fixed": " The cuts were given.",
        }.get(partition.method or "", "")
        content.append(figure(svg, f"Layers in order; {meaning}.{how}", wide=True))
    if partition.why is not None:
        content.append(element("p", f"The plan chose the staleness, too: {partition.why}."))
    if partition.stages:
        head = ("Stage", "Device", "Layers", "Parameters", "Forward", "Backward", "Predicted step", "Output")
        content.append(table(head, _partition_rows(run, partition), text=(0, 1)))
    if partition.layers:
        rows = [
            (
                str(layer.index),
                layer.name,
                layer.type,
                NOT_RECORDED if layer.stage is None else _stage(layer.stage),
                count(layer.parameters),
                duration(layer.forward_s),
                duration(layer.backward_s),
                size(layer.output_bytes),
            )
            for layer in partition.layers
        ]
        head = ("Layer", "Name", "Type", "Stage", "Parameters", "Forward", "Backward", "Output")
        content.append(details(f"All {len(rows)} layers", table(head, rows, text=(0, 1, 2, 3))))
    return section(title, *content)


def _partition_rows(run: RunFolder, partition: Partition) -> list[list[str]]:
    devices = run.environment.texts("devices")
    rows = []
    for part in partition.stages:
        layers = [layer for layer in partition.layers if layer.stage == part.stage]
        forward = [layer.forward_s for layer in layers if layer.forward_s is not None]
        backward = [layer.backward_s for layer in layers if layer.backward_s is not None]
        held = NOT_RECORDED
        if part.layers is not None:
            first, end = part.layers
            held = f"{first} to {end - 1}" if end - first > 1 else str(first) if end > first else "none"
        rows.append(
            [
                _stage(part.stage),
                devices[part.stage] if part.stage < len(devices) else NOT_RECORDED,
                held,
                count(part.parameters),
                duration(sum(forward) if layers and len(forward) == len(layers) else None),
                duration(sum(backward) if layers and len(backward) == len(layers) else None),
                duration(part.predicted_s),
                size(layers[-1].output_bytes if layers else None),
            ]
        )
    return rows


def _method(run: RunFolder) -> Markup:
    title = f"The method: {_method_title(run) or 'not recorded'}"
    staleness = run.staleness
    if staleness is None:
        return section(title, element("p", "No staleness was recorded.", class_="muted"))
    if not any(staleness):
        words = (
            "No stage is stale: every batch is backwarded with the weights of its forward, so the numbers "
            "are those of plain backpropagation."
        )
    else:
        delays = (
            f"{plural(steps, 'step')} later on stage {stage}" if steps else f"in the same step on stage {stage}"
            for stage, steps in enumerate(staleness)
        )
        words = (
            f"Staleness {staleness}: a batch that a stage forwards comes back for its backward "
            f"{listed(delays)}. In between the stage works on other batches and updates its weights each time."
        )
    if len(staleness) == 1:
        return section(title, element("p", words))
    queue, gradients = run.config.integers("queue"), run.config.integers("gradient_queue")
    rows = [
        (
            link(stage),
            count(staleness.slack[stage]),
            count(None if queue is None else queue[stage]),
            count(None if gradients is None else gradients[stage + 1]),
            state.value,
            _meaning(staleness, stage, state),
        )
        for stage, state in enumerate(staleness.links)
    ]
    head = ("Link", "Slack, in batches", "for activations", "for gradients", "State", "What it means")
    return section(title, element("p", words), table(head, rows, text=(0, 4, 5)))


def _meaning(staleness: Staleness, stage: int, state: LinkState) -> str:
    if state is LinkState.LOCKED:
        return f"Stage {stage} waits for stage {stage + 1} within every step."
    if state is LinkState.OVERLAPPED:
        return f"Stages {stage} and {stage + 1} work at the same time, but each feels any delay of the other."
    return f"Stage {stage} may run {staleness.slack[stage]} batches ahead of stage {stage + 1} before it waits."


def _record(record: Record, leave_out: tuple[str, ...] = ()) -> Markup:
    rows = [(name.replace("_", " "), _value(value)) for name, value in record.values.items() if name not in leave_out]
    return pairs(rows) if rows else element("p", "Not recorded.", class_="muted")


def _value(value: object) -> str:
    if value is None or value == "":
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(entry, int | float | str) for entry in value):
        return ", ".join(map(str, value)) or "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _repeat(run: RunFolder) -> Markup:
    command = run.environment.text("command")
    if command is None:
        return section("Repeat the run", element("p", "No command was recorded.", class_="muted"))
    commit = run.environment.text("commit")
    note = element("p", "At commit ", element("code", commit), ".", class_="muted") if commit else Markup("")
    return section("Repeat the run", listing(command), note)


def _footer(run: RunFolder, usage: Usage | None) -> Markup:
    notes = [element("ul", *(element("li", note) for note in run.notes), class_="muted")] if run.notes else []
    if notes:
        notes.insert(0, element("h3", "What this report lacks"))
    terms = (
        "Utilisation: part of the time in which a stage runs a forward, recompute, backward or update. "
        "Bubble: the rest. Waits: time in which a stage computes nothing and sends nothing while it receives "
        "an activation or a gradient, or loads a batch. Step time: interval between the ends of consecutive "
        "updates. Inputs kept: the staleness plus one, the batch at hand."
    )
    return element("footer", *notes, *([element("p", terms, class_="muted")] if usage else []))
