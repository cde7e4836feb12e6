"""A batch that is not finite leaves what a loss keeps as it was, where nobody looks at values: compiled, in tensors of
another class (as on a GPU), and in the fused kernels. So a step that GradScaler skips is as if it had not been."""

import pytest
import torch
from helpers import RUNNABLE, assert_identical, assert_unchanged, int64, named_error, normal, snapshot, with_rows

from emc2_kernels import ChainStore, EmbeddingBank, MHState
from emc2_kernels.losses import CachedSoftmaxLoss, EMC2Loss, SogCLRLoss
from emc2_kernels.stores import table

ITEMS, B, D = 12, 4, 6
CODE = normal(9, 2 * ITEMS, D)
HOME = normal(8, ITEMS, D)
INF, NAN = torch.inf, torch.nan


class Opaque(torch.Tensor):
    """A tensor whose values are not looked at."""


def encode(items, views):
    return CODE[items * 2 + views]


LOSSES = {
    "EMC2": lambda: EMC2Loss(ITEMS, D, sampler="mh", carry="cached"),
    "EMC2, bimodal": lambda: EMC2Loss(ITEMS, D, sampler="mh", bimodal=True),
    "EMC2, both views": lambda: EMC2Loss(ITEMS, D, views="both", burn_in=0.0, bank_dtype=torch.float32),
    "EMC2, i-SIR": lambda: EMC2Loss(ITEMS, D, sampler="isir"),
    "EMC2, i-SIR, bimodal": lambda: EMC2Loss(ITEMS, D, sampler="isir", bimodal=True, bank_dtype=torch.float32),
    "EMC2, i-SIR, one view": lambda: EMC2Loss(ITEMS, D, sampler="isir", views="one", queue=5),
    "EMC2, i-SIR, coupled": lambda: EMC2Loss(ITEMS, D, decoupled=False),
    "EMC2, bank": lambda: EMC2Loss(ITEMS, D, proposals="bank", num_proposals=8),
    "EMC2, bank, bimodal": lambda: EMC2Loss(ITEMS, D, proposals="bank", bimodal=True),
    "SogCLR": lambda: SogCLRLoss(ITEMS),
    "SogCLR, bimodal": lambda: SogCLRLoss(ITEMS, bimodal=True, gamma_schedule="cosine", gamma_steps=5),
    "iSogCLR": lambda: SogCLRLoss(ITEMS, individual_temperature=True),
    "cache": lambda: CachedSoftmaxLoss(ITEMS, D),
    "cache, refreshed": lambda: CachedSoftmaxLoss(ITEMS, D, encode=encode, refresh=0.1),
    "cache, bimodal": lambda: CachedSoftmaxLoss(ITEMS, D, bimodal=True),
}
COMPILED = ["EMC2", "EMC2, i-SIR", "EMC2, i-SIR, one view", "EMC2, bank", "iSogCLR", "cache"]


def batch(step, cls=torch.Tensor):
    """Of embeddings that barely move, so that what is kept counts."""
    index = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(step))[:B]
    z = (HOME[index] + 0.3 * normal(10 * step + view, B, D) for view in (0, 1))
    return *(rows.as_subclass(cls).requires_grad_() for rows in z), index


def spoilt(step, value, view=0, cls=torch.Tensor):
    z0, z1, index = batch(step)
    z = [z0.detach(), z1.detach()]
    z[view] = with_rows(z[view], (2, 3), value)
    return *(rows.as_subclass(cls).requires_grad_() for rows in z), index


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_that_is_not_finite_is_forgotten(name, value):
    loss, other = LOSSES[name](), LOSSES[name]()
    for step in range(3):
        for some in (loss, other):
            some(*batch(step, Opaque))
    before = snapshot(loss)
    for view in (0, 1):
        bad = loss(*spoilt(3, value, view, Opaque))
        assert not bad.isfinite()
        assert_unchanged(loss, before)
    for step in range(4, 7):  # and training goes on as without it
        assert_identical(loss(*batch(step)), other(*batch(step)))
    assert_identical(snapshot(loss), snapshot(other))
    for kept in snapshot(loss).values():
        assert not kept.isnan().any()
    assert all(type(kept) is torch.Tensor for kept in loss.state_dict().values())


