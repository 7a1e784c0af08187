"""What runs in a worker process that `launch` started."""

from __future__ import annotations

import atexit
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn, cast

from stalewise.errors import WorkerError
from stalewise.runtime.job import leave_job, report_failure
from stalewise.runtime.leftovers import group_members, remove_shared_memory, wait_until_dead
from stalewise.runtime.place import keep_places_in

__all__ = ["CHILD_VARIABLE", "import_and_run", "run_child"]

CHILD_VARIABLE = "STALEWISE_LAUNCH"
"""Set by `launch` for its children: a JSON object that says what to run."""
LEFT_S = 1.0
"""How long processes that are killed may take to die before what they leave is removed."""


def run_child(main: Callable[..., object], args: Sequence[Any]) -> NoReturn:
    """Call `main(*args)` as a worker and exit: 0, or 1 after a record of the failure was left in the store."""
    os.environ.pop(CHILD_VARIABLE, None)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _call(main, args)
    except SystemExit as error:  # terminated while it told of a failure
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    _exit_now(code)


def _call(main: Callable[..., object], args: Sequence[Any]) -> int:
    """The exit code of a worker; a failure is recorded."""
    try:
        try:
            main(*args)
        except SystemExit as error:
            if error.code:
                raise
        leave_job()
    except WorkerError:  # another worker's failure, which the parent shows
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        if isinstance(error.code, int):
            return error.code
        report_failure(error)
        return 1
    except BaseException as error:
        report_failure(error)
        return 1
    # What the script left to its threads and what it registered still runs.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cast(Any, threading)._shutdown()
    atexit._run_exitfuncs()
    return 0


def _exit_now(code: int) -> NoReturn:
    """End without waiting for threads that still wait for peers.

    The interpreter's own shutdown is left out: a daemon thread that comes back from torch in the middle of it aborts
    the process. So nothing may raise from here on, no signal either.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_helpers()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _end_with_parent() -> None:
    """The parent holds the other end of stdin; its end is ours, and that of all that this worker started."""
    while os.read(0, 1024):
        pass
    # What the main thread meets from now on is no worker's fault, and nobody is there to read it.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    own = os.getpid()
    if os.getpgrp() == own:
        started = [pid for pid in group_members(own) if pid != own]
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until_dead(started, LEFT_S)
        remove_shared_memory([*started, own])
    shutil.rmtree(cast(Any, multiprocessing.current_process())._config.get("tempdir", ""), ignore_errors=True)
    if os.getpgrp() == own:
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    try:
        _end_helpers()
    finally:
        raise SystemExit(128 + number)


def _pass(number: int, frame: FrameType | None) -> None:
    pass


def _end_helpers() -> None:
    """The processes of a data loader end first: one that meets the end of this one in a handshake complains of it."""
    # Torch would raise an error for each, and for one that came before it does so now. Not SIG_DFL, for which Python
    # complains of one that came before.
    with suppress(RuntimeError):
        signal.signal(signal.SIGCHLD, _pass)
    signal.signal(signal.SIGCHLD, _pass)
    helpers = [process for process in multiprocessing.active_children() if process.daemon]
    for process in helpers:
        process.kill()
    for process in helpers:
        process.join(LEFT_S)
    remove_shared_memory([process.pid for process in helpers if process.pid is not None])


def import_and_run() -> NoReturn:
    """Find `main` where `launch` said in the environment, and run it.

    A script is executed under another name than `__main__`; it may meet its own `launch` on the way, which then
    runs `main` and does not return.
    """
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
    _print_whole_lines()
    settings = json.loads(os.environ[CHILD_VARIABLE])
    # Where multiprocessing puts sockets, such as a data loader's: a process that is killed removes none of them.
    cast(Any, multiprocessing.current_process())._config["tempdir"] = settings["temporary"]
    keep_places_in(Path(settings["temporary"]))
    sys.path[:], sys.argv = settings["path"], settings["argv"]
    try:
        main = getattr(_module(settings), settings["name"])
    except Exception as error:
        report_failure(error)
        _exit_now(1)
    run_child(main, settings["args"])


def _print_whole_lines() -> None:
    """What `print` writes goes out a line at a time, also under PYTHONUNBUFFERED: workers share stdout and stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(line_buffering=True, write_through=False)


def _module(settings: dict[str, Any]) -> ModuleType:
    if "script" not in settings:
        return importlib.import_module(settings["module"])
    module = ModuleType("__stalewise_script__")
    module.__file__ = settings["script"]
    sys.modules[module.__name__] = module
    exec(compile(Path(settings["script"]).read_bytes(), settings["script"], "exec"), vars(module))
    return module
