"""Encoders, optimizers and probes at the papers' scale, each against what is known of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from examples.pretrain import encoders, evaluate, optimizers


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "features", "known"), [("resnet18", 512, 11_689_512), ("resnet50", 2048, 25_557_032)])
def test_a_resnet_has_the_well_known_number_of_parameters(name, features, known):
    backbone, width = encoders.resnet(name, 3, "imagenet", "batch")
    assert width == features
    # The well-known number includes a last layer of 1,000 classes.
    assert count(backbone) + count(nn.Linear(features, 1000)) == known


@pytest.mark.parametrize("stem", encoders.STEMS)
@pytest.mark.parametrize("norm", encoders.NORMS)
def test_norms_and_stems(norm, stem):
    encoder = encoders.build_encoder(16, 0, name="resnet18", channels=3, stem=stem, norm=norm, hidden=24).eval()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = encoder.backbone[:2](images) if stem == "cifar" else encoder.backbone[:3](images)
    assert before.shape == (4, 64, 32, 32) if stem == "cifar" else (4, 64, 8, 8)
    assert encoder.features(images).shape == (4, 512) and encoder(images).shape == (4, 16)
    assert [layer.out_features for layer in encoder.projector[::2]] == [24, 16]
    kinds = {type(module) for module in encoder.modules()}
    assert (nn.BatchNorm2d in kinds) == (norm == "batch") and (nn.GroupNorm in kinds) == (norm == "group")
    if norm == "none":  # each block begins as the identity
        assert torch.equal(encoder.backbone[-3](before := torch.randn(2, 512, 4, 4)), before.relu())
    spread = encoder.features(images).std().item()
    assert 1e-3 < spread < 30  # neither vanished nor blown up


def test_without_batchnorm_an_embedding_does_not_depend_on_its_batch():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for norm, depends in (("group", False), ("none", False), ("batch", True)):
        encoder = encoders.build_encoder(16, 0, name="resnet18", channels=3, stem="cifar", norm=norm).train()
        alone, among = encoder(images[:2]), encoder(images)[:2]
        assert torch.allclose(alone, among, atol=1e-4) != depends


def test_lars_follows_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight, zero, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (2, 2), 5))
    zero = torch.zeros_like(zero)
    parameters = [nn.Parameter(value.clone()) for value in (weight, zero, bias)]
    optimizer = optimizers.LARS(parameters, lr=0.5, momentum=0.8, weight_decay=0.1, trust=0.01)
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    for _ in range(3):
        gradients = [torch.randn(parameter.shape, generator=generator, dtype=torch.float64) for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        old = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        for number, (w, g) in enumerate(zip(old, gradients, strict=True)):
            local, decay = 1.0, 0.0 if number == 2 else 0.1
            if number < 2 and w.norm() > 0:
                local = 0.01 * w.norm() / (g.norm() + 0.1 * w.norm())
            velocity[number] = 0.8 * velocity[number] + 0.5 * local * (g + decay * w)
            torch.testing.assert_close(parameters[number].detach(), w - velocity[number])
    assert parameters[0].grad is gradients[0]  # left as it was


def test_lars_goes_on_from_its_state():
    def run(steps, state=None):
        parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
        optimizer = optimizers.build_optimizer("lars", parameters, 0.1, 0.01, 0.9)
        if state is not None:
            for parameter, value in zip(parameters, state[0], strict=True):
                parameter.data.copy_(value)
            optimizer.load_state_dict(state[1])
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = parameter.detach() ** 2
            optimizer.step()
        return [parameter.detach().clone() for parameter in parameters], optimizer.state_dict()

    whole, parts = run(5)[0], run(2, run(3))[0]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_optimizers_are_given_their_options(name):
    optimizer = optimizers.build_optimizer(name, [nn.Parameter(torch.ones(2, 2))], 0.3, 0.02, 0.7)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.02) and group.get("momentum", 0.7) == 0.7
    assert type(optimizer).__name__.lower() == name


def test_warmup_is_linear_and_then_a_cosine():
    factors = [optimizers.warmup_cosine(100, 4)(step) for step in range(100)]
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 100) for step in range(100)]
    assert factors[0] == cosine[0] / 25 and factors[11] == pytest.approx(12 / 25 * cosine[11])
    assert factors[24:] == cosine[24:]
    assert [optimizers.warmup_cosine(100, math.inf)(step) for step in range(100)] == cosine


def blobs(count, classes=4, width=40, seed=0):
    """Classes that a linear rule tells apart, with labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % classes
    return centres[labels] + torch.randn(count, width, generator=generator), labels


def test_the_probe_by_gradient_descent_learns_and_repeats(monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 64)
    monkeypatch.setattr(evaluate, "ROWS", 30)
    (train, labels), (test, test_labels) = blobs(300), blobs(100, seed=1)
    state = torch.get_rng_state()
    found = evaluate.sgd_probe(1000 * train, labels, 1000 * test, test_labels)
    assert found == 1.0 and torch.equal(state, torch.get_rng_state())
    assert evaluate.sgd_probe(train.half(), labels, test.half(), test_labels) == 1.0
    assert evaluate.sgd_probe(train, labels.flip(0), test, test_labels) < 0.5
    mean, scale = evaluate._moments(train)
    torch.testing.assert_close(mean, train.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scale, train.std(0, correction=0), atol=1e-5, rtol=1e-5)


def test_neighbours_by_blocks_are_those_of_all_pairs(monkeypatch):
    (train, _), (test, test_labels) = blobs(200), blobs(50, seed=1)
    features = evaluate.Features(train, torch.arange(200), test, test_labels)
    whole = evaluate.nearest_labels(features, torch.arange(200), 10)
    assert torch.equal(whole, torch.cdist(test, train).argsort(dim=1)[:, :10])
    monkeypatch.setattr(evaluate, "BLOCK", 40 * 7)  # 7 training features at a time, 40 distances a query
    assert torch.equal(evaluate.nearest_labels(features, torch.arange(200), 10), whole)
    some = torch.arange(0, 200, 3)
    assert torch.equal(evaluate.nearest_labels(features, some, 1)[:, 0], some[torch.cdist(test, train[some]).argmin(1)])
    assert evaluate.nearest_labels(features, some[:4], 10).shape == (50, 4)


def test_the_vote_is_the_majority_and_ties_go_to_the_nearer():
    labels = torch.tensor([[3, 1, 1, 2], [2, 1, 1, 2], [1, 2, 2, 1], [0, 1, 2, 3], [2, 0, 0, 2]])
    assert evaluate.vote(labels).tolist() == [1, 2, 1, 0, 2]


def test_accuracy_takes_the_probe_that_it_is_told(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "sgd_probe", lambda *features: asked.append("sgd") or 0.25)
    features = evaluate.Features(*blobs(80), *blobs(40, seed=1))
    assert evaluate.accuracy(features, "logistic").linear_probe == 1.0 and not asked
    assert evaluate.accuracy(features, "sgd").linear_probe == 0.25
    assert evaluate.accuracy(features).linear_probe == 1.0
    monkeypatch.setattr(evaluate, "LOGISTIC_IMAGES", 79)
    found = evaluate.accuracy(features)
    assert found.linear_probe == 0.25 and found.ten_nearest_neighbours == 1.0 and len(asked) == 2
