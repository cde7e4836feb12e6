"""Inductor's own view of the library. It merges equal values and drops copies, which "aot_eager" does not."""

import pytest
import torch
from helpers import RUNNABLE, normal, snapshot

from emc2_kernels import MHState, contrastive_lse, isir_step
from emc2_kernels.losses import TABLE, CachedSoftmaxLoss, ClipLoss, EMC2Loss, NTXentLoss, SogCLRLoss

B, D, ITEMS = 4, 6, 7  # so few that a step reads what it is about to write
CODE = normal(9, 2 * ITEMS, D)
# All of Inductor but its C++, which takes some 4 s a case: every operation calls torch's.
GRAPHS_ONLY = {"fallback_by_default": True} if hasattr(torch._inductor.config, "fallback_by_default") else {}


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*collapses when it trains from scratch"),
    pytest.mark.one_seed,  # what moves seeds looks at the callers, which Dynamo does not trace
]


@pytest.fixture(autouse=True)
def compiled_anew():
    """What another version of the library has left in a cache proves nothing."""
    torch.compiler.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def encode(items, views):
    return CODE[items * 2 + views].tanh()


def emc2(**options):
    return lambda backend: EMC2Loss(ITEMS, D, **{"sampler": "mh"} | options, temperature=0.2, backend=backend)


def isir(**options):
    return emc2(sampler="isir", **options)


def cached(**options):
    return lambda backend: CachedSoftmaxLoss(ITEMS, D, temperature=0.2, backend=backend, **options)


def in_batch(loss, **options):
    return lambda backend: loss(temperature=0.2, backend=backend, **options)


def sogclr(**options):
    return lambda backend: SogCLRLoss(ITEMS, temperature=0.2, backend=backend, **options)


LOSSES = {
    "NT-Xent": in_batch(NTXentLoss),
    "CLIP, learnt": in_batch(ClipLoss, learn_temperature=True),
    "SogCLR, bimodal": sogclr(bimodal=True, gamma_schedule="cosine", gamma_steps=9),
    "iSogCLR": sogclr(individual_temperature=True),
    "EMC2, bimodal": emc2(bimodal=True),
    "EMC2, both views": emc2(views="both"),
    "EMC2, i-SIR": isir(),
    "EMC2, i-SIR, bimodal": isir(bimodal=True),
    "EMC2, i-SIR, one view": isir(views="one", queue=5),
    "EMC2, bank": emc2(proposals="bank", num_proposals=8),
    "EMC2, bank, bimodal": emc2(proposals="bank", bimodal=True),
    "EMC2, bank, recompute": emc2(proposals="bank", carry="recompute", encode=encode),
    "negative cache, bimodal": cached(bimodal=True),
    "negative cache, corrected": cached(num_samples=2),
    "negative cache, refreshed": cached(encode=encode),
    "negative cache, recompute": cached(carry="recompute", encode=encode),
}
# How many keys are encoded again breaks the graph.
BROKEN = {name for name in LOSSES if "recompute" in name}
ON_TRITON = ("iSogCLR", "EMC2, both views", "EMC2, bank", "negative cache, corrected")


def trained(loss, run, steps):
    """Values and gradients of ``run``, which is the loss or a compiled one, and all that the loss keeps."""
    history = []
    for step in range(steps):
        z0, z1 = (normal(seed + step, B, D).requires_grad_() for seed in (0, 30))
        index = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(step))[:B]
        value = run(z0, z1, index)
        value.backward()
        gradients = [parameter.grad.clone() for parameter in loss.parameters()]
        history.append((value.detach(), z0.grad, z1.grad, gradients, snapshot(loss)))
    return history


