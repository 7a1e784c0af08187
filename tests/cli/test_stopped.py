"""What Ctrl-C says, and a report that is written anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from stalewise.cli.main import app
from stalewise.experiments.run_writer import RunWriter

RUN = [
    *("train", "--model", "resnet8", "--data", "digits", "--train-limit", "40", "--test-limit", "8", "--epochs", "2"),
    *("--batch-size", "8", "--engine", "sequential", "--threads", "1", "--partition", "1,3", "--display", "quiet"),
]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "stopped; {} has no checkpoint to go on from, which --checkpoint-every N would leave."),
        (
            ("--checkpoint-every", "2", "--keep", "1"),
            "stopped; ckpt-000002-batch-5 is kept. To go on: stalewise train --resume {}",
        ),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the fifth batch; afterwards the report shows as much as there is."""
    write, count = RunWriter.add, 0

    def interrupted(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(RunWriter, "add", interrupted)
    done = CliRunner().invoke(app, [*RUN, *options, "--out", str(tmp_path / "run")])
    assert done.exit_code == 130
    assert said.format(tmp_path / "run") in done.stderr.splitlines()
    again = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert (again.exit_code, again.stdout) == (0, f"report: {tmp_path / 'run' / 'report.html'}\n")
