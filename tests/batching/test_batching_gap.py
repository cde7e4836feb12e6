"""global_train_gap against a literal formula, what the sampler's batches do to it, and losses that batches bias."""

import math
import warnings

import numpy as np
import pytest
import torch
from helpers import normal
from torch import nn

from emc2_kernels.batching import (
    GlobalContrastiveBatchSampler,
    check_loss,
    consecutive_order,
    global_train_gap,
    similarity_graph,
)
from emc2_kernels.losses import CachedSoftmaxLoss, ClipLoss, EMC2Loss, NTXentLoss, SogCLRLoss, get

N, D = 40, 8
X, Y = normal(0, N, D), normal(1, N, D)


def formula(x, y, batches, temperature, normalize):
    """One anchor at a time, in float64."""
    x, y = x.double(), y.double()
    if normalize:
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    scores = (x @ y.T / temperature).numpy()
    losses = {"global": [], "train": []}
    for batch in batches:
        for side in (scores, scores.T):
            for item in batch:
                for name, others in (("global", range(len(x))), ("train", batch)):
                    losses[name].append(math.log(sum(math.exp(side[item, k]) for k in others)) - side[item, item])
    whole, train = (np.mean(values) for values in losses.values())
    return whole, train, whole - train


BATCHES = {
    "a partition": torch.arange(N).view(-1, 8).tolist(),
    "of two sizes": [[3, 9, 4], [0, 39]],
    "of one item": [[5], [6]],
    "items twice": [[3, 3, 4], [3, 7], [5, 5]],
    "tensors": [torch.tensor([1, 2, 3]), torch.tensor([9, 8])],
    "arrays": np.arange(N).reshape(-1, 10),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_is_the_formula(batches, normalize):
    for temperature in (0.1, 1):
        result = global_train_gap(X, Y, batches, temperature, normalize=normalize)
        expected = formula(X, Y, [list(map(int, batch)) for batch in batches], temperature, normalize)
        assert result == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_dtypes(dtype, normalize):
    """Embeddings are rounded before they come: float64 is exact, the others are so in float32."""
    x, y = X.to(dtype), Y.to(dtype)
    result = global_train_gap(x, y, BATCHES["a partition"], 0.2, normalize=normalize)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert result == pytest.approx(formula(x, y, BATCHES["a partition"], 0.2, normalize), rel=tolerance)


def test_is_clips_loss_and_takes_embeddings_with_gradients_and_any_temperature():
    result = global_train_gap(X.clone().requires_grad_(), Y, BATCHES["a partition"], torch.tensor(0.3))
    assert result.global_loss == pytest.approx(ClipLoss(temperature=0.3)(X, Y).item(), rel=1e-5)
    batch_losses = [ClipLoss(temperature=0.3)(X[batch], Y[batch]).item() for batch in BATCHES["a partition"]]
    assert result.train_loss == pytest.approx(np.mean(batch_losses), rel=1e-5)


def test_one_batch_of_everything_hides_nothing():
    items = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert global_train_gap(X, Y, [items], 0.05).gap == pytest.approx(0, abs=1e-6)


def test_batches_with_an_item_twice_may_hide_less_than_nothing():
    assert global_train_gap(X, Y, [list(range(N)) * 2], 0.1).gap == pytest.approx(-math.log(2), abs=1e-5)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_random_batches_of_embeddings_without_structure_hide_their_share_of_the_denominator(size):
    """Scores of 256-dimensional directions hardly differ at a temperature of 1: a sum of k for one of N."""
    x, y = normal(0, 1024, 256), normal(1, 1024, 256)
    batches = torch.randperm(1024, generator=torch.Generator().manual_seed(0)).view(-1, size)
    assert global_train_gap(x, y, batches, 1.0).gap == pytest.approx(math.log(1024 / size), rel=0.01)


def test_batches_may_be_a_generator_or_a_sampler_which_counts_an_epoch():
    sampler = GlobalContrastiveBatchSampler(N, 8)
    batches = list(GlobalContrastiveBatchSampler(N, 8))
    expected = global_train_gap(X, Y, batches, 0.1)
    assert global_train_gap(X, Y, (batch for batch in batches), 0.1) == expected
    assert global_train_gap(X, Y, sampler, 0.1) == expected
    assert sampler.epoch == 1


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("options", [{}, {"scope": "row", "quantile": 0.98}, {"max_per_row": 8}], ids=str)
def test_an_update_closes_much_of_the_gap_on_clustered_data(options, drop_last):
    """Of 610 items in 30 clusters: random batches of 20 have a 30th of an anchor's cluster, chosen ones most of it."""
    cluster = torch.arange(610) % 30
    centre = normal(0, 30, 32)[cluster]
    x, y = (centre + 0.3 * normal(seed, 610, 32) for seed in (1, 2))
    sampler = GlobalContrastiveBatchSampler(610, 20, drop_last=drop_last, **({"quantile": 0.97} | options))
    before = global_train_gap(x, y, sampler, 0.1)
    sampler.update(x, y)
    after = global_train_gap(x, y, sampler, 0.1)
    assert before.gap > 2
    assert 0 < after.gap < 0.45 * before.gap
    assert sampler.facts.entries > 610 * 5
    assert sampler.epoch == 2


@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "row"}, {"normalize": False}, {"max_per_row": 3}, {"quantile": 0.5, "progress": False}],
    ids=str,
)
@pytest.mark.parametrize("towers", [(X,), (X, Y)], ids=["x", "x, y"])
def test_the_samplers_order_is_that_of_the_graph(towers, options):
    options = {"quantile": 0.97} | options
    graph = similarity_graph(*towers, seed=7, **options)
    sampler = GlobalContrastiveBatchSampler(N, 10, seed=7, **options)
    sampler.update(*towers)
    assert sampler.facts == graph.facts
    assert sampler.state_dict()["order"].tolist() == consecutive_order(graph.matrix, seed=7).tolist()


