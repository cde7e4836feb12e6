"""GPU tests: skipped without a GPU, rehearsed on CPU backends on request, their progress written down as they go."""

import json
import os
from pathlib import Path

import pytest
import torch
from gpu_support import DEVICE, ON_GPU, REHEARSAL, share_of

import emc2_kernels as emc2

HERE = Path(__file__).resolve().parent
# bench/gpu/check.py reads here what has run, and which test was running when a process died. Tests in it are not run
# again, so that one that kills the GPU context does not take the others with it.
PROGRESS = os.environ.get("EMC2_GPU_PROGRESS")
SHARE = os.environ.get("EMC2_GPU_SHARE", "0/1")  # i/k: the i-th of k shares, where several processes run a file's tests


def _done():
    lines = Path(PROGRESS).read_text().splitlines() if PROGRESS and Path(PROGRESS).exists() else []
    return {json.loads(line)["test"] for line in lines}


def pytest_collection_modifyitems(config, items):
    mine = [item for item in items if Path(item.path).is_relative_to(HERE)]
    if not ON_GPU and not REHEARSAL:
        for item in mine:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    done = _done()
    first, count = map(int, SHARE.split("/"))
    others = [item for item in mine if share_of(item.nodeid, count) != first or item.nodeid in done]
    if others:
        config.hook.pytest_deselected(items=others)
        left_out = {item.nodeid for item in others}
        items[:] = [item for item in items if item.nodeid not in left_out]


def _note(**record):
    if PROGRESS:
        with Path(PROGRESS).open("a") as file:
            file.write(json.dumps(record) + "\n")


def pytest_runtest_logstart(nodeid, location):
    _note(test=nodeid, outcome="started")


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        why = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else report.longreprtext
        _note(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), why=why[-2000:])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Ends the process where a test has left a dead CUDA context: all later ones would fail for its reason."""
    yield
    if ON_GPU:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _note(test=item.nodeid, outcome="failed", seconds=0.0, why=f"it left a dead CUDA context: {error}"[:2000])
            pytest.exit(f"the CUDA context died in or before {item.nodeid}: {error}", returncode=70)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def cuda_only():
    """For what a rehearsal on the CPU cannot do."""
    if not ON_GPU:
        pytest.skip("needs a CUDA GPU")


@pytest.fixture
def backend(request):
    name = request.param
    status = "available" if name == "auto" else emc2.backends().get(name, "there is no such backend")
    if status != "available":
        pytest.skip(f"backend {name!r}: {status}")
    return name


@pytest.fixture(autouse=True)
def full_float32_products():
    """Scores are compared at full precision unless a test says otherwise."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before
