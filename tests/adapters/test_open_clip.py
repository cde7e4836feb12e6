"""open_clip's call, beside its formula; beside its own loss, and in its own training loop, where it is installed."""

from __future__ import annotations

import math
import types

import pytest
import torch
from helpers import named_error, normal, relative_rms
from torch.nn import functional

from emc2_kernels.adapters.open_clip import OpenClipLoss
from emc2_kernels.losses import ClipLoss, EMC2Loss, NTXentLoss

B, D = 12, 16


def features(seed=0, b=B, dtype=torch.float32):
    return [functional.normalize(normal(seed + side, b, D), dim=1).to(dtype).requires_grad_() for side in (0, 1)]


def formula(image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
    """open_clip's ClipLoss in one process."""
    logits = logit_scale * image_features @ text_features.T + (0 if logit_bias is None else logit_bias)
    labels = torch.arange(len(logits))
    value = (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2
    return {"contrastive_loss": value} if output_dict else value


def theirs():
    return pytest.importorskip("open_clip", reason="needs torchvision: make test-peers").ClipLoss()


def called(loss, scale, shape=(), dtype=torch.float32, **options):
    """Value, and gradients of the features and of the scale's logarithm, as a model keeps it."""
    images, texts = features(dtype=dtype)
    log_scale = torch.full(shape, math.log(scale), dtype=torch.float32, requires_grad=True)
    outputs = {"image_features": images, "text_features": texts, "logit_scale": log_scale.exp().to(dtype)}
    losses = loss(**outputs, **options, output_dict=True)
    assert losses.keys() == {"contrastive_loss"}
    (3 * losses["contrastive_loss"]).backward()
    return losses["contrastive_loss"].detach(), torch.cat((images.grad, texts.grad)), log_scale.grad


@pytest.mark.parametrize("made", [lambda: formula, theirs], ids=["formula", "open_clip"])
@pytest.mark.parametrize(("scale", "shape"), [(1 / 0.07, ()), (100.0, (1,)), (0.5, ())])
def test_value_and_gradients_are_open_clips(made, scale, shape):
    value, gradient, of_scale = called(OpenClipLoss(), scale, shape)
    expected, expected_gradient, of_expected_scale = called(made(), scale, shape)
    torch.testing.assert_close(value, expected.reshape(()), rtol=1e-5, atol=1e-6)
    assert relative_rms(gradient, expected_gradient) <= 1e-5
    assert of_scale.shape == shape and of_scale.abs() > 1e-3
    torch.testing.assert_close(of_scale, of_expected_scale, rtol=1e-4, atol=1e-6)


def test_a_bias_of_all_scores_cancels_and_has_a_gradient_of_zero():
    bias = torch.tensor([-10.0], requires_grad=True)
    value, gradient, _ = called(OpenClipLoss(), 10.0, logit_bias=bias)
    expected, expected_gradient, _ = called(formula, 10.0, logit_bias=bias.detach())
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert relative_rms(gradient, expected_gradient) <= 1e-5 and bias.grad.tolist() == [0.0]


def test_features_in_half_precision():
    value, gradient, of_scale = called(OpenClipLoss(), 20.0, dtype=torch.bfloat16)
    expected, expected_gradient, of_expected = called(OpenClipLoss(), 20.0)
    assert abs(value - expected) < 0.02 * expected and of_scale.dtype == torch.float32
    assert relative_rms(gradient.float(), expected_gradient) < 0.05 and abs(of_scale - of_expected) < 0.1


@pytest.mark.parametrize("of", [NTXentLoss, ClipLoss])
def test_a_given_scale_is_the_temperatures_inverse(of):
    """One mechanism: a number, a tensor, and a parameter of the loss's own."""
    z0, z1 = features()
    expected = of(temperature=0.25)(z0, z1)
    learnt = of(temperature=0.25, learn_temperature=True)
    for given in (4, 4.0, torch.tensor(4.0), torch.tensor([4.0], dtype=torch.float64)):
        torch.testing.assert_close(of(temperature=3.0)(z0, z1, logit_scale=given), expected)
    log_scale = torch.tensor(math.log(4.0), requires_grad=True)
    value, stats = of()(z0, z1, logit_scale=log_scale.exp(), return_stats=True)
    value.backward()
    learnt(z0, z1).backward()
    torch.testing.assert_close(log_scale.grad, learnt.log_scale.grad[0])
    assert stats["temperature"].item() == pytest.approx(0.25) and not stats["temperature"].requires_grad


def test_what_it_reports():
    loss, (images, texts) = OpenClipLoss(report=True), features()
    value = loss(images, texts, torch.tensor(5.0))
    assert loss.stats["ntxent"] == value.detach() and loss.stats["temperature"] == 0.2
    silent = OpenClipLoss()
    assert silent(images, texts, 5.0) == value and silent.stats == {} and not silent.state_dict()


def test_items_that_come_twice_are_no_negatives_of_each_other():
    images, texts = features()
    index = torch.arange(B) // 2
    found = OpenClipLoss()(images, texts, 8.0, index=index)
    scores = 8.0 * images @ texts.T
    same = (index[:, None] == index).logical_and(~torch.eye(B, dtype=torch.bool))
    scores = scores.masked_fill(same, -torch.inf)
    labels = torch.arange(B)
    expected = (functional.cross_entropy(scores, labels) + functional.cross_entropy(scores.T, labels)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


CONSTRUCTORS = {
    "local_loss": {"local_loss": 1},
    "use_horovod": {"use_horovod": True},
    "world_size": {"world_size": 0},
    "rank": {"rank": 1},
    "report": {"report": None},
    "backend": {"backend": "jax"},
}


@pytest.mark.parametrize(("name", "options"), CONSTRUCTORS.items(), ids=CONSTRUCTORS)
def test_bad_options(name, options):
    with named_error((ValueError, TypeError), f"{name} must be"):
        OpenClipLoss(**options)


CALLS = {
    "logit_scale none": ("logit_scale", {"logit_scale": None}),
    "logit_scale text": ("logit_scale", {"logit_scale": "14"}),
    "logit_scale zero": ("logit_scale", {"logit_scale": torch.tensor(0.0)}),
    "logit_scale negative": ("logit_scale", {"logit_scale": -1.0}),
    "logit_scale nan": ("logit_scale", {"logit_scale": torch.tensor(math.nan)}),
    "logit_scale rows": ("logit_scale", {"logit_scale": torch.ones(B)}),
    "logit_scale integer": ("logit_scale", {"logit_scale": torch.tensor(14)}),
    "logit_bias": ("logit_bias", {"logit_bias": torch.zeros(2)}),
    "output_dict": ("output_dict", {"output_dict": "yes"}),
    "image_features": ("image_features", {"image_features": None}),
    "text_features": ("text_features", {"text_features": torch.zeros(D)}),
    "index": ("index", {"index": torch.zeros(B)}),
}


@pytest.mark.parametrize(("name", "change"), CALLS.values(), ids=CALLS)
def test_bad_calls(name, change):
    images, texts = features()
    arguments = {"image_features": images, "text_features": texts, "logit_scale": 10.0} | change
    with named_error((ValueError, TypeError), name):
        OpenClipLoss()(**arguments)


def test_a_scale_that_is_given_and_learnt():
    images, texts = features()
    with named_error(ValueError, "logit_scale must be None with learn_temperature=True"):
        ClipLoss(learn_temperature=True)(images, texts, logit_scale=10.0)
    with pytest.raises(TypeError, match="logit_scale"):
        EMC2Loss(B, D)(images, texts, torch.arange(B), logit_scale=10.0)


def test_several_processes():
    with pytest.warns(UserWarning, match="gather_with_grad=False"):
        assert OpenClipLoss(world_size=2).loss.gather == "all"
    loss = OpenClipLoss(world_size=2, gather_with_grad=True, rank=1)
    with pytest.raises(RuntimeError, match="without a process group"):
        loss(*features(), 10.0)


def test_its_own_training_loop_trains_with_it(tmp_path):
    """A CLIP of one layer, with the factory's loss and with ours, ends in the same weights."""
    open_clip = pytest.importorskip("open_clip", reason="needs torchvision: make test-peers")
    train = pytest.importorskip("open_clip_train.train")
    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    images, texts = normal(0, 4, 8, 3, 16, 16), torch.randint(1, 31, (4, 8, 8))

    def trained(loss):
        torch.manual_seed(0)
        model = open_clip.CLIP(16, vision, text, output_dict=True)
        loader = Batches(zip(images, texts, strict=True))
        args = types.SimpleNamespace(
            device="cpu", precision="fp32", accum_freq=1, skip_scheduler=True, distill=False, horovod=False,
            grad_clip_norm=None, local_rank=0, rank=0, log_local=False, log_every_n_steps=1, batch_size=8,
            world_size=1, wandb=False, distributed=False,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = {"train": types.SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
        train.train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)
        return model.state_dict()

    args = types.SimpleNamespace(
        distill=False, model="tiny", siglip=False, local_loss=False, gather_with_grad=False, rank=0, world_size=1,
        horovod=False,
    )  # fmt: skip
    expected, ours = trained(open_clip.create_loss(args)), trained(OpenClipLoss())
    assert expected["logit_scale"] != math.log(1 / 0.07)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class Batches(list):
    """A loader, as open_clip's loop looks at it."""

    num_batches, num_samples = 4, 32
