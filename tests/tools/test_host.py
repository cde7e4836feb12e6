"""What a small batch costs the host, in what can be counted: calls of functions and launches do not depend on how busy
a machine is."""

import json
import os
import subprocess
import sys

import pytest

from bench.harness import CHECKOUT

pytest.importorskip("triton")

COUNT = """
import json
from bench.gpu import host
library, found = host.pass_for_a_gpu(), {}
for name, make in host.CASES.items():
    call = make()
    call()
    found[name] = host.count_calls(call) | host.count_launches(call, library)
print(json.dumps(found))
"""

# Calls of functions, Python's and C's, with Python 3.11 and torch 2.13, and a twentieth more for others.
MOST_CALLS = {
    "mh_step": 225,
    "mh_step, with ids": 250,
    "mh_step, cuda": 170,
    "EMC2Loss(sampler='mh')": 660,
    "EMC2Loss": 750,
}
LAUNCHES = {"mh_step": 1, "mh_step, with ids": 1, "mh_step, cuda": 0, "EMC2Loss(sampler='mh')": 5, "EMC2Loss": 6}


def without_interpreter(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_small_batches_take_no_more_of_the_host():
    found = json.loads(without_interpreter("-c", COUNT))
    assert found.keys() == MOST_CALLS.keys()
    for name, counts in found.items():
        assert counts["launches"] == LAUNCHES[name], name
        assert counts["pointer queries"] == 0, name
        calls = counts["python"] + counts["c"]
        assert 0.5 * MOST_CALLS[name] < calls <= MOST_CALLS[name], (name, counts)


def test_functions_of_a_case_are_told():
    told = without_interpreter("-m", "bench.gpu.host", "--profile", "mh_step")
    assert "launch_sweep" in told and "(bind)" in told
