"""Start K local worker processes, watch them, and end all when one fails.

    parent: store, K processes ──► child: main() ──► exit 0
       │                             │ raises: record ─► store, exit 1
       ├─ a child died: the record (or the signal) becomes a WorkerError; the others are ended
       ├─ Ctrl-C: the children are ended, KeyboardInterrupt goes on
       └─ the parent dies: the pipe to each child closes, and the child ends itself

Each child is a process group of its own, so that what it started (data loader workers) ends with it, and Ctrl-C in a
terminal reaches the parent alone.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from stalewise.errors import ConfigError, NonFiniteLoss, ProgramError, WorkerError
from stalewise.runtime.allocator import allocator_environment
from stalewise.runtime.child import CHILD_VARIABLE, run_child
from stalewise.runtime.cores import threads_per_process
from stalewise.runtime.failure import describe_doing, describe_failure, failure_key, rank_key, read_record
from stalewise.runtime.leftovers import group_members, remove_shared_memory, wait_until_dead
from stalewise.runtime.place import last_place
from stalewise.runtime.store import host_store

__all__ = ["launch"]

POLL_S = 0.05
MAX_SETTINGS_BYTES = 100_000

TERMINATE_S = 3.0
"""Between asking the workers to end and ending them."""

_launches = 0


def launch(main: Callable[..., object], *, num_workers: int, args: Sequence[Any] = (), max_restarts: int = 0) -> None:
    """Run `main(*args)` in `num_workers` local processes, one per stage, and wait for them.

    Under torchrun, whose processes exist already, it just calls `main`. Each worker imports the module that defines
    `main`; where that is the calling script, it needs no `if __name__ == "__main__"` guard: a worker that meets this
    call while it imports the script calls `main` here and exits. (With a guard, what it guards runs in the parent
    alone; without one, what stands before this call runs in every worker.)

    Args:
        main: a function at the top level of a module or script.
        num_workers: K.
        args: for `main`; JSON values.
        max_restarts: how often all workers are started again after one failed, but for errors in what was asked for
            (`ConfigError`). `main` begins anew then; `Pipeline.resume(.., missing_ok=True)` at its start takes up the
            newest checkpoint. torchrun has an option of the same name and the same effect.

    Raises:
        ConfigError: where `main` cannot be found by another process, such as a closure or a notebook's function.
        WorkerError: where a worker failed; it holds the worker's own traceback. All workers are gone by then.
    """
    global _launches
    _launches += 1
    child = os.environ.get(CHILD_VARIABLE)
    if child is not None:
        settings = json.loads(child)
        if settings["launch"] == _launches:
            run_child(main, settings["args"])
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        main(*args)
        return
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
        raise ConfigError(f"num_workers is {num_workers!r}; a job has at least 1 worker.")
    if isinstance(args, str) or not isinstance(args, Sequence):
        raise ConfigError(f"args is {args!r}; it must be a list of JSON values, one per argument of main.")
    settings = {
        **_where_to_find(main),
        "args": list(args),
        "argv": sys.argv,
        "path": sys.path,
        "launch": _launches,
    }
    try:
        size = len(json.dumps(settings))
    except TypeError as error:
        raise ConfigError(f"launch cannot pass its args on: {error}; use JSON values only.") from None
    if size > MAX_SETTINGS_BYTES:
        raise ConfigError(
            f"launch cannot pass its args on: they take {size} bytes, and the environment of a process holds "
            f"{MAX_SETTINGS_BYTES}. Write them to a file and pass its name."
        )
    _check_restarts(max_restarts)
    for restart in range(max_restarts + 1):
        try:
            _Workers(settings, num_workers, restart=restart).wait()
            return
        except WorkerError as error:
            if restart == max_restarts or _would_come_again(error):
                raise
            print(
                f"stalewise: {str(error).rstrip()}\nstalewise: starting again, {restart + 1} of {max_restarts}",
                file=sys.stderr,
                flush=True,
            )


def _would_come_again(error: WorkerError) -> bool:
    return error.wrong_input or error.cause_type in (ProgramError.__name__, NonFiniteLoss.__name__)


def _check_restarts(max_restarts: object) -> None:
    if isinstance(max_restarts, bool) or not isinstance(max_restarts, int) or max_restarts < 0:
        raise ConfigError(f"max_restarts is {max_restarts!r}; it must be a whole number of at least 0.")


def _where_to_find(main: Callable[..., object]) -> dict[str, str]:
    """How a new process gets at `main`: its name, and the module or script that defines it."""
    name = getattr(main, "__qualname__", "") if callable(main) else ""
    module = getattr(main, "__module__", "")
    if not name or "<" in name:
        raise ConfigError(
            f"launch cannot start {name or main!r}: another process can only find a function at the top level of a "
            'module or script. Move it there, or use engine="sequential", which needs no other process.'
        )
    if not inspect.isfunction(main):
        raise ConfigError(f"launch cannot start {main!r}; give a function that is written in Python.")
    if module == "__main__":
        return {"name": name, **_this_script(name)}
    found = getattr(importlib.import_module(module), name, None) if module else None
    if found is not main:
        raise ConfigError(
            f"launch cannot start {module}.{name}: importing the module gives another object. Pass the function "
            "under the name by which it is defined."
        )
    return {"name": name, "module": module}


def _this_script(name: str) -> dict[str, str]:
    """The running script, as what another process can import."""
    script = sys.modules["__main__"]
    spec = getattr(script, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return {"module": spec.name}
    path = getattr(script, "__file__", None)
    if path is None or not os.path.isfile(path) or "get_ipython" in vars(builtins):
        raise ConfigError(
            f"launch cannot start {name} from a notebook or an interactive session, because other processes cannot "
            'import it from there. Use engine="sequential", or put it into a script.'
        )
    return {"script": os.path.abspath(path)}


class _Workers:
    """The processes of one launch.

    Args:
        settings: for each of them.
        num_workers: K.
        restart: how often they were started before.
    """

    def __init__(self, settings: dict[str, Any], num_workers: int, *, restart: int) -> None:
        self._restart = restart
        self._temporary = tempfile.mkdtemp(prefix="stalewise-")
        self._store = host_store("127.0.0.1", 0, timedelta(seconds=60))
        threads = threads_per_process(num_workers)
        environment = {
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            **allocator_environment(),
            "OMP_NUM_THREADS": str(threads),
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch warns of every closed connection; the first cause says it all
            **os.environ,
            CHILD_VARIABLE: json.dumps({**settings, "temporary": self._temporary}),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(restart),
            "WORLD_SIZE": str(num_workers),
            "LOCAL_WORLD_SIZE": str(num_workers),
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(num_workers):
                self._processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            "-P",
                            "-c",
                            "from stalewise.runtime.child import import_and_run as run; run()",
                        ],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        process_group=0,
                    )
                )
        except BaseException:
            self._end()
            raise

    def wait(self) -> None:
        """Until all are done; ends all and raises as soon as one failed."""
        try:
            while True:
                codes = [process.poll() for process in self._processes]
                failed = [rank for rank, code in enumerate(codes) if code]
                if failed:
                    # Where one was killed, or left by itself, the others only lost it.
                    raise self._reason(min(failed, key=lambda rank: (not _signal_of(codes[rank]), codes[rank] == 1)))
                if all(code == 0 for code in codes):
                    return
                time.sleep(POLL_S)
        finally:
            self._end()

    def _reason(self, rank: int) -> WorkerError:
        """Why the job failed: the first worker's own record, or how this one ended."""
        process = self._processes[rank]
        code = process.returncode
        who = f"stage {rank} (rank {rank}, host {os.uname().nodename}, pid {process.pid})"
        name = _signal_of(code)
        ended = f"{who} was killed by {name}." if name else f"{who} exited with code {code} and gave no reason."
        ended += self._last_seen(rank)
        # A worker records why before it exits. Later records only say what its end did to the others.
        record = {
            "rank": rank,
            "who": who,
            "type": "Killed" if name else "Exited",
            "message": ended,
            "traceback": ended,
        }
        stored = read_record(self._store.compare_set(failure_key(self._restart), "", json.dumps(record)))
        left_by_itself = not name and code != 1
        if stored["type"] == "Exited" or (left_by_itself and stored["type"] == "PeerLost"):
            return WorkerError(f"{ended} Look at its output above.", cause_type="Exited", cause=ended)
        if name and stored["type"] in ("Killed", "PeerLost"):
            memory = " The system may have run out of memory." if name == "SIGKILL" else ""
            return WorkerError(ended + memory, cause_type="Killed", cause=ended)
        return _worker_error(stored)

    def _last_seen(self, rank: int) -> str:
        """What a worker was doing: its last action, or else its last sign of life. A sentence that follows others."""
        if (place := last_place(Path(self._temporary), rank)) is not None:
            return f" It was {describe_doing({'doing': place})}."
        key = rank_key(rank, self._restart)
        if not self._store.check([key]):
            return ""
        doing = ""
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            doing = describe_doing(json.loads(self._store.get(key))["status"])
        return f" Shortly before, it was {doing}." if doing else ""

    def _end(self) -> None:
        """Leave no process behind: ask, wait, then kill whole process groups. Nor what these leave."""
        members = [pid for process in self._processes for pid in (process.pid, *group_members(process.pid))]
        for process in self._processes:
            if process.poll() is None:
                _signal_group(process.pid, signal.SIGTERM)
                _signal_group(process.pid, signal.SIGCONT)  # one that is stopped cannot end
        deadline = time.monotonic() + TERMINATE_S
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for process in self._processes:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        wait_until_dead(members, POLL_S)
        remove_shared_memory(members)
        shutil.rmtree(self._temporary, ignore_errors=True)


def _signal_of(code: int | None) -> str:
    """The name of the signal that ended a worker; a worker makes exit codes of those that it handles."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"
    handled = {128 + number: number.name for number in (signal.SIGTERM, signal.SIGINT)}
    return handled.get(code or 0, "")


def _worker_error(record: dict[str, Any]) -> WorkerError:
    return WorkerError(describe_failure(record), cause_type=record["type"], cause=record["message"])


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