def assert_compiles_to_the_same(name, backend, options, steps):
    plain, inside = (LOSSES[name](backend) for _ in range(2))
    fast = torch.compile(inside, fullgraph=name not in BROKEN, options=options)
    for actual, expected in zip(trained(inside, fast, steps), trained(plain, plain, steps), strict=True):
        # C++ of Inductor's adds in another order; what falls on the other side of a bfloat16 of the bank is 1e-5 of the
        # next step's value.
        torch.testing.assert_close(actual[:-1], expected[:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual[-1], expected[-1])


@pytest.mark.parametrize("options", [GRAPHS_ONLY, pytest.param({}, marks=pytest.mark.slow)], ids=["graphs", "C++"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_losses_are_the_eager_ones(name, options):
    assert_compiles_to_the_same(name, "cpu", options, steps=5)


@pytest.mark.skipif("triton" not in RUNNABLE, reason="in Triton's interpreter")
@pytest.mark.parametrize("name", ON_TRITON)
def test_compiled_losses_on_triton(name):
    assert_compiles_to_the_same(name, "triton", GRAPHS_ONLY, steps=1)


X, Y, IDS, OTHERS = normal(0, B, D), normal(1, B, D), torch.arange(B) % 3, torch.arange(B) // 2


def log_sum(queries, keys, query_ids, key_ids, backend="cpu", temperature=0.2):
    ids = {"query_ids": query_ids, "key_ids": key_ids}
    return contrastive_lse(queries, keys, temperature=temperature, backend=backend, **ids)


def gradients(function, queries, keys, *ids):
    """Values and gradients; of one tensor for both, one."""
    leaves = {tensor: tensor.clone().requires_grad_() for tensor in {queries, keys}}
    value = function(leaves[queries], leaves[keys], *ids)
    return value.detach(), *torch.autograd.grad(value.sum(), [leaves[queries], leaves[keys]])


def assert_calls_are_the_eager_ones(function, *calls):
    fast = torch.compile(function, fullgraph=True, options=GRAPHS_ONLY)
    for arguments in calls:
        torch.testing.assert_close(gradients(fast, *arguments), gradients(function, *arguments))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_what_is_compiled_for_one_tensor_is_not_used_for_two(first):
    calls = [(X, X, IDS, IDS), (X, Y, IDS, IDS), (X, X, IDS, OTHERS)]
    assert_calls_are_the_eager_ones(log_sum, *calls[first:], *calls[:first], (Y, Y, OTHERS, OTHERS))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_equal_operands_that_are_not_one(backend):
    """Inductor gives the operator one tensor for both, of which each has its own gradient, or one of them has none."""

    def several(queries, keys, query_ids, key_ids):
        fixed = log_sum(queries.detach(), queries, query_ids, query_ids, backend)
        copied = log_sum(keys, keys + 0, key_ids, key_ids.clone(), backend)
        learnt = log_sum(keys.detach(), keys, key_ids, key_ids, backend, temperature=queries.square().sum(1))
        return torch.stack((fixed, copied, learnt))

    assert_calls_are_the_eager_ones(several, (X, Y, IDS, OTHERS))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_steps_over_equal_operands_that_are_not_one(backend):
    """Of which ids, labels and scores hold the same as others, too."""

    def resampled(queries, keys, query_ids, key_ids, **options):
        state = MHState(query_ids, queries.sum(1))
        options |= {"temperature": 0.2, "seed": 1, "step": 2, "query_ids": query_ids, "key_ids": key_ids}
        return isir_step(queries, keys, state, backend=backend, **options)

    def several(queries, keys, query_ids, key_ids):
        fixed = resampled(queries.detach(), queries, query_ids, query_ids, carried_ids=query_ids)
        copied = resampled(keys, keys + 0, key_ids, key_ids.clone(), key_labels=key_ids + 0)
        law = queries.sum(1).detach()
        learnt = resampled(keys.detach(), keys, key_ids, key_ids, carried_ids=query_ids, log_proposal=law)
        drawn = torch.stack([result.state.key for result in (fixed, copied, learnt)])
        return torch.stack([result.lse for result in (fixed, copied, learnt)]) + drawn

    assert_calls_are_the_eager_ones(several, (X, Y, IDS, OTHERS))


def test_every_loss_is_compiled_here():
    assert {method.loss for method in TABLE.values()} == {type(build("cpu")) for build in LOSSES.values()}
