"""What killed processes leave, and how a worker ends that is told to end while it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from stalewise.runtime import leftovers
from stalewise.runtime.leftovers import group_members, remove_shared_memory, wait_until_dead


def test_members_of_a_group_until_they_are_dead() -> None:
    """A zombie is no member: it can do nothing any more."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        time.sleep(60)
        os._exit(0)
    os.setpgid(pid, pid)
    assert group_members(pid) == [pid]
    os.kill(pid, signal.SIGKILL)
    wait_until_dead([pid], 20)
    assert group_members(pid) == []
    os.waitpid(pid, 0)


def test_shared_memory_of_the_dead_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_SHARED_MEMORY", tmp_path)
    for name in ("torch_12_345_0", "torch_12_9_1", "torch_123_1_0", "sem.mp-12", "psm_12"):
        (tmp_path / name).touch()
    remove_shared_memory([12, 99])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["psm_12", "sem.mp-12", "torch_123_1_0"]


def test_a_worker_that_is_told_to_end_together_with_its_loader_ends_silently() -> None:
    """Both signals wait until Python gets to them, and torch's handler of the second one raises an error."""
    script = """
        import signal, threading
        from stalewise.runtime import child
        def died(number, frame):
            raise RuntimeError("a process of the data loader died")
        signal.signal(signal.SIGCHLD, died)
        signal.signal(signal.SIGTERM, child._terminate)
        both = {signal.SIGTERM, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            signal.pthread_kill(threading.get_ident(), number)  # no thread of torch's gets it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_failure_is_told_does_not_bring_the_interpreters_shutdown(number: signal.Signals) -> None:
    """Which may abort, and then prints what has nothing to do with the failure."""
    script = f"""
        import atexit, os, signal, time
        from stalewise.runtime import child
        atexit.register(print, "the interpreter shuts down")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
        def tell(error):
            os.kill(os.getpid(), {number.value})
            time.sleep(20)
        child.report_failure = tell
        def fail():
            raise ZeroDivisionError
        child.run_child(fail, [])
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        code = worker.wait(60)  # with an open stdin: a worker ends with whoever holds it
        assert worker.stdout is not None
        assert (code, worker.stdout.read()) == (128 + number, "")
