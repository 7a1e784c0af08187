"""Bad input of every kind ends in an error of ours that says what to do: the fuzzer of `benchmarks` in a short form."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import bad_commands
import bad_input
import pytest
import torch
from bad_cases import Case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import stalewise
from stalewise.checkpoint.batch_file import read_batch
from stalewise.methods import build_method

FEW = {"commands": 15, "data files": 24, "run folders": 4, "output folders": 8}
"""Tries of the kinds that take longer, or have more to try; 12 of the others."""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STALEWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # Its 2% of separate processes are for the long form.
    monkeypatch.setattr(bad_commands, "processes", bad_commands.commands)
    (tmp_path / "bad_models.py").write_text(bad_input.MODELS)
    (tmp_path / "bad_broken.py").write_text("raise OSError('while it is imported')\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", bad_input.KINDS)
def test_bad_input_is_refused_or_harmless(kind: str, scratch: Path) -> None:
    for number in range(FEW.get(kind, 12)):
        torch.manual_seed(number)
        case = bad_input.KINDS[kind](Random(f"test/{number}"), scratch)
        verdict, detail = bad_input.judge(case)
        assert verdict in ("refused", "harmless"), f"try {number}: {verdict}: {case.what}\n{detail}"


def test_the_fuzzer_sees_what_is_wrong() -> None:
    def judged(act: object, must_fail: bool = True) -> str:
        return bad_input.judge(Case("it", act, must_fail))[0]  # type: ignore[arg-type]

    def refuse() -> None:
        raise stalewise.ConfigError("what happened, the rule that it breaks, and what to do.")

    def mumble() -> None:
        raise stalewise.ConfigError("no")

    assert judged(refuse) == "refused"
    assert judged(mumble) == "unclear"
    assert judged(lambda: 1 / 0) == "raw"
    assert judged(lambda: None) == "taken"
    assert judged(lambda: None, must_fail=False) == "harmless"


def test_exit_codes_are_those_of_the_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users.py").write_text(
        "from torch import nn\n"
        "class Fails(nn.Module):\n"
        "    def forward(self, inputs): raise KeyError('mine')\n"
        "def build(): return [nn.Flatten(), Fails(), nn.Linear(192, 10)]\n"
    )
    line = ["train", *bad_commands.RUN, "--model", "users:build", "--partition", "1", "--display", "quiet"]
    with pytest.raises(bad_commands.Wrong, match=r"exit code 1: (?s:.)*users.py(?s:.)*KeyError: 'mine'"):
        bad_commands.obey([*line, "--out", "run"])
    with pytest.raises(stalewise.ConfigError, match="is not empty"):
        bad_commands.obey([*line, "--out", "."])
    bad_commands.obey(["program", "--stages", "2"])


def test_a_loss_that_is_not_finite_ends_a_run_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wild = ["train", *bad_commands.RUN, "--lr", "1e25", "--lr-schedule", "constant", "--display", "quiet"]
    with pytest.raises(bad_commands.Wrong, match=r"exit code 1: .*(?s:.)*run.nonfinite.batch-1.json"):
        bad_commands.obey([*wild, "--out", "run"])
    inputs, target = read_batch(tmp_path / "run" / "nonfinite" / "batch-1.json")
    assert (len(inputs), len(target)) == (16, 16)
    bad_commands.obey([*wild, "--on-nan", "skip", "--out", "skipped"])
    summary = json.loads((tmp_path / "skipped" / "summary.json").read_text())
    assert (summary["batches"], summary["skipped_batches"]) == (2, 1)


sizes = st.integers(0, 5)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64])
inputs = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), st.lists(sizes, max_size=4), dtypes)
leaves = st.one_of(inputs, st.none(), st.integers(), st.text(max_size=3))
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.tuples(inner, inner), max_leaves=4)


@settings(max_examples=40)
@given(st.lists(st.tuples(trees, trees), min_size=1, max_size=3), st.sampled_from(["dsp", "bp", "gpipe", "ddg"]))
@pytest.mark.filterwarnings("ignore")
def test_any_batches_are_trained_with_or_refused(batches: list[tuple[object, object]], method: str) -> None:
    pipeline = stalewise.Pipeline(
        [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)],
        method=build_method(method, num_stages=2),
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        partition=(2,),
    )
    good = (torch.ones(4, 4), torch.zeros(4, dtype=torch.int64))
    case = Case("batches", lambda: list(pipeline.train([good, *batches, good])), must_fail=False)
    verdict, detail = bad_input.judge(case)
    assert verdict in ("refused", "harmless"), detail


@settings(max_examples=40)
@given(
    st.sampled_from(["--stages", "--staleness", "--queue", "--option", "--method", "--batches"]), st.text(max_size=8)
)
def test_any_text_after_an_option_is_obeyed_or_refused(option: str, text: str) -> None:
    assume(len(text) < 4 or not text.strip().isdigit())  # a program of so many stages is good, and long
    case = Case(f"program {option} {text!r}", lambda: bad_commands.obey(["program", option, text]), must_fail=False)
    verdict, detail = bad_input.judge(case)
    assert verdict in ("refused", "harmless"), detail
