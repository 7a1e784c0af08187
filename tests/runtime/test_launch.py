"""Ways to start a job: scripts of all forms, torchrun, and what cannot be started.

Importing torch takes each process seconds, so the scripts run beside each other, once for all tests.
"""

from __future__ import annotations

import builtins
import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import dist_net
import dist_workers
import pytest
from dist_equal import assert_equal
from dist_workers import load

import stalewise
from stalewise.errors import ConfigError, WorkerError
from stalewise.runtime import launch

TESTS = Path(__file__).parents[1]

PRELUDE = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import dist_net, dist_workers, torch
import stalewise

torch.set_num_threads(1)
with open(Path(sys.argv[1], "imported"), "a") as file:
    file.write(os.environ.get("RANK", "parent") + chr(10))

def train(folder, name, seed):
    pipe = dist_net.pipeline(2, seed=seed)
    losses = list(pipe.train(dist_net.batches(6, seed) if pipe.rank == 0 else None))
    dist_workers.save(folder, name, {{"losses": losses, "state": pipe.state_dict(), "argv": sys.argv[1:]}})

def leave_work(folder):
    import atexit, threading, time

    def late(name):
        time.sleep(0.5)
        Path(folder, name).touch()

    threading.Thread(target=late, args=["thread"]).start()
    atexit.register(late, "registered")
    sys.exit(0)

def talk():
    for _ in range(2000):
        print("a line of its own")
        print("a line of its own", file=sys.stderr)

def alone(folder):
    pipe = dist_net.pipeline(2, engine="sequential")
    dist_workers.save(folder, "alone", list(pipe.train(dist_net.batches(3, 1))))
    sys.exit(0)
"""

SCRIPTS = {
    "without a guard": """
folder = sys.argv[1]
stalewise.launch(alone, num_workers=1, args=[folder])
print("between")
stalewise.launch(train, num_workers=2, args=[folder, "first", 1])
print("after")
""",
    "with a guard": """
if __name__ == "__main__":
    stalewise.launch(train, num_workers=2, args=[sys.argv[1], "first", 1])
    print("after")
""",
    "as a folder": """
if __name__ == "__main__":
    stalewise.launch(alone, num_workers=1, args=[sys.argv[1]])
    print("after")
""",
    "work left": """
stalewise.launch(leave_work, num_workers=1, args=[sys.argv[1]])
print("after")
""",
    "many voices": """
stalewise.launch(talk, num_workers=3)
""",
    "python -m": """
stalewise.launch(train, num_workers=2, args=[sys.argv[1], "first", 1])
print("after")
""",
    "torchrun": """
def main(folder):
    assert stalewise.Pipeline.__module__
    for name, seed in (("first", 1), ("second", 2), ("third", 1)):
        train(folder, name, seed)
    pipe = dist_net.pipeline(2)
    for loss in pipe.train(dist_net.batches(9, 3) if pipe.rank == 0 else None):
        break
    if pipe.rank == 1:
        sys.exit(0)

stalewise.launch(main, num_workers=7, args=[sys.argv[1]])
print("after")
""",
}


@dataclass(frozen=True)
class Finished:
    """A script that ended."""

    code: int
    output: str
    folder: Path

    def results(self, name: str, num_workers: int = 2) -> list[Any]:
        """What its ranks left."""
        return load(self.folder, name, num_workers)

    def imports(self) -> list[str]:
        """Ranks, in order, that ran the top level of the script."""
        return sorted((self.folder / "imported").read_text().split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """All scripts, run beside each other."""
    running = {}
    for name, text in SCRIPTS.items():
        folder = tmp_path_factory.mktemp("script")
        package = folder / "package"
        package.mkdir()
        (package / "__init__.py").touch()
        script = package / ("__main__.py" if name == "as a folder" else "train.py")
        script.write_text(PRELUDE.format(tests=str(TESTS)) + text)
        if name in ("with a guard", "as a folder"):  # Python does not look there, so workers must not either
            (folder / "queue.py").write_text("raise AssertionError")
        command = {
            "python -m": ["-m", "package.train"],
            "as a folder": ["package"],
            "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        }.get(name, ["package/train.py"])
        with open(folder / "output", "wb") as output:
            running[name] = (
                folder,
                subprocess.Popen(
                    [sys.executable, *command, str(folder)],
                    cwd=folder,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                ),
            )
    try:
        codes = {name: process.wait(400) for name, (_, process) in running.items()}
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()
    return {
        name: Finished(codes[name], (folder / "output").read_text(), folder) for name, (folder, _) in running.items()
    }


def expected(seed: int) -> dict[str, Any]:
    """What the scripts' training gives in this process."""
    pipe = dist_net.pipeline(2, seed=seed, engine="sequential")
    losses = list(pipe.train(dist_net.batches(6, seed)))
    return {"losses": losses, "state": pipe.state_dict()}