def encode(items, views):
    return torch.ones(len(items), D)


SILENT = {
    "ntxent": NTXentLoss(),
    "clip": ClipLoss(),
    "EMC2 from the bank": EMC2Loss(N, D, proposals="bank", carry="recompute", encode=encode),
    "cached": CachedSoftmaxLoss(N, D, carry="recompute", encode=encode),
    "no loss of ours": nn.CrossEntropyLoss(),
}
WARNED = {
    "sogclr": (get("sogclr", num_items=N), "SogCLRLoss is biased"),
    "isogclr": (get("isogclr", num_items=N), "SogCLRLoss is biased"),
    "EMC2 from the bank": (EMC2Loss(N, D, proposals="bank"), "EMC2Loss.*corrected.*is biased.*recompute"),
    "cached": (CachedSoftmaxLoss(N, D), "CachedSoftmaxLoss.*corrected.*is biased.*recompute"),
    "wrapped": (nn.Sequential(nn.Identity(), SogCLRLoss(N)), "SogCLRLoss is biased"),
}


@pytest.mark.parametrize("loss", SILENT.values(), ids=SILENT)
def test_losses_that_chosen_batches_suit(loss):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_loss(loss)


@pytest.mark.parametrize(("loss", "regex"), WARNED.values(), ids=WARNED)
def test_losses_that_chosen_batches_bias_are_warned_of_where_check_loss_is_called(loss, regex):
    with pytest.warns(UserWarning, match=regex) as caught:
        check_loss(loss)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("wrap", [lambda loss: loss, nn.Sequential], ids=["", "wrapped"])
@pytest.mark.parametrize("sampler", ["mh", "isir"])
def test_emc2_with_proposals_from_the_batch_is_refused(sampler, wrap):
    with pytest.raises(ValueError, match='^EMC2Loss must have sampler="mh" with.* got .*proposals="batch"'):
        check_loss(wrap(EMC2Loss(N, D, sampler=sampler)))
