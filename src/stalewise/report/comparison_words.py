"""What the numbers of a comparison say, in sentences, and what forbids to read them as they stand."""

from __future__ import annotations

from stalewise.report.comparison_columns import percent_target
from stalewise.report.comparison_data import Comparison, TableRow
from stalewise.report.wording import duration, listed, percent, plural, size

__all__ = ["TERMS", "key_numbers", "lead", "target_words", "warnings"]

TERMS = (
    "Samples/s and time per epoch: while training, drains included, evaluations not. Speed-up: ratio of samples/s to "
    "that of backpropagation over the same stages. Slow-down: by how much longer the training takes with the slow "
    "steps than without; floor: their mean over all steps, which no method avoids; the model has the durations of "
    "the calm run and the same slow steps. Utilisation: part of the time in which a stage computes, in steady "
    "state. Staleness: batches by which the latest forward of a stage is ahead of a backward, mean over the whole run, "
    "warm-up and drains included. Gradient difference: norm of the difference to the gradient of backpropagation, over "
    "the norm of the latter, as measured last. Peak memory: tensors of a stage. Resident: the whole process, as the "
    "operating system counts it. Sent: bytes of all messages between stages."
)
"""What the columns mean."""


def lead(comparison: Comparison) -> str:
    """What came out, in a sentence or two."""
    done = [row for row in comparison.rows if row.done and not row.baseline]
    if not done:
        return "No method has a result yet."
    timed = [row for row in done if row.samples_per_s is not None]
    base = next((row for row in done if row.name == "bp"), None)
    sentences = []
    if timed:
        fastest = max(timed, key=lambda row: row.samples_per_s.mean if row.samples_per_s else 0.0)
        words = f"{fastest.title} trains fastest"
        if base is not None and fastest is not base and fastest.speed_up is not None:
            words += (
                f": {fastest.speed_up.mean:.2f} times as many samples per second as backpropagation over the same "
                f"{plural(comparison.settings.get('stages') or 0, 'stage')}"
            )
            if fastest.test_accuracy is not None and base.test_accuracy is not None:
                words += f", and ends {_points(fastest.test_accuracy.mean - base.test_accuracy.mean)}"
        sentences.append(f"{words}.")
        sentences += _faster_baselines(comparison, fastest)
    scored = [row for row in done if row.test_accuracy is not None]
    if scored:
        best = max(scored, key=lambda row: row.test_accuracy.mean if row.test_accuracy else 0.0)
        sentences.append(f"{best.title} reaches the highest test accuracy, {_percent(best)}.")
    return " ".join(sentences)


def _faster_baselines(comparison: Comparison, fastest: TableRow) -> list[str]:
    """Where a pipeline is not what trains this model fastest, that comes first."""
    assert fastest.samples_per_s is not None
    rates = [(row.title, row.samples_per_s.mean) for row in comparison.rows if row.baseline and row.samples_per_s]
    ratios = [(title, rate / fastest.samples_per_s.mean) for title, rate in rates]
    return [
        f"{title}, which needs no pipeline, is {ratio:.2f} times as fast as that."
        for title, ratio in ratios
        if ratio > 1.005
    ]


def key_numbers(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The best method in each respect; baselines do not compete."""
    done = [row for row in comparison.rows if row.done and not row.baseline]
    numbers = []
    if timed := [(row.samples_per_s.mean, row) for row in done if row.samples_per_s is not None]:
        rate, row = max(timed, key=lambda pair: pair[0])
        value = f"{rate:,.0f}/s" if row.speed_up is None else f"{row.speed_up.mean:.2f}×"
        numbers.append(("Fastest", value, f"{row.title}, {rate:,.0f} samples/s"))
    if scored := [(row.test_accuracy.mean, row) for row in done if row.test_accuracy is not None]:
        accuracy, row = max(scored, key=lambda pair: pair[0])
        numbers.append(("Most accurate", percent(accuracy, 2), row.title))
    if reached := [
        (row.target_s.mean, row) for row in done if row.target_s is not None and row.target_reached == row.done
    ]:
        seconds, row = min(reached, key=lambda pair: pair[0])
        numbers.append((f"First to {percent_target(comparison.target_accuracy)}", duration(seconds), row.title))
    if held := [(row.memory_total.mean, row) for row in done if row.memory_total is not None]:
        memory, row = min(held, key=lambda pair: pair[0])
        numbers.append(("Least memory", size(memory), row.title))
    return numbers


def warnings(comparison: Comparison) -> list[tuple[str, str]]:
    """What forbids to read the numbers as they stand: a clause, and what follows from it."""
    found = []
    if comparison.settings.get("engine") == "sequential":
        found.append(
            (
                "The stages took turns in one process",
                "the accuracies are those of a real pipeline, the times are not. Compare with the distributed engine.",
            )
        )
    processes, cores = comparison.settings.get("stages") or 0, comparison.machine.get("cores") or 0
    gpus = comparison.machine.get("gpus")
    if 0 < cores < processes and not gpus and not found:
        found.append(
            (
                f"{plural(processes, 'stage')} shared {plural(cores, 'core')}",
                (
                    "stages that would work at the same time waited for each other, so speed-ups are smaller than "
                    "on a machine with a core per stage."
                ),
            )
        )
    if every := comparison.settings.get("gradient_difference_every"):
        found.append(
            (
                "The runs measured gradient differences",
                f"every {every} batches, which takes time that the speeds include. Compare speeds without it.",
            )
        )
    missing = [row.name for row in comparison.rows if row.done < len(row.runs)]
    if missing:
        found.append(("Not every run has a result", f"those of {listed(missing)} failed or are still to come."))
    return found


def target_words(comparison: Comparison) -> str:
    target = comparison.target_accuracy
    if target is None:
        return ""
    chosen = "was asked for" if comparison.target_given else "is 0.95 times the worst final accuracy of all rows"
    return (
        f"A target accuracy of {percent_target(target)} {chosen}; the time to it is that of the first epoch that "
        "reaches it, evaluations included."
    )


def _points(difference: float) -> str:
    if abs(difference) < 5e-4:
        return "at the same test accuracy"
    return f"{abs(100 * difference):.1f} points {'above' if difference > 0 else 'below'} it in test accuracy"


def _percent(row: TableRow) -> str:
    return percent(None if row.test_accuracy is None else row.test_accuracy.mean, 2)