LONG = {
    "EMC2": lambda: EMC2Loss(ITEMS, D, sampler="mh", carry="cached", normalize=False, bank_dtype=torch.float32),
    "EMC2, i-SIR": lambda: EMC2Loss(ITEMS, D, sampler="isir", normalize=False),
    "EMC2, bank": lambda: EMC2Loss(ITEMS, D, proposals="bank", num_proposals=8, normalize=False),
    "iSogCLR": lambda: SogCLRLoss(ITEMS, individual_temperature=True, normalize=False),
    "cache": lambda: CachedSoftmaxLoss(ITEMS, D, normalize=False),
}


@pytest.mark.parametrize("value", [3e19, 3e38], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_a_batch_whose_scores_overflow_is_forgotten(name, value):
    loss = LONG[name]()
    for step in range(3):
        loss(*batch(step, Opaque))
    before = snapshot(loss)
    loss(*spoilt(3, value, cls=Opaque))
    assert_unchanged(loss, before)
    loss(*batch(4, Opaque))
    assert loss.step == 4 and not any(kept.isnan().any() for kept in snapshot(loss).values())


@pytest.mark.parametrize("name", COMPILED)
def test_a_step_that_the_scaler_skips_is_forgotten(name):
    """An encoder and a compiled loss under GradScaler: weights, scale and state, with a bad batch and without one."""

    def trained(batches):
        torch.compiler.reset()
        torch.manual_seed(0)
        encoder, loss = torch.nn.Linear(D, D), LOSSES[name]()
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
        scaler, scales = torch.amp.GradScaler("cpu", init_scale=1024.0), []
        for x0, x1, index in batches:
            optimizer.zero_grad()
            scaler.scale(compiled(encoder(x0), encoder(x1), index)).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return snapshot(encoder), snapshot(loss), scales

    good = [tuple(x.detach() for x in batch(step)) for step in range(4)]
    bad = tuple(x.detach() for x in spoilt(7, NAN))
    *expected, scales = trained(good)
    *found, scales_with = trained([*good[:2], bad, *good[2:]])
    assert scales == [1024.0] * 4 and scales_with == [1024.0] * 2 + [512.0] * 3
    assert_identical(found, expected)


@pytest.mark.skipif("triton" not in RUNNABLE, reason="Triton cannot run here")
@pytest.mark.parametrize(
    ("sampler", "views", "value"),
    [("mh", "one", NAN), ("mh", "both", INF), ("isir", "both", NAN), ("isir", "both", INF)],
    ids=str,
)
def test_the_fused_kernels_forget_it(sampler, views, value, monkeypatch):
    """With the look at the arguments left out, as on a GPU."""
    from emc2_kernels import checks
    from emc2_kernels.losses import emc2_fused, emc2_isir_fused

    calls = []
    monkeypatch.setattr(checks, "values_visible", lambda _: False)
    module, name = (emc2_fused, "surrogate") if sampler == "mh" else (emc2_isir_fused, "loss")
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: calls.append(1) or original(*arguments))
    loss = EMC2Loss(ITEMS, D, sampler=sampler, views=views, backend="triton")
    for step in range(2):
        loss(*batch(step))
    before = snapshot(loss)
    for view in (0, 1):
        assert not loss(*spoilt(3, value, view)).isfinite()
        assert_unchanged(loss, before)
    assert loss(*batch(1)).isfinite() and len(calls) == 5
    assert loss.step == 3


@pytest.mark.skipif("triton" not in RUNNABLE, reason="Triton cannot run here")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_embedding_that_overflows_in_the_bank_is_not_kept(backend):
    loss = EMC2Loss(ITEMS, D, sampler="mh", temperature=1e6, normalize=False, bank_dtype=torch.float16, backend=backend)
    z0, z1, index = (x.detach() for x in batch(0))
    loss(z0, z1, index)
    before = snapshot(loss)
    loss(with_rows(z0 + 1, 1, 1e5), z1 + 1, index)
    label = index[1] * 2
    assert_identical(loss.bank.embeddings[label], before["bank.embeddings"][label])
    assert loss.bank.written_at[label] == 0 and (loss.bank.written_at[index[[0, 2, 3]] * 2] == 1).all()
    assert loss.step == 2


