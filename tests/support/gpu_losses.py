"""What the GPU tests of EMC2Loss train, on any device."""

import pytest
import torch
from gpu_support import unsupported
from helpers import normal, snapshot

from emc2_kernels.losses import EMC2Loss

ITEMS, D, B = 96, 64, 32


def batches(steps, dtype=torch.float32, b=B):
    """Embeddings of a data set in which they barely move, so that chains meet keys that they have met."""
    home = normal(0, ITEMS, 1, D) + 0.5 * normal(1, ITEMS, 2, D)
    for number in range(steps):
        index = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(number))[:b]
        z = (home + 0.1 * normal(number, ITEMS, 2, D))[index].to(dtype)
        yield z[:, 0], z[:, 1], index


def leaf(z, device):
    """A copy on the device to take the gradient of."""
    return z.detach().to(device, copy=True).requires_grad_()


def make(device, backend, **options):
    options = {"sampler": "mh"} | options
    walk = {"burn_in": 0.0} if options["sampler"] == "mh" else {}
    usual = {"temperature": 0.05, "bank_dtype": torch.float32, "seed": 2**64 - 9} | walk
    return EMC2Loss(ITEMS, D, backend=backend, **usual | options).to(device)


def forward(loss, z0, z1, index, backend, **options):
    try:
        return loss(z0, z1, index, **options)
    except (ValueError, NotImplementedError) as error:
        if unsupported(error, backend):
            pytest.skip(str(error))
        raise


def train(loss, data, device, backend, index_on_cpu=False):
    """Value, gradient and statistics of each step, on the CPU, and the states after it."""
    history = []
    for z0, z1, index in data:
        z0, z1 = leaf(z0, device), leaf(z1, device)
        index = index if index_on_cpu else index.to(device)
        value, stats = forward(loss, z0, z1, index, backend, return_stats=True)
        value.backward()
        gradient = torch.cat((z0.grad, z1.grad)).cpu()
        numbers = {name: stat.item() for name, stat in stats.items()}
        history.append((value.item(), gradient, numbers, {name: kept.cpu() for name, kept in snapshot(loss).items()}))
    return history


# With these seeds chains stay as they are when all embeddings are moved by 1e-5 of their size
# (tests/tools/test_gpu_support.py), far more than the rounding of another device: no accept is near a tie.
OPTIONS = {
    "one view": {},
    "both views": {"views": "both", "num_samples": 7},
    "another burn-in": {"burn_in": 0.25},
    "not normalised": {"normalize": False, "temperature": 5.0},
    "i-SIR": {"sampler": "isir"},
    "i-SIR, one view": {"sampler": "isir", "views": "one", "queue": 7},
    "i-SIR, two modalities": {"sampler": "isir", "bimodal": True},
    "i-SIR, coupled": {"sampler": "isir", "decoupled": False},
}
SAMPLERS = {name: OPTIONS[name] for name in ("one view", "i-SIR")}
