"""ClipLoss against open_clip's formula in plain torch: values, gradients, masked items, learnt scale, statistics."""

import math

import pytest
import torch
from helpers import assert_identical, normal, relative_rms
from slow_losses import DIM, DTYPES, INDICES, B, unit, value_and_gradients

from emc2_kernels.losses import ClipLoss, EMC2Loss
from emc2_kernels.losses.anchors import Anchors
from emc2_kernels.losses.in_batch import batch_stats


def open_clip_formula(images, texts, logit_scale):
    """open_clip's ClipLoss in one process: the mean of both directions' cross entropies to the diagonal."""
    images, texts = (torch.nn.functional.normalize(z, dim=1) for z in (images, texts))
    labels = torch.arange(len(images))
    per_image, per_text = logit_scale * images @ texts.T, logit_scale * texts @ images.T
    entropy = torch.nn.functional.cross_entropy
    return (entropy(per_image, labels) + entropy(per_text, labels)) / 2


def slow_clip(images, texts, index, temperature):
    """Anchor by anchor, with other keys of the anchor's item left out."""
    items = list(range(len(images))) if index is None else index.tolist()
    losses = []
    for rows, keys in ((images, texts), (texts, images)):
        for i, row in enumerate(rows):
            scores = [unit(row) @ unit(key) / temperature for key in keys]
            negatives = [score for score, item in zip(scores, items, strict=True) if item != items[i]]
            losses.append(torch.stack([scores[i], *negatives]).logsumexp(0) - scores[i])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [1, 2, 50, 300])
def test_clip_equals_open_clips(b, dtype):
    z0, z1 = normal(0, b, DIM, dtype=dtype), normal(1, b, DIM, dtype=dtype)
    value, gradient = value_and_gradients(ClipLoss(temperature=0.1), z0, z1)
    exact, exact_gradient = value_and_gradients(lambda *z: open_clip_formula(*z, 10.0), z0.double(), z1.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-9)
    assert relative_rms(gradient, exact_gradient) <= DTYPES[dtype] if b > 1 else not gradient.any()


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_clip_masks_other_keys_of_the_item(index):
    z0, z1 = normal(0, B, DIM), normal(1, B, DIM)
    value, gradient = value_and_gradients(ClipLoss(temperature=0.2), z0, z1, index)
    exact, exact_gradient = value_and_gradients(lambda *z: slow_clip(*z, index, 0.2), z0.double(), z1.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    assert relative_rms(gradient, exact_gradient) <= 1e-5


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_clip_passes_gradcheck(index):
    z = [normal(seed, B, 3, dtype=torch.float64).requires_grad_() for seed in (0, 1)]
    loss = ClipLoss(temperature=0.3, learn_temperature=True).double().eval()

    def call(z0, z1, log_scale):
        return torch.func.functional_call(loss, {"log_scale": log_scale}, (z0, z1, index))

    assert torch.autograd.gradcheck(call, [*z, loss.log_scale.detach().clone().requires_grad_()])


def test_the_learnt_scale_is_open_clips():
    z0, z1 = normal(0, B, DIM), normal(1, B, DIM)
    loss = ClipLoss(learn_temperature=True)
    value, stats = loss(z0, z1, return_stats=True)
    value.backward()
    logit_scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    open_clip_formula(z0.double(), z1.double(), logit_scale.exp()).backward()
    assert loss.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    torch.testing.assert_close(loss.log_scale.grad[0].double(), logit_scale.grad, rtol=1e-4, atol=1e-7)
    assert stats["temperature"].item() == pytest.approx(0.07)


@pytest.mark.parametrize("index", [INDICES["no index"], INDICES["duplicates"]], ids=["no index", "duplicates"])
def test_statistics(index):
    z0, z1 = normal(0, B, DIM), normal(1, B, DIM)
    value, stats = ClipLoss(temperature=0.2)(z0, z1, index, return_stats=True)
    assert set(stats) == {"ntxent", "positive_similarity", "negative_similarity", "mean_cosine"}
    assert_identical(stats["ntxent"], value)
    others = EMC2Loss(B, DIM)(z0, z1, torch.arange(B), return_stats=True)[1]
    for name in ("positive_similarity", "mean_cosine"):
        torch.testing.assert_close(stats[name], others[name])
    anchors = Anchors.of(z0, z1, index, True)
    torch.testing.assert_close(batch_stats(anchors, 0.2, bimodal=True)["ntxent"], value)
    assert not torch.isclose(batch_stats(anchors, 0.2)["ntxent"], value)
    items = torch.arange(B) if index is None else index
    cosines = anchors.embeddings[:B] @ anchors.embeddings[B:].T
    means = []
    for side in (cosines, cosines.T):
        shares = (side / 0.2).masked_fill(items[:, None] == items, -torch.inf).softmax(1)
        means.append((shares * side).sum(1).mean())
    torch.testing.assert_close(stats["negative_similarity"], sum(means) / 2)


def test_a_scale_of_half_precision_is_inverted_in_single():
    z0, z1, scale = normal(0, 6, 8), normal(1, 6, 8), torch.tensor(14.28, dtype=torch.bfloat16)
    expected = ClipLoss(temperature=1 / scale.item())(z0, z1)
    torch.testing.assert_close(ClipLoss()(z0, z1, logit_scale=scale), expected, rtol=1e-6, atol=0)