def test_an_entry_that_encodes_to_what_is_not_finite_stays_old_with_its_batchs_mean():
    """The others are refreshed."""
    spoil = []

    def sometimes(items, views):
        made = encode(items, views)
        return (with_rows(made, 0, NAN) if spoil else made).as_subclass(Opaque)

    loss = CachedSoftmaxLoss(ITEMS, D, encode=sometimes, refresh=0.1)  # 3 entries a step
    for step in range(10):
        loss(*batch(step))
    before, oldest = snapshot(loss), loss._oldest(batch(10)[2].repeat(2) * 2)
    spoil.append(1)
    loss(*batch(10))
    assert oldest.numel() == 3
    for name in ("bank.embeddings", "bank.written_at", "batch_means.means"):
        kept = snapshot(loss)[name]
        assert_identical(kept[oldest[0]], before[name][oldest[0]])
        assert all((kept[label] != before[name][label]).any() for label in oldest[1:]), name


def test_a_score_that_overflows_is_not_kept_and_one_that_is_not_there_is():
    store = ChainStore(5, views=1)
    store.write(torch.arange(5), 0, MHState(torch.arange(5), torch.arange(5.0)))
    scores = torch.tensor([INF, NAN, -INF, 9.0])
    store.write(int64(0, 1, 2, 3), 0, MHState(int64(7, 7, -1, 7), scores))
    assert_identical(store.key, int64(0, 1, -1, 7, 4))
    assert_identical(store.score, torch.tensor([0.0, 1.0, -INF, 9.0, 4.0]))


def test_of_duplicates_the_last_one_that_is_finite_is_kept():
    store = ChainStore(3, views=1)
    scores = torch.tensor([1.0, 2.0, NAN, 3.0, INF, NAN])
    store.write(int64(0, 0, 0, 1, 1, 2), 0, MHState(torch.arange(6), scores))
    assert_identical(store.key, int64(1, 3, -1))
    assert_identical(store.score, torch.tensor([2.0, 3.0, -INF]))


def test_a_bank_refuses_what_is_not_finite_where_it_looks_and_skips_it_elsewhere():
    bank = EmbeddingBank(3, 2, views=1)
    bank.update(torch.arange(3), 0, torch.ones(3, 2), 1)
    before = snapshot(bank)
    bad = torch.tensor([[2.0, 2.0], [2.0, NAN], [-INF, 2.0]])
    with named_error(ValueError, "embeddings"):
        bank.update(torch.arange(3), 0, bad, 2)
    assert_unchanged(bank, before)
    bank.update(torch.arange(3), 0, bad.as_subclass(Opaque), 2)
    assert_identical(bank.embeddings.float(), torch.tensor([[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]]))
    assert_identical(bank.written_at, int64(2, 1, 1))


@pytest.mark.parametrize("only", [False, True])
def test_a_write_can_be_called_off_on_the_device(only):
    store, bank = ChainStore(2, views=1), EmbeddingBank(2, 2, views=1)
    before = snapshot(store), snapshot(bank)
    store.write(torch.arange(2), 0, MHState(torch.arange(2), torch.ones(2)), only=torch.tensor(only))
    bank.update(torch.arange(2), 0, torch.ones(2, 2), 3, only=torch.tensor(only))
    after = snapshot(store), snapshot(bank)
    assert bank.last_step == (3 if only else 0)
    if not only:
        assert_identical(after, before)
    else:
        assert_identical(after[0]["key"], torch.arange(2))
        assert_identical(after[1]["written_at"], int64(3, 3))


@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith(("EMC2", "cache")) and "refr" not in name])
def test_rows_that_were_looked_at_are_kept_without_another_look(name, monkeypatch):
    loss, looks = LOSSES[name](), []
    monkeypatch.setattr(table, "_writable_rows", lambda rows: looks.append(rows.shape))
    loss(*batch(0))
    assert looks == []
    loss(*batch(1, Opaque))
    assert looks
