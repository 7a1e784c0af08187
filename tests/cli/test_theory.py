"""`stalewise theory`."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from stalewise.cli.main import app
from stalewise.errors import ConfigError
from stalewise.theory import proven_condition, quoted_condition, stability_limit


def test_the_learning_rates_of_a_staleness() -> None:
    done = CliRunner().invoke(app, ["theory", "lr", "--staleness", "4,2,0", "--momentum", "0.9", "--curvature", "2"])
    assert done.exit_code == 0, done.output
    for condition in (proven_condition, quoted_condition):
        for form in ({}, {"momentum": 0.9}, {"momentum": 0.9, "s": 1.0}):
            assert f"{condition((4, 2, 0), lipschitz=1, error_bound=1, **form).learning_rate:.3e}" in done.output
    for trained in ((4,), (2,), (0,), (4, 2, 0)):
        assert f"{stability_limit(trained, momentum=0.9, s=1) / 2:.4f}" in done.output
    assert "0.1910" in done.output, "0.3820 / 2"


@pytest.mark.parametrize("wrong", [["--staleness", "2,4,0"], ["--curvature", "0"], ["--momentum", "1"]])
def test_wrong_numbers_are_refused(wrong: list[str]) -> None:
    done = CliRunner().invoke(app, ["theory", "lr", *wrong])
    assert isinstance(done.exception, ConfigError)
