"""Make the picture of what slow steps cost each method, from the results of the benchmark.

python benchmarks/stragglers.py --out docs/results/stragglers.json
python docs/make_straggler_image.py docs/results/stragglers.json
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib import rcParams

STYLES = {
    "torch": ("#b04a3a", "s", "--"),
    "dsp": ("#2b6cb0", "o", "-"),
    "elastic": ("#2f855a", "D", "-"),
    "other": ("#8a8a8a", "^", ":"),
}


def draw(results: dict[str, Any], target: Path) -> None:
    """Speed left; measured and predicted slow-down right."""
    runs, batch = results["runs"], results["options"]["batch_size"]
    names = [name for name in dict.fromkeys(runs) if name != "spells"]
    percents = [0.0 if name == "calm" else float(name.strip("+%")) for name in names]
    figure, (speed, slow) = plt.subplots(1, 2, figsize=(11.5, 6))
    ends: list[tuple[float, str, str]] = []
    for row in results["rows"]:
        family = (
            "torch"
            if row["torch"]
            else "elastic"
            if "elastic" in row["label"]
            else "dsp"
            if " dsp" in row["label"]
            else "other"
        )
        colour, marker, line = STYLES[family]
        alpha = 0.45 if "stored" in row["label"] else 1.0
        label = row["label"].removeprefix("stalewise ")
        speeds = [batch / median_of(row["windows_s"], runs, name) for name in names]
        speed.plot(percents, speeds, color=colour, marker=marker, linestyle=line, alpha=alpha, markersize=4)
        ends.append((speeds[-1], label, colour))
        if row["model_s"] is not None:
            measured = [100 * slow_down(row["windows_s"], runs, name) for name in names]
            model = [100 * slow_down(row["model_s"], runs, name) for name in names]
            slow.plot(measured, model, color=colour, marker=marker, linestyle="none", alpha=alpha, markersize=5)
    largest = max(slow.get_xlim()[1], slow.get_ylim()[1])
    slow.fill_between([0, largest], [-5, largest - 5], [5, largest + 5], color="#dddddd", label="within 5 points")
    slow.plot([0, largest], [0, largest], color="black", linewidth=0.8)
    slow.set(xlabel="slow-down measured, %", ylabel="slow-down of the model, %", xlim=(0, largest), ylim=(0, largest))
    slow.legend(frameon=False)
    speed.set(xlabel="a slow step takes longer by, %", ylabel="samples/s", ylim=(0, None))
    speed.set(xticks=percents, xlim=(-8, percents[-1] * 1.45))
    gap, place = speed.get_ylim()[1] / 34, -math.inf
    for height, label, colour in sorted(ends):
        place = max(height, place + gap)
        speed.annotate(
            label,
            (percents[-1] + 2, height),
            xytext=(percents[-1] * 1.07, place),
            color=colour,
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )
    options = results["options"]
    figure.suptitle(
        f"{options['model']}, batch {batch}, {options['stages']} stages, each slow with probability "
        f"{options['probability']:.2g} in each step"
    )
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


def median_of(windows_s: list[float], runs: list[str], name: str) -> float:
    """Seconds per step over the rounds."""
    return statistics.median(seconds for seconds, other in zip(windows_s, runs, strict=True) if other == name)


def slow_down(windows_s: list[float], runs: list[str], name: str) -> float:
    """Against the calm run of the same round, in the median."""
    calm = [seconds for seconds, other in zip(windows_s, runs, strict=True) if other == "calm"]
    slowed = [seconds for seconds, other in zip(windows_s, runs, strict=True) if other == name]
    return statistics.median(slow / quiet - 1 for slow, quiet in zip(slowed, calm, strict=True))


if __name__ == "__main__":
    plt.switch_backend("svg")
    rcParams["svg.hashsalt"] = "stalewise"  # the same picture from the same results
    image = Path(__file__).parent / "images" / "stragglers.svg"
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), image)
    print(image)
