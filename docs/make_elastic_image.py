"""Make the picture of elastic staleness against fixed settings in the engine, from the results of the benchmark.

python benchmarks/elastic_engine.py --out docs/results/elastic.json
python docs/make_elastic_image.py docs/results/elastic.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib import rcParams

FIXED, ELASTIC = "#2b6cb0", "#2f855a"


def draw(results: dict[str, Any], target: Path) -> None:
    """Throughput over mean realised staleness, a panel per situation."""
    points = results["points"]
    names = list(dict.fromkeys(point["situation"] for point in points))
    figure, panels = plt.subplots(1, len(names), figsize=(1 + 3.2 * len(names), 3.6), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        here = [point for point in points if point["situation"] == name]
        for elastic, colour, marker, line in ((False, FIXED, "o", "-"), (True, ELASTIC, "D", "none")):
            own = sorted((p for p in here if p["elastic"] is elastic), key=lambda point: point["staleness"])
            panel.errorbar(
                [point["staleness"] for point in own],
                [point["samples_per_s"] for point in own],
                xerr=[point["staleness_half"] or 0.0 for point in own],
                yerr=[point["samples_per_s_half"] or 0.0 for point in own],
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=5,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
                label="elastic, by its bound" if elastic else "fixed",
            )
            for point in own:
                panel.annotate(
                    f"({','.join(map(str, point['setting']))})",
                    (point["staleness"], point["samples_per_s"]),
                    xytext=(0, 7 if elastic else -13),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                    ha="center",
                )
        panel.set(title=name, xlabel="mean realised staleness")
        panel.margins(x=0.15, y=0.25)
    panels[0][0].set_ylabel("samples/s")
    panels[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    options = results["options"]
    figure.suptitle(
        f"{options['model']}, batch {options['batch_size']}, {options['stages']} stages; mean and 95% interval over "
        f"{options['rounds']} rounds",
        fontsize=10,
    )
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    plt.switch_backend("svg")
    rcParams["svg.hashsalt"] = "stalewise"  # the same picture from the same results
    image = Path(__file__).parent / "images" / "elastic.svg"
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), image)
    print(image)
