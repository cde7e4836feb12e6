"""Items that a data set has not, where a loss cannot see its index before the graph runs: the error of an eager call,
and nothing has been written."""

import pytest
import torch
from helpers import HOW, assert_unchanged, compiled, int64, normal, snapshot, subclassed

from emc2_kernels import checks
from emc2_kernels.losses import TABLE, CachedSoftmaxLoss, ClipLoss, EMC2Loss, ISogCLRLoss, NTXentLoss, SogCLRLoss

B, D, ITEMS = 4, 6, 20
Z0, Z1 = normal(0, B, D), normal(1, B, D)
CODE = normal(9, 2 * ITEMS, D)


def encode(items, views):
    return CODE[items * 2 + views].tanh()


LOSSES = {
    "NT-Xent": NTXentLoss,
    "CLIP, learnt": lambda: ClipLoss(learn_temperature=True),
    "SogCLR": lambda: SogCLRLoss(ITEMS),
    "SogCLR, bimodal": lambda: SogCLRLoss(ITEMS, bimodal=True, gamma_schedule="cosine", gamma_steps=9),
    "iSogCLR": lambda: ISogCLRLoss(ITEMS),
    "iSogCLR, bimodal": lambda: ISogCLRLoss(ITEMS, bimodal=True),
    "EMC2": lambda: EMC2Loss(ITEMS, D, sampler="mh"),
    "EMC2, bimodal": lambda: EMC2Loss(ITEMS, D, sampler="mh", bimodal=True),
    "EMC2, both views": lambda: EMC2Loss(ITEMS, D, sampler="mh", views="both"),
    "EMC2, recompute": lambda: EMC2Loss(ITEMS, D, sampler="mh", carry="recompute", encode=encode),
    "EMC2, i-SIR": lambda: EMC2Loss(ITEMS, D, sampler="isir"),
    "EMC2, i-SIR, bimodal": lambda: EMC2Loss(ITEMS, D, sampler="isir", bimodal=True),
    "EMC2, i-SIR, one view": lambda: EMC2Loss(ITEMS, D, sampler="isir", views="one", queue=0),
    "EMC2, i-SIR, recompute": lambda: EMC2Loss(ITEMS, D, sampler="isir", carry="recompute", encode=encode),
    "EMC2, bank": lambda: EMC2Loss(ITEMS, D, proposals="bank", num_proposals=8),
    "EMC2, bank, bimodal": lambda: EMC2Loss(ITEMS, D, proposals="bank", bimodal=True),
    "EMC2, bank, recompute": lambda: EMC2Loss(ITEMS, D, proposals="bank", carry="recompute", encode=encode),
    "negative cache": lambda: CachedSoftmaxLoss(ITEMS, D, num_samples=2),
    "negative cache, bimodal": lambda: CachedSoftmaxLoss(ITEMS, D, bimodal=True),
    "negative cache, refreshed": lambda: CachedSoftmaxLoss(ITEMS, D, encode=encode),
    "negative cache, recompute": lambda: CachedSoftmaxLoss(ITEMS, D, carry="recompute", encode=encode),
}


def warm(name):
    """A loss whose state has moved on, and one more than the largest item that it takes."""
    loss = LOSSES[name]()
    for seed in range(2):
        loss(Z0, Z1, torch.randperm(ITEMS, generator=torch.Generator().manual_seed(seed))[:B])
    return loss, getattr(loss, "num_items", checks.MAX_CHAIN_ID)


def assert_named(run, end, item):
    with pytest.raises(ValueError) as caught:
        run(index=int64(1, 2, item, -5))
    assert str(caught.value) == f"index must hold values in [0, {end}), got {item} at [2]"


# How many keys are encoded again breaks the graph.
BROKEN = [name for name in LOSSES if "recompute" in name]


@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name in LOSSES for how in HOW if not (name in BROKEN and how is compiled)]
)
def test_items_out_of_range_are_named_and_change_nothing(name, how):
    loss, end = warm(name)
    torch._dynamo.reset()

    def call(index):
        return loss(Z0, Z1, index)

    before = snapshot(loss)
    for item in (-1, end, 2**40, -(2**62), 2**62):
        assert_named(lambda index: how(call, {"index": index}), end, item)
        assert_unchanged(loss, before)


@pytest.mark.parametrize("name", BROKEN)
def test_items_out_of_range_are_named_before_a_graph_breaks(name):
    loss, end = warm(name)
    torch._dynamo.reset()
    fast, before = torch.compile(loss, backend="aot_eager"), snapshot(loss)
    assert_named(lambda index: fast(Z0, Z1, index), end, end)
    assert_unchanged(loss, before)


@pytest.mark.parametrize("name", ["SogCLR", "EMC2", "EMC2, i-SIR", "negative cache"])
def test_items_out_of_range_under_inductor(name):
    """It writes to what is kept in the middle of its code, and moves writes about."""
    loss, end = warm(name)
    torch.compiler.reset()
    options = {"fallback_by_default": True, "fx_graph_cache": False}  # of its C++, some 4 s a case, nothing
    fast, before = torch.compile(loss, fullgraph=True, options=options), snapshot(loss)
    for item in (-1, end, 2**62):
        assert_named(lambda index: fast(Z0, Z1, index), end, item)
        assert_unchanged(loss, before)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("NT-Xent", "CLIP, learnt")])
def test_what_moves_whatever_the_items_waits_for_the_look(name, monkeypatch):
    """No compiler can know that a counter has to wait, unless the look reads it."""
    loss, _ = warm(name)
    waiting, look = [], checks.look_within

    def recorded(value, name, lowest, end, before):
        waiting.extend(before)
        return look(value, name, lowest, end, before)

    monkeypatch.setattr(checks, "look_within", recorded)
    counters = [buffer for buffer in loss.buffers() if buffer.dim() == 0]
    before = [int(counter) for counter in counters]
    subclassed(lambda index: loss(Z0, Z1, index), {"index": int64(1, 2, 3, 4)})
    moved = [counter for counter, value in zip(counters, before, strict=True) if int(counter) != value]
    assert moved and all(any(counter is other for other in waiting) for counter in moved)


def test_every_loss_is_here():
    assert {method.loss for method in TABLE.values()} == {type(build()) for build in LOSSES.values()}
