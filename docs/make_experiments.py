"""Write docs/experiments.md from the files in experiments/results, and from nothing else.

python docs/make_experiments.py
"""

import json
from pathlib import Path

from stalewise.experiments.experiment import Experiment
from stalewise.experiments.paper import EXPERIMENTS
from stalewise.report.experiment_report import markdown_report, read_rows

ROOT = Path(__file__).parents[1]
HEAD = """# Experiments

Made by `python docs/make_experiments.py` from `experiments/results`; a test holds it to these files. Each experiment is
a declaration in `src/stalewise/experiments/paper_learning.py` or `paper_systems.py`, and one command:

    stalewise reproduce NAME --scale smoke      minutes on two cores: that everything works
    stalewise reproduce NAME --scale short      what is shown here, about an hour each
    stalewise reproduce NAME --scale full       the papers' settings

Interrupted, the same command goes on; `--part PART` runs one line of the tables' first column alone. What is learned
does not depend on where stages run, so these experiments run all stages in one process, several runs at a time with
`--jobs N`, and a run that two experiments ask for is made once; their times say nothing and are left out. Times and
memory are measured with a process for each stage, one run after another. `--results experiments/results` keeps tables
and plots. All of `short`:

    stalewise reproduce all --scale short --data PATH-OF-CIFAR-10-PARQUET --jobs 4 --results experiments/results

On an accelerator, `--engine sequential --device cuda:0 --label NAME` runs all stages in one process and keeps its
files beside those of other hardware.

Values are not compared with those of the DSP paper's tables.
"""


def document(results: Path) -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_chapter(entry, results) for entry in EXPERIMENTS.values())])


def _chapter(entry: Experiment, results: Path) -> str:
    found = [
        file
        for file in sorted(results.glob(f"{entry.name}-*.json"))
        if json.loads(file.read_text(encoding="utf-8"))["experiment"] == entry.name
    ]
    if not found:
        scales = " and ".join(scale for scale in entry.plans if scale != "smoke")
        return f"## {entry.title}\n\n{entry.question}\n\nNot run yet: {scales}.\n"
    chapters = []
    for file in found:
        about = json.loads(file.read_text(encoding="utf-8"))
        plots = [f"../experiments/results/{plot.name}" for plot in sorted(results.glob(f"{file.stem}-*.svg"))]
        rows = read_rows(file.with_suffix(".csv"))
        chapters.append(markdown_report(entry.title, entry.question, entry.columns, rows, about, plots))
    ran = {json.loads(file.read_text(encoding="utf-8"))["scale"] for file in found}
    missing = [scale for scale in entry.plans if scale not in ran | {"smoke"}]
    return "\n".join([*chapters, *([f"Not run: {' and '.join(missing)}.\n"] if missing else [])])


if __name__ == "__main__":
    (ROOT / "docs" / "experiments.md").write_text(document(ROOT / "experiments" / "results"), encoding="utf-8")
