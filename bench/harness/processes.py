"""Processes of this checkout that may hang, crash or lose the GPU: started in its root, their output in a log."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness import CHECKOUT

STOP = threading.Event()  # set where everything is to end: what runs is killed, and nothing is begun


def module_command(module: str, *words: object) -> list[str]:
    """The command of a module of this checkout: its root is on the path of what runs in it."""
    return [sys.executable, "-m", module, *map(str, words)]


def kill_group(process: subprocess.Popen) -> None:
    """Ends a process that was started in a session of its own, with all that it has started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_logged(
    command: Sequence[str],
    log: Path,
    limit: float,
    *,
    stalled: Callable[[], bool] = lambda: False,
    own_group: bool = True,
    **environment: str,
) -> int | None:
    """Runs a command, its output appended to a file. Its exit status; None where it was stopped, late or stalled.

    ``own_group``: whatever it has started ends with it.
    """
    deadline = time.monotonic() + limit
    with log.open("ab") as file:
        if STOP.is_set():
            return None
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=CHECKOUT,
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=own_group,
        )
        try:
            while process.poll() is None:
                if time.monotonic() > deadline or stalled() or STOP.is_set():
                    return None
                time.sleep(0.1)
            return process.returncode
        finally:
            if own_group:
                kill_group(process)
            else:
                process.kill()
                process.wait()


def tail(log: Path, characters: int = 1500) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-characters:] if log.exists() else ""
