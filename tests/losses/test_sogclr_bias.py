"""At fixed parameters SogCLR's mean gradient approaches the exact global one as its running means remember more."""

import pytest
import torch
from helpers import normal
from torch.nn import functional

from emc2_kernels.losses import SogCLRLoss

POOL, POOL_BATCH = 48, 4


def fixed_views():
    """(48, 2, 16): two views of each item, on which an encoder that stands still is evaluated."""
    shared = normal(0, POOL, 1, 16)
    return (shared + 0.5 * normal(1, POOL, 2, 16)).double()


def exact_gradient(weight, bimodal, temperature):
    """Of the objective over the whole pool: with two modalities a log of a mean for each anchor, with one modality one
    for both views of an item, whose u they share."""
    w = weight.detach().double().requires_grad_()
    views = fixed_views()
    z = functional.normalize(torch.cat((views[:, 0], views[:, 1])) @ w)
    item, side = torch.arange(POOL).repeat(2), torch.arange(2).repeat_interleave(POOL)
    scores = z @ z.T / temperature
    excluded = item[:, None] == item
    if bimodal:
        excluded = excluded | (side[:, None] == side)
    logs = scores.masked_fill(excluded, -torch.inf).logsumexp(1)
    if not bimodal:
        logs = logs.view(2, POOL).logsumexp(0)
    (logs.mean() - (z * z.roll(POOL, 0)).sum(1).mean() / temperature).backward()
    return w.grad


def errors_of_the_mean(gamma, bimodal, steps, marks, temperature=0.1):
    """Relative errors of the mean gradient after each of ``marks`` batches; 3 / gamma visits come first, unused."""
    weight = (normal(2, 16, 8) / 4).requires_grad_()
    views, exact = fixed_views().float(), exact_gradient(weight, bimodal, temperature)
    loss = SogCLRLoss(POOL, temperature=temperature, gamma=gamma, bimodal=bimodal)
    generator, errors, epoch = torch.Generator().manual_seed(3), [], []
    for t in range(-int(3 / gamma) * (POOL // POOL_BATCH), steps):
        if t == 0:
            weight.grad = None
        epoch = epoch or list(torch.randperm(POOL, generator=generator).split(POOL_BATCH))
        index = epoch.pop()
        loss(views[index, 0] @ weight, views[index, 1] @ weight, index).backward()
        if t + 1 in marks:
            errors.append(((weight.grad / (t + 1) - exact).norm() / exact.norm()).item())
    return errors


@pytest.mark.parametrize("bimodal", [False, True])
def test_the_mean_gradient_approaches_the_exact_one_as_u_does(bimodal):
    """A u that remembers many visits is nearly that of the whole pool; with gamma = 1 it is the batch's."""
    pool, between, batch = (errors_of_the_mean(gamma, bimodal, 900, [900])[0] for gamma in (0.03, 0.3, 1.0))
    assert pool < 0.9 * between and between < 0.9 * batch, (pool, between, batch)


@pytest.mark.slow
@pytest.mark.parametrize("bimodal", [False, True])
def test_the_bias_falls_with_gamma_in_long_runs(bimodal, capsys):
    marks = [2_000, 20_000]
    found = {gamma: errors_of_the_mean(gamma, bimodal, marks[-1], marks) for gamma in (1.0, 0.3, 0.03)}
    with capsys.disabled():
        print(
            f"\nbimodal={bimodal}: relative error of the mean gradient after 2,000 and 20,000 batches of {POOL_BATCH}"
        )
        for gamma, errors in found.items():
            print(f"gamma = {gamma:5}" + "".join(f"{error:8.3f}" for error in errors))
    long = [errors[1] for errors in found.values()]
    assert long[0] > long[1] and long[1] > long[2]
    assert long[2] < 0.06 and long[0] > 0.2
