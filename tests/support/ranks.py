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
CHECKS = (
    "rank_losses",
    "rank_sharded",
    "rank_wrapped",
    "rank_misuse",
    "rank_agreement",
    "rank_traffic",
    "rank_adapters",
)
SECONDS = 240  # for all checks of one number of ranks; they take a few
COLLECTIVE_SECONDS = 60  # then a rank that waits for another raises


def shared_folder(tmp_path_factory):
    """The same for all processes of a run of pytest."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def made_once(folder, make):
    """A folder in the shared one, filled by ``make(folder)`` in the first process that asks for it."""
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draft = folder.with_suffix(".draft")
            draft.mkdir(exist_ok=True)
            make(draft)
            draft.rename(folder)
    return folder


def found(size, check, folder, modules=CHECKS):
    """What each rank has returned from a check; fails where one has raised or did not come that far."""
    ranks = _launched(size, folder, modules)
    for rank, said in enumerate(ranks):
        if check in said["raised"]:
            pytest.fail(f"rank {rank} of {size}: {said['raised'][check]}")
    for rank, said in enumerate(ranks):
        if check not in said["returned"]:
            pytest.fail(f"rank {rank} of {size} came no further than {[*said['begun']][-1:]}:\n{said['log']}")
    return [said["returned"][check] for said in ranks]


@functools.cache
def _launched(size, folder, modules):
    results = made_once(folder / f"{modules[0]}-{size}", lambda draft: _launch(size, draft, modules))
    return [_said(results, rank) for rank in range(size)]


def _said(results, rank):
    """By kind and check what a rank has written down, and its log."""
    said = {"begun": {}, "returned": {}, "raised": {}}
    lines, logs = results / f"{rank}.jsonl", [results / "log", results / f"{rank}.log"]
    for line in lines.read_text().splitlines() if lines.exists() else ():
        kind, check, value = json.loads(line)
        said[kind][check] = value
    return said | {"log": "".join(log.read_text()[-4000:] for log in logs if log.exists())}


def _launch(size, results, modules):
    """A process of its own for the imports, which then forks the ranks: starting each by itself would cost more than
    all that they do."""
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"  # a host name need not resolve
    with open(results / "log", "w") as log:
        code = f"import ranks; ranks.start({size}, {str(results)!r}, {modules!r})"
        command = [sys.executable, "-W", "ignore", "-c", code]
        subprocess.run(command, env=os.environ | settings, stdout=log, stderr=log, check=False)


def start(size, results, modules):
    """Runs all ranks to their end; kills those that are left after SECONDS, or soon after one has died."""
    checks = [importlib.import_module(module).checks for module in modules]
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
    with open(results / f"{rank}.jsonl", "w") as lines:

        def say(*line):
            print(json.dumps(line), file=lines, flush=True)

        for name, check in itertools.chain.from_iterable(of_module(rank, size).items() for of_module in checks):
            say("begun", name, None)
            try:
                say("returned", name, check())
            except Exception:
                say("raised", name, traceback.format_exc())
                break
    os._exit(0)  # others may be waiting, and leaving the group in order would wait for them
