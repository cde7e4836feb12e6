"""Every loss and option: without gradient, as Lightning's validate() and test() call it, with training mode in between;
several calls before one backward pass; evaluation, resumption and casts."""

import io

import pytest
import torch
from helpers import RUNNABLE, assert_identical, assert_unchanged, snapshot
from test_finite_state import LOSSES, batch, encode

from emc2_kernels.losses import TABLE, CachedSoftmaxLoss, ClipLoss, EMC2Loss, NTXentLoss, SogCLRLoss

ITEMS, D = 12, 6
MORE = {
    "NT-Xent": NTXentLoss,
    "NT-Xent, learnt": lambda: NTXentLoss(learn_temperature=True),
    "CLIP": ClipLoss,
    "CLIP, learnt, unnormalised": lambda: ClipLoss(learn_temperature=True, normalize=False),
    "EMC2, recompute": lambda: EMC2Loss(ITEMS, D, sampler="mh", carry="recompute", encode=encode),
    "EMC2, i-SIR, recompute": lambda: EMC2Loss(ITEMS, D, sampler="isir", carry="recompute", encode=encode),
    "iSogCLR, bimodal": lambda: SogCLRLoss(ITEMS, individual_temperature=True, bimodal=True, normalize=False),
    "cache, recompute": lambda: CachedSoftmaxLoss(ITEMS, D, carry="recompute", encode=encode),
}
if "triton" in RUNNABLE:
    MORE["EMC2, fused"] = lambda: EMC2Loss(ITEMS, D, sampler="mh", backend="triton")
    MORE["EMC2, i-SIR, fused"] = lambda: EMC2Loss(ITEMS, D, sampler="isir", backend="triton")
EVERY = LOSSES | MORE


@pytest.mark.parametrize("name", EVERY)
def test_without_gradient_values_statistics_and_state_are_the_same(name):
    without = {mode: EVERY[name]() for mode in (torch.inference_mode, torch.no_grad)}
    other = EVERY[name]()
    for step, training in enumerate((True, False, True)):
        for return_stats in (True,) if "fused" in name else (False, True):  # the interpreter takes a second each
            z0, z1, index = batch(step)
            expected = other.train(training)(z0, z1, index, return_stats=return_stats)
            assert (expected[0] if return_stats else expected).requires_grad
            for mode, loss in without.items():
                with mode():
                    found = loss.train(training)(z0.detach(), z1.detach(), index, return_stats=return_stats)
                assert not (found[0] if return_stats else found).requires_grad
                assert_identical(found, expected)
    before, following = snapshot(other), other.train()(*batch(9))
    for loss in without.values():
        assert_identical(snapshot(loss), before)
        value = loss.train()(*batch(9))  # and a step of training after it
        value.backward()
        assert_identical(value, following)
        assert not any(kept.is_inference() for kept in loss.state_dict().values())


@pytest.mark.parametrize("name", [name for name in EVERY if "fused" not in name])
def test_several_calls_before_one_backward_pass_add_their_gradients(name):
    """No call writes to what an earlier one has saved."""

    def gradients(add):
        loss, data = EVERY[name](), [batch(step) for step in range(3)]
        values = [loss(*some) for some in data]
        if add:
            sum(values).backward()
        else:
            for value in values:
                value.backward()
        return [leaf.grad for z0, z1, _ in data for leaf in (z0, z1)] + [leaf.grad for leaf in loss.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("name", [name for name in EVERY if "fused" not in name])
def test_evaluation_writes_nothing_and_gives_the_training_value(name):
    """Where what is kept of the batch's own items is not drawn from."""
    loss = EVERY[name]()
    for step in range(3):
        loss(*batch(step))
    before, (z0, z1, index) = snapshot(loss), batch(5)
    first = loss.eval()(z0, z1, index, return_stats=True)
    with torch.no_grad():
        assert_identical(loss(z0, z1, index, return_stats=True), first)
    assert_unchanged(loss, before)
    value = loss.train()(z0, z1, index)
    if "cache" not in name and "bank" not in name:
        assert_identical(value, first[0])
    assert "step" not in before or loss.step == before["step"] + 1


def trained(loss, steps):
    values, states = [], [snapshot(loss)]
    for step in steps:
        values.append(loss(*batch(step)))
        states.append(snapshot(loss))
    return values, states


@pytest.mark.parametrize("name", [name for name in EVERY if "fused" not in name])
def test_a_run_resumed_at_any_step_is_the_same_run(name):
    values, states = trained(EVERY[name](), range(8))
    for k, state in enumerate(states):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        resumed = EVERY[name]()
        resumed.load_state_dict(torch.load(file), strict=True)
        assert_identical(trained(resumed, range(k, 8)), (values[k:], states[k:]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_a_model_leaves_what_its_loss_keeps_alone(name, cast):
    loss = LOSSES[name]()
    trained(loss, range(3))
    loss.step.fill_(2_000_003)  # half precision cannot hold it
    model, before = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ModuleDict({"loss": loss})), snapshot(loss)
    getattr(model, cast)()
    assert model[0].weight.dtype == {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    assert_unchanged(loss, before)


def test_every_loss_is_tried_here():
    assert {type(make()) for make in EVERY.values()} == {method.loss for method in TABLE.values()}


@pytest.mark.parametrize(
    "name", ["NT-Xent", "CLIP, learnt, unnormalised", "SogCLR, bimodal", "iSogCLR", "EMC2, i-SIR", "EMC2, bank"]
)
def test_one_graph_of_any_size_has_the_statistics_too(name):
    torch.compiler.reset()
    loss, other = EVERY[name](), EVERY[name]()
    whole = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for step in range(2):
        (found, stats), (expected, others) = (some(*batch(step), return_stats=True) for some in (whole, other))
        torch.testing.assert_close((found, stats), (expected, others), equal_nan=True)


@pytest.mark.parametrize(
    "name", ["NT-Xent", "SogCLR", "EMC2", "EMC2, i-SIR, bimodal", "EMC2, i-SIR, recompute", "cache"]
)
def test_embeddings_may_change_between_the_loss_and_its_gradient(name):
    gradients = []
    for changes in (False, True):
        z0, z1, index = batch(0)
        leaves = [z.detach().clone().requires_grad_() for z in (z0, z1)]
        value = EVERY[name]()(*leaves, index)
        if changes:
            with torch.no_grad():
                leaves[0].mul_(2)
        gradients.append(torch.autograd.grad(value, leaves))
    assert_identical(*gradients)
