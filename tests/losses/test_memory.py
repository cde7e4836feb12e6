"""No array of all scores is kept, by the log-sum-exp and the losses that are made of it."""

import json
import os
import subprocess
import sys

import pytest

# Name -> a step of n rows, a small n, a large one, and the megabytes by which it may grow.
STEPS = {
    # 8,192 x 8,192 scores would be 268 MB, those of 4,096 rows 67 MB, of which plain torch keeps several.
    "keys": ("contrastive_lse(leaf(n, 8), torch.rand(n, 8), temperature=0.1).sum().backward()", 256, 8192, 25),
    "NT-Xent, small": ("z = leaf(n // 2, 8); NTXentLoss()(z, z * 2, return_stats=True)[0].backward()", 256, 8192, 25),
    "CLIP, one item": ("z = leaf(n, 8); ClipLoss()(z, z * 2, torch.ones(n).long()).backward()", 256, 8192, 25),
    "NT-Xent": ("z = leaf(n, 128); NTXentLoss(temperature=0.1)(z, z.detach().flip(0)).backward()", 128, 2048, 40),
    # At the first visit and at one to which something is carried.
    "i-SIR": ("z = leaf(n // 2, 8); twice(EMC2Loss(n, 8, sampler='isir'), z)", 256, 8192, 25),
    "CLIP": ("z = leaf(n, 128); ClipLoss(temperature=0.1)(z, z.detach().flip(0)).backward()", 128, 4096, 60),
}


def assert_grow_little(steps):
    """Growth of a fresh process's peak memory over each step with the large n, after the same with the small one."""
    code = f"""
import torch
from bench.harness import memory
from emc2_kernels import contrastive_lse
from emc2_kernels.losses import ClipLoss, EMC2Loss, NTXentLoss
def leaf(*shape):
    return torch.rand(shape).requires_grad_()
def twice(loss, z):
    for _ in range(2):
        loss(z, z * 2, torch.arange(len(z)), return_stats=True)[0].backward()
def run(step, n):
    exec(step, globals() | {{"n": n}})
found = []
for step, small, large, _ in {list(steps)}:
    run(step, small)
    torch.ones(1024, 1024) @ torch.ones(1024, 1024)
    found.append(memory.peak_growth(lambda: run(step, large), torch.device("cpu")) / 1e6)
print(found)
"""
    # Blocks from 64 KiB up go back to the system when freed, else what a smaller run has freed would serve uncounted.
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (step, _, large, most), grown in zip(steps, json.loads(done.stdout), strict=True):
        print(f"{grown:.1f} MB for n = {large}: {step}")
        assert grown < most, step


def test_no_array_of_all_scores_is_kept():
    assert_grow_little(STEPS.values())


@pytest.mark.slow
def test_nor_with_16384_pairs():
    """The scores would be 4.3 GB; the anchors are 17 MB."""
    assert_grow_little([(STEPS["NT-Xent"][0], 128, 16384, 250)])
