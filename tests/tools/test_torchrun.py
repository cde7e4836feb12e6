"""Runs of several processes, which torchrun starts: they agree with one, and a killed process ends or restarts them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from helpers import differences

from emc2_kernels import checkpoint

HERE = Path(__file__).resolve().parent
PRETRAIN = ("-m", "examples.pretrain")
COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
IMPORTED = os.pathsep.join(map(str, (HERE.parents[1], Path(helpers.__file__).parent)))
ENVIRONMENT = os.environ | {"PYTHONPATH": IMPORTED, "OMP_NUM_THREADS": "1"}


def torchrun(*arguments, timeout=300):
    """Starts two processes and waits for the end: (exit status, what was printed, when it ended)."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr, time.time()


def read_end(path):
    """A checkpoint's state without what the clock and torchrun put into it."""
    state = checkpoint.load(path)
    del state["seconds"], state["job"]
    for row in state["history"]:
        del row["images_per_second"]
    return state


def test_two_processes_agree_with_one_and_survive_one_kill(tmp_path):
    # What survives a kill has two seconds to say so before torchrun ends it.
    status, said, ended = torchrun("--max-restarts=1", "--monitor-interval=2", HERE / "torchrun_worker.py", tmp_path)
    assert (tmp_path / "checked").exists(), said
    assert differences(read_end(tmp_path / "3.pt"), read_end(tmp_path / "broken" / "checkpoint.pt")) == [], said
    assert "going on after epoch 1 of" in said
    assert status != 0
    assert "another process of the run is gone" in said
    assert "Signal 9 (SIGKILL)" in said
    assert ended - float((tmp_path / "death 3").read_text()) < 60


RUNS = {
    "emc2": ["--method=emc2", "--sampler=mh"],
    "emc2, a chain in each process": ["--method=emc2", "--sampler=mh", "--gather=none"],
    "emc2, i-SIR": ["--method=emc2"],
    "simclr, chosen batches": ["--method=simclr", "--batching=gcbs"],
    "cached": ["--method=cached", "--carry=recompute"],
}


def find_worker(job, rank):
    """The process id, once there is one."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == job.pid and f"RANK={rank}" in (path / "environ").read_text().split("\0"):
                return int(path.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return None


def count_epochs(directory):
    metrics = directory / "metrics.csv"
    return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0


def wait_until(happens, job, seconds=120):
    """What `happens` returns, once it is true, and how long that took."""
    start = time.time()
    while not (found := happens()):
        assert job.poll() is None and time.time() < start + seconds
        time.sleep(0.02)
    return found, time.time() - start


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments_a_run_ends_as_it_would_have(name, tmp_path):
    flags = [*RUNS[name], "--batch-size=64", "--epochs=8", "--device=cpu", "--quiet"]
    status, said, _ = torchrun(*PRETRAIN, *flags, f"--out={tmp_path / 'whole'}")
    assert status == 0 and said.count("accuracy on held-out images") == 1, said

    draws, broken = random.Random(name), tmp_path / "broken"
    command = [*COMMAND, "--max-restarts=3", *PRETRAIN, *flags, f"--out={broken}"]
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(command, env=ENVIRONMENT, stdout=said, stderr=said)
        for kill in range(3):
            wait_until(lambda at_least=2 * kill + 1: count_epochs(broken) >= at_least, job)
            time.sleep(draws.uniform(0, 1))
            before, victim = count_epochs(broken), find_worker(job, rank=draws.randrange(2))
            os.kill(victim, signal.SIGKILL)
            _, seconds = wait_until(lambda before=before: count_epochs(broken) > before, job)
            print(f"{name}: killed after epoch {before}; {seconds:.1f} s until the next one was done")
        assert job.wait(timeout=120) == 0
    said = (tmp_path / "said").read_text()
    assert said.count("going on after epoch") == 3, said
    assert differences(*(read_end(tmp_path / run / "checkpoint.pt") for run in ("whole", "broken"))) == []


@pytest.mark.slow
@pytest.mark.parametrize(("what", "limit"), [(signal.SIGKILL, 60), (signal.SIGSTOP, 90)], ids=["killed", "hangs"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_ends_the_job(rank, what, limit, tmp_path):
    job = subprocess.Popen(
        [*COMMAND, *PRETRAIN, "--method=simclr", "--epochs=1000", "--device=cpu", "--quiet", f"--out={tmp_path}"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: count_epochs(tmp_path) > 0, job)
    os.kill(find_worker(job, rank), what)
    start = time.time()
    said = job.communicate(timeout=limit)[1]
    print(f"rank {rank}, {what.name}: ended after {time.time() - start:.1f} s")
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in said if what == signal.SIGKILL else "another process of the run is gone" in said
