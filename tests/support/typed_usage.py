"""The public API as users call it, with the types that a checker is to find (test_typing.py), and mistakes that it is
to see: with ``mypy --strict`` an ignore that ignores nothing is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import emc2_kernels as emc2
from emc2_kernels import batching, checkpoint, data, losses
from emc2_kernels.adapters.metric_learning import SelfSupervisedLoss
from emc2_kernels.losses import CachedSoftmaxLoss, ClipLoss, EMC2Loss, ISogCLRLoss, NTXentLoss, SogCLRLoss

ITEMS, DIM = 12, 8
Stats = dict[str, Tensor]


def pairs(size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    z0, z1 = (torch.randn(size, DIM, requires_grad=True) for _ in range(2))
    return z0, z1, torch.randperm(ITEMS)[:size]


def use_losses(asked: bool) -> None:
    z0, z1, index = pairs()
    loss_fn = EMC2Loss(ITEMS, DIM, temperature=0.2)
    assert_type(loss_fn(z0, z1, index), Tensor).backward()  # type: ignore[no-untyped-call]  # of torch's
    loss, stats = loss_fn(z0, z1, index, return_stats=True)
    assert_type(loss, Tensor)
    assert_type(stats["ntxent"], Tensor)
    assert_type(loss_fn(z0, z1, index, return_stats=asked), Tensor | tuple[Tensor, Stats])
    state: dict[str, Any] = loss_fn.state_dict()
    loss_fn.load_state_dict(state)
    module: nn.Module = loss_fn.to("cpu").eval()
    assert isinstance(module, EMC2Loss)
    for other in (SogCLRLoss(ITEMS), ISogCLRLoss(ITEMS), CachedSoftmaxLoss(ITEMS, DIM)):
        assert_type(other(z0, z1, index, return_stats=True), tuple[Tensor, Stats])
    assert_type(NTXentLoss(temperature=0.2)(z0, z1), Tensor)
    assert_type(NTXentLoss()(z0, z1, logit_scale=torch.tensor(5.0)), Tensor)
    assert_type(ClipLoss(learn_temperature=True)(z0, z1, return_stats=True), tuple[Tensor, Stats])


def use_losses_by_name(name: str) -> None:
    z0, z1, index = pairs()
    assert_type(losses.get("emc2", num_items=ITEMS, dim=DIM), EMC2Loss)
    assert_type(losses.get("simclr")(z0, z1), Tensor)
    assert_type(losses.get("clip"), ClipLoss)
    assert_type(losses.get("sogclr", num_items=ITEMS), SogCLRLoss)
    assert_type(losses.get("isogclr", num_items=ITEMS), ISogCLRLoss)
    assert_type(losses.get("cached", num_items=ITEMS, dim=DIM)(z0, z1, index), Tensor)
    assert_type(losses.get(name), nn.Module)


def use_steps() -> None:
    queries, keys = torch.randn(3, DIM, requires_grad=True), torch.randn(5, DIM)
    state = emc2.init_state(3)
    result = emc2.mh_step(queries, keys, state, temperature=0.1, seed=0, step=torch.tensor(1), return_lse=True)
    assert_type(result, emc2.MHResult)
    assert_type(result.samples, Tensor)
    assert_type(result.state, emc2.MHState)
    assert_type(result.lse, Tensor | None)
    walk = emc2.mh_transition(queries, keys, temperature=torch.tensor(0.1), seed=0, step=0)
    assert_type(emc2.apply(emc2.compose(walk, walk), result.state).state.key, Tensor)
    step = emc2.isir_step(queries, keys, state, temperature=0.1, seed=0, step=0)
    assert_type(step, emc2.ISIRResult)
    assert_type(step.lse.mean() + step.carried_weight.sum(), Tensor)
    assert_type(emc2.gumbel_sample(queries, keys, temperature=0.1, seed=0, step=0, num_samples=2), Tensor)
    assert_type(emc2.softmax_sample(queries, keys, temperature=0.1), Tensor)
    assert_type(emc2.contrastive_lse(queries, keys, temperature=0.1), Tensor)
    assert_type(emc2.backends(), dict[str, str])


def use_stores(folder: Path) -> None:
    index, embeddings = torch.arange(4), torch.randn(4, DIM)
    chains, bank = emc2.ChainStore(ITEMS), emc2.EmbeddingBank(ITEMS, DIM, dtype=torch.float32)
    bank.update(index, 0, embeddings, step=0)
    state = chains.read(index, 0, queries=embeddings, bank=bank, temperature=0.1)
    assert_type(state, emc2.MHState)
    chains.write(index, 0, state)
    assert_type(bank.lookup(2 * index), Tensor)
    assert_type(bank.age(2 * index), Tensor)
    checkpoint.save(folder / "run.pt", {"chains": chains.state_dict()})
    chains.load_state_dict(checkpoint.load(folder / "run.pt")["chains"])


def use_batches() -> None:
    sampler = batching.GlobalContrastiveBatchSampler(ITEMS, 4, drop_last=True)
    batches: Iterator[list[int]] = iter(sampler)
    assert_type(next(batches), list[int])
    sampler.update(torch.randn(ITEMS, DIM))
    assert_type(sampler.facts, batching.GraphFacts | None)
    dataset = torch.utils.data.TensorDataset(torch.randn(ITEMS, DIM), torch.arange(ITEMS))
    assert len(torch.utils.data.DataLoader(dataset, batch_sampler=sampler)) == ITEMS // 4


def use_numbers() -> None:
    dataset = torch.utils.data.TensorDataset(torch.randn(ITEMS, DIM))
    assert_type(data.indexed(dataset), data.IndexedDataset)
    assert_type(data.indexed(dataset)[3], tuple[Any, ...] | dict[Any, Any])
    numbers = data.ItemNumbers(f"{item}.png" for item in range(ITEMS))
    assert_type(numbers(["3.png"]), Tensor)
    assert_type(data.hash_slots(["a", b"b", 3], 10), Tensor)
    assert_type(data.hash_slot("a", 10), int)
    z0, z1, index = pairs()
    loss_fn = SelfSupervisedLoss(EMC2Loss(ITEMS, DIM), report=True)
    assert_type(loss_fn.forward(z0, z1, index), Tensor)
    assert_type(loss_fn.stats, Stats)


def mistakes() -> None:
    """Never called."""
    z0, z1, index = pairs()
    loss_fn = EMC2Loss(ITEMS, DIM)
    loss_fn(z0, z1)  # type: ignore[call-overload]  # the index is missing
    loss_fn(z0, z1, [0, 1])  # type: ignore[call-overload]
    loss_fn(z0, z1, index, logit_scale=5.0)  # type: ignore[call-overload]  # of NT-Xent and CLIP alone
    loss_fn(z0, z1, index, return_stats=True).backward()  # type: ignore[attr-defined]  # of a pair
    EMC2Loss(ITEMS, DIM, temprature=0.2)  # type: ignore[call-arg]
    EMC2Loss(ITEMS)  # type: ignore[call-arg]
    result = emc2.mh_step(z0, z1, emc2.init_state(6), temperature=0.1, seed=0, step=0)
    result.sample  # type: ignore[attr-defined]  # noqa: B018
    result.lse.mean()  # type: ignore[union-attr]  # None where it was not asked for
    emc2.isir_step(z0, z1, temperature=0.1, seed=0, step=0)  # type: ignore[call-arg]  # the state is missing
    data.hash_slots(["a"])  # type: ignore[call-arg]
    emc2.EmbeddingBank(ITEMS, DIM, dtype="float32")  # type: ignore[arg-type]


def main(folder: Path) -> None:
    use_losses(asked=False)
    use_losses_by_name("ntxent")
    use_steps()
    use_stores(folder)
    use_batches()
    use_numbers()