def assert_trained(script: Finished, name: str, seed: int) -> None:
    """Both ranks got what one process gets, and saw the script's arguments."""
    for result in script.results(name):
        assert result.pop("argv") == [str(script.folder)]
        assert_equal(result, expected(seed))


@pytest.mark.dist
@pytest.mark.slow
class TestScripts:
    def test_without_a_guard(self, finished: dict[str, Finished]) -> None:
        """Two launches; each worker runs the script up to its own one, and nothing after it."""
        script = finished["without a guard"]
        assert script.code == 0, script.output
        assert len(script.results("alone", 1)[0]) == 3
        assert_trained(script, "first", 1)
        assert sorted(script.output.split()) == ["after", *["between"] * 3]
        assert script.imports() == [*"001", "parent"]

    def test_what_is_left_to_threads_and_handlers_is_done(self, finished: dict[str, Finished]) -> None:
        script = finished["work left"]
        assert (script.code, script.output) == (0, "after\n")
        assert (script.folder / "thread").exists()
        assert (script.folder / "registered").exists()

    def test_what_workers_print_stays_in_lines(self, finished: dict[str, Finished]) -> None:
        """Unbuffered, Python writes the end of a line by itself, and another worker's line comes between."""
        script = finished["many voices"]
        assert script.code == 0, script.output
        assert script.output == "a line of its own\n" * 12_000

    @pytest.mark.parametrize("name", ["with a guard", "python -m"])
    def test_other_forms(self, name: str, finished: dict[str, Finished]) -> None:
        script = finished[name]
        assert script.code == 0, script.output
        assert_trained(script, "first", 1)
        assert script.output.split() == ["after"]
        assert script.imports() == [*"01", "parent"]

    def test_as_a_folder(self, finished: dict[str, Finished]) -> None:
        """Python calls its __main__.py a module of that name."""
        script = finished["as a folder"]
        assert script.code == 0, script.output
        assert len(script.results("alone", 1)[0]) == 3
        assert script.imports() == ["0", "parent"]

    def test_torchrun(self, finished: dict[str, Finished]) -> None:
        """launch calls main in each process; a rank may leave with exit code 0 while others drain."""
        script = finished["torchrun"]
        assert script.code == 0, script.output
        for name, seed in (("first", 1), ("second", 2), ("third", 1)):
            assert_trained(script, name, seed)
        assert script.output.split().count("after") == 1
        assert "Traceback" not in script.output


@pytest.mark.dist
@pytest.mark.slow
def test_a_launcher_that_looks_late_still_names_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the others have told that they lost it."""
    monkeypatch.setattr(launch, "POLL_S", 9.0)
    with pytest.raises(WorkerError, match=r"^stage 1 .* exited with code 3 and gave no reason\.") as caught:
        stalewise.launch(dist_workers.one_leaves, num_workers=2)
    assert caught.value.cause_type == "Exited"


class TestWhatCannotBeStarted:
    @pytest.mark.parametrize("num_workers", [0, -1, 2.0, True, "2", None])
    def test_number_of_workers(self, num_workers: Any) -> None:
        with pytest.raises(ConfigError, match="a job has at least 1 worker"):
            stalewise.launch(dist_workers.long_run, num_workers=num_workers)

    def test_functions_that_no_other_process_finds(self) -> None:
        def closure() -> None:
            pass

        for function in (closure, lambda: None, functools.partial(closure), Finished.results):
            with pytest.raises(ConfigError, match=r'engine="sequential"|under the name by which it is defined'):
                stalewise.launch(function, num_workers=2)

    def test_a_function_under_another_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = dist_workers.long_run
        monkeypatch.setattr(dist_workers, "long_run", lambda: None)
        with pytest.raises(ConfigError, match=r"dist_workers.long_run: importing the module gives another object"):
            stalewise.launch(original, num_workers=2)

    @pytest.mark.parametrize(
        ("argument", "message"), [(Path("folder"), "use JSON values only"), ("x" * 100_000, "Write them to a file")]
    )
    def test_arguments_that_cannot_be_passed_on(self, argument: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            stalewise.launch(dist_workers.long_run, num_workers=2, args=[argument])

    @pytest.mark.parametrize("place", ["interactive session", "standard input", "notebook"])
    def test_what_no_file_holds(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        script = ModuleType("__main__")
        exec("def main():\n    pass", vars(script))
        if place == "standard input":
            script.__file__ = "<stdin>"
        if place == "notebook":
            script.__file__ = __file__
            monkeypatch.setattr(builtins, "get_ipython", lambda: None, raising=False)
        monkeypatch.setitem(sys.modules, "__main__", script)
        with pytest.raises(ConfigError, match=r"main from a notebook or an interactive session.*engine=.sequential"):
            stalewise.launch(script.main, num_workers=2)
