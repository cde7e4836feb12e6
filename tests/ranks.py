"""Real processes in a gloo group, started once for each number of ranks and shared by all tests of a run.

A module that CHECKS names has ``checks(rank, size)``: functions by name, the same ones in the same order on every rank,
which may use collectives and return what JSON can hold. Tests ask for what came out, one check at a time.
"""

import fcntl
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest

SIZES = (1, 2, 3, 4)
CHECKS = ("rank_losses", "rank_wrapped", "rank_misuse", "rank_traffic")
SECONDS = 240  # for all checks of one number of ranks; they take a few
COLLECTIVE_SECONDS = 60  # then a rank that waits for another raises


def shared_folder(tmp_path_factory):
    """The same for all processes of a run of pytest."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def found(size, check, folder):
    """What each rank has returned from a check; fails where one has raised or did not come that far."""
    ranks = _launched(size, folder)
    for rank, outcome in enumerate(ranks):
        if check in outcome["raised"]:
            pytest.fail(f"rank {rank} of {size}: {outcome['raised'][check]}")
    for rank, outcome in enumerate(ranks):
        if check not in outcome["returned"]:
            pytest.fail(f"rank {rank} of {size} stopped {outcome['stopped']}")
    return [outcome["returned"][check] for outcome in ranks]


@functools.cache
def _launched(size, folder):
    results = folder / f"ranks-{size}"
    with open(folder / f"ranks-{size}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not results.exists():
            results.mkdir()
            _launch(size, results)
    return [_outcome(results, rank) for rank in range(size)]


def _outcome(results, rank):
    path = results / f"{rank}.json"
    if path.exists():
        return json.loads(path.read_text())
    at, logs = results / f"{rank}.at", [results / "log", results / f"{rank}.log"]
    where = f"in {at.read_text()!r}" if at.exists() else "before any check"
    said = "".join(log.read_text()[-4000:] for log in logs if log.exists())
    return {"returned": {}, "raised": {}, "stopped": f"{where}:\n{said}"}


def _launch(size, results):
    """A process of its own for the imports, which then forks the ranks: starting each by itself would cost more than
    all that they do."""
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"  # a host name need not resolve
    with open(results / "log", "w") as log:
        code = f"import ranks; ranks.start({size}, {str(results)!r})"
        command = [sys.executable, "-W", "ignore", "-c", code]
        subprocess.run(command, env=os.environ | settings, stdout=log, stderr=log, check=False)


def start(size, results):
    """Runs all ranks to their end; kills those that are left after SECONDS, or soon after one has died."""
    checks = [importlib.import_module(module).checks for module in CHECKS]
    importlib.import_module("torch._dynamo")  # which torch imports when it is first needed: by each rank for itself
    process = multiprocessing.get_context("fork").Process
    ranks = [process(target=_work, args=(rank, size, Path(results), checks)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            end = min(end, time.monotonic() + 5)
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()


def _work(rank, size, results, checks):
    """One rank: all checks, up to the first that raises, after which ranks may be out of step."""
    import torch.distributed as dist

    with open(results / f"{rank}.log", "w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=size, timeout=timeout)
    outcome = {"returned": {}, "raised": {}, "stopped": ""}
    for name, check in itertools.chain.from_iterable(of_module(rank, size).items() for of_module in checks):
        (results / f"{rank}.at").write_text(name)
        try:
            outcome["returned"][name] = check()
        except Exception:
            outcome["raised"][name], outcome["stopped"] = traceback.format_exc(), f"in {name!r}, which raised"
            break
    (results / f"{rank}.json").write_text(json.dumps(outcome))
    os._exit(0)  # others may be waiting, and leaving the group in order would wait for them
