"""Run by every rank (see ranks.py): losses whose batch lies over the ranks, beside one process with the whole batch.

The encoder's numbers are small multiples of powers of two, and so are its embeddings' products: where these are not
normalised, scores are exact and both walk the same chains, bit by bit.
"""

from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist
from helpers import snapshot

from emc2_kernels import losses

ITEMS, INPUTS, DIM = 25, 8, 16
# Over rows.
MEANS = ("positive_similarity", "negative_similarity", "carry_share", "carried_weight", "weight_sum", "temperature")
OF_ISIR = ("acceptance", "log_partition", "staleness")

FLOORS = (1, 0, 1)  # a value and a temperature's gradient are what is left of parts of this size


class Case(NamedTuple):
    loss: str
    options: dict
    gather: str = "all"
    index: bool = True
    dtype: torch.dtype = torch.float32
    exact: bool = False  # embeddings are not normalised, so that scores are exact
    sharded: bool = False

    @property
    def name(self):
        options = " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in self.options.items())
        shown = [self.loss, self.gather, "sharded" * self.sharded, "" if self.index else "no index", options]
        dtype = "" if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.")
        return " ".join(filter(None, [*shown, dtype]))

    @property
    def wide(self):
        """The dtype of the encoder and of what is learnt."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def over(self, group):
        """Options of a loss whose batch lies over ranks."""
        return {"gather": self.gather, "process_group": group} | ({"sharded": True} if self.sharded else {})

    def make(self, encoder, **gather):
        options = self.options | ({"normalize": False, "bank_dtype": torch.float32} if self.exact else {})
        if options.get("carry") == "recompute" or options.get("refresh"):
            options["encode"] = encoder.encode
        if self.loss == "emc2":
            options = {"sampler": "mh"} | options
        takes = losses.TABLE[self.loss].options()
        sizes = {name: value for name, value in {"num_items": ITEMS, "dim": DIM}.items() if name in takes}
        return losses.get(self.loss, **sizes, temperature=0.25, **options, **gather).to(self.wide)


def _cases():
    for loss, gather, index, learn in product(("ntxent", "clip"), ("all", "ring"), (True, False), (True, False)):
        yield Case(loss, {"learn_temperature": learn}, gather, index)
    for gather in ("all", "ring"):
        yield Case("ntxent", {"learn_temperature": True}, gather, dtype=torch.float64)
        yield Case("clip", {"learn_temperature": True}, gather, dtype=torch.float64)
    for loss, bimodal in product(("sogclr", "isogclr"), (False, True)):
        yield Case(loss, {"bimodal": bimodal})
    yield Case("sogclr", {"gamma_schedule": "cosine", "gamma_steps": 3})
    for proposals, carries in {"batch": ("cached", "recompute"), "bank": ("corrected", "recompute")}.items():
        for carry, bimodal in product(carries, (False, True)):
            yield Case("emc2", {"proposals": proposals, "carry": carry, "bimodal": bimodal}, exact=True)
    for gather in ("all", "ring"):
        yield Case("emc2", {"views": "both"}, gather, exact=True)
        yield Case("emc2", {}, gather)  # the defaults: normalised, and kept in bfloat16
        yield Case("emc2", {"backend": "reference", "bank_dtype": torch.float64}, gather, dtype=torch.float64)
    for carry, bimodal in product(("cached", "recompute"), (False, True)):
        yield Case("emc2", {"carry": carry, "bimodal": bimodal}, "ring", exact=True)
    for gather in ("all", "ring"):
        yield Case("emc2", {}, gather, sharded=True)
        for carry, bimodal in product(("cached", "recompute"), (False, True)):
            yield Case("emc2", {"carry": carry, "bimodal": bimodal}, gather, exact=True, sharded=True)
    yield from _isir_cases()
    for loss, gather, options in IN_HALF_PRECISION:
        yield Case(loss, options, gather, dtype=torch.bfloat16, exact=loss in ("emc2", "cached"))
    for carry, refresh, bimodal in product(("corrected", "recompute"), (0, 0.1), (False, True)):
        yield Case("cached", {"carry": carry, "refresh": refresh, "bimodal": bimodal}, exact=True)


def _isir_cases():
    """EMC2 by i-SIR, in all ways in which keys and chains lie over ranks; with and without a queue."""
    for gather, sharded in product(("all", "ring"), (False, True)):
        for carry, form in product(("cached", "recompute"), ({"views": "one"}, {"views": "both"}, {"bimodal": True})):
            options = {"sampler": "isir", "carry": carry} | form
            yield Case("emc2", options, gather, exact=True, sharded=sharded)
        for carry in ("cached", "recompute"):  # normalised, in bfloat16
            yield Case("emc2", {"sampler": "isir", "carry": carry}, gather, sharded=sharded)
        for queue, form in ((0, {"views": "both"}), (3, {"views": "one"}), (5, {"bimodal": True})):
            yield Case("emc2", {"sampler": "isir", "queue": queue} | form, gather, exact=True, sharded=sharded)
        coupled = {"sampler": "isir", "decoupled": False, "queue": 5}
        yield Case("emc2", coupled, gather, exact=True, sharded=sharded)
    for gather in ("all", "ring"):
        options = {"sampler": "isir", "bank_dtype": torch.float64}
        yield Case("emc2", options, gather, dtype=torch.float64)


CARRIES = ("cached", "corrected", "recompute")
IN_HALF_PRECISION = [
    ("ntxent", "all", {"learn_temperature": True}),
    ("ntxent", "ring", {"learn_temperature": True}),
    ("isogclr", "all", {}),
    ("emc2", "all", {"proposals": "bank"}),
    ("emc2", "ring", {}),
    ("emc2", "all", {"sampler": "isir", "views": "one", "queue": 5}),
    ("emc2", "ring", {"sampler": "isir"}),
    ("cached", "all", {}),
]
CASES = {case.name: case for case in _cases()}
# One of each way in which batches, keys and chains lie over ranks: what four ranks, which take as long as the others
# together, are asked.
EACH_WAY = {
    (case.loss, case.options.get("sampler"), case.gather, case.sharded, case.dtype): name
    for name, case in CASES.items()
}.values()
IN_A_SUBGROUP = [
    "ntxent ring no index learn_temperature=True",
    "clip all learn_temperature=True",
    "emc2 all proposals=batch carry=cached bimodal=False",
    "emc2 ring carry=recompute bimodal=True",
    "emc2 all sharded carry=cached bimodal=False",
    "emc2 all sampler=isir carry=recompute views=both",
    "emc2 ring sharded sampler=isir carry=cached views=one",
    "cached all carry=corrected refresh=0.1 bimodal=False",
    "isogclr all bimodal=False",
]


def cases(size):
    return EACH_WAY if size > 3 else CASES


class Encoder:
    """Two views of each item, and a matrix; both the same on all ranks."""

    def __init__(self, dtype, seed):
        self._draw = torch.Generator().manual_seed(seed)
        draw = torch.randint(-1, 2, (ITEMS, 2, INPUTS), generator=self._draw)
        draw[:, 1, 1:] = draw[:, 0, 1:]  # alike, so that what is kept of a view stands for it
        self._inputs = draw.to(dtype)
        self.weight = (self._small(3) / 16).to(dtype).requires_grad_()

    def _small(self, most):
        return torch.randint(-most, most + 1, (DIM, INPUTS), generator=self._draw)

    def move(self):
        """As an optimizer would, and exactly; so little that what is kept still counts."""
        with torch.no_grad():
            self.weight += (self._small(4) / 4).trunc() / 16

    def encode(self, items, views, noise=0):
        return (self._inputs[items, views] + noise) @ self.weight.T


def batches(size, seed):
    """(sizes of the ranks' parts, items, noise) for each step; noise is each row's own, of repeated items too."""
    draw = torch.Generator().manual_seed(seed)

    def batch(sizes, items):
        return sizes, items, torch.randint(-1, 2, (2, len(items), INPUTS), generator=draw) / 4

    uneven = torch.randint(ITEMS, (sum([4, 2, 5, 3][:size]),), generator=draw)
    uneven[-1] = uneven[0]  # on the first rank and on the last
    yield batch([4, 2, 5, 3][:size], uneven)
    order = torch.randperm(ITEMS, generator=draw)[: 4 * size - 1]
    padded = torch.cat((order, order[:1]))  # as DistributedSampler fills up, and deals out
    yield batch([4] * size, torch.cat([padded[rank::size] for rank in range(size)]))
    repeated = torch.randint(ITEMS, (sum([3, 5, 2, 4][:size]),), generator=draw)
    repeated[1], repeated[-2] = repeated[0], repeated[-1]
    yield batch([3, 5, 2, 4][:size], repeated)
    last = [2, 1, 3, 1][:size]
    yield batch(last, torch.randint(ITEMS, (sum(last),), generator=draw))


def relative(found, expected, floor=0.0):
    return ((found - expected).norm() / expected.norm().clamp_min(max(floor, 1e-300))).item()


def averaged(tensors, group):
    """Over ranks, as DistributedDataParallel averages gradients."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    of_ranks = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, flat, group)  # in gloo twice as fast as a reduction
    parts = torch.stack(of_ranks).mean(0).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def step(loss, encoder, items, noise, case):
    """Value, and gradients of the encoder and of the temperature."""
    encoder.weight.grad = None
    index = items * 1_000_003 + 7 if case.loss in ("ntxent", "clip") else items
    z = [encoder.encode(items, view, noise[view]).to(case.dtype) for view in (0, 1)]
    value = loss(*z, index if case.index else None)
    for parameter in loss.parameters():
        parameter.grad = None
    value.backward()
    return [value, encoder.weight.grad, *(parameter.grad for parameter in loss.parameters())]


def state_error(found, expected):
    """The worst relative error of a buffer, and the names of those of other bits."""
    worst, others, found = 0.0, [], snapshot(found)
    for name, buffer in expected.state_dict().items():
        mine = found[name]
        if not torch.equal(mine, buffer):
            others.append(name)
            a, b = (torch.where(x.isfinite(), x, 0).double() for x in (mine, buffer))
            worst = max(worst, relative(a, b, 1), float((mine.isfinite() != buffer.isfinite()).any()))
    return worst, others


def compare(case, group=None, seed=0):
    """The worst relative errors over four steps and an evaluation."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    encoder = Encoder(case.wide, seed)
    whole, part = case.make(encoder), case.make(encoder, **case.over(group))
    worst = dict.fromkeys(("value", "gradient", "temperature", "state", "evaluation", "statistics"), 0.0)
    others = set()
    for sizes, items, noise in batches(size, seed):
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        expected = step(whole, encoder, items, noise, case)
        mine = averaged(step(part, encoder, items[own], noise[:, own], case), group)
        for what, a, b, floor in zip(("value", "gradient", "temperature"), mine, expected, FLOORS, strict=False):
            worst[what] = max(worst[what], relative(a, b, floor))
        error, changed = state_error(part, whole)
        worst["state"] = max(worst["state"], error)
        others |= set(changed)
        encoder.move()
    evaluated = evaluate(case, whole, part, encoder, items, own, group, sizes[rank] / sum(sizes))
    return worst | evaluated | {"others": sorted(others), "alike": drift_is_alike(part, group)}


def drift_is_alike(loss, group):
    """Whether all ranks have the same measure of how stale is what is kept, to the bit, and have measured something."""
    if getattr(loss, "drift", None) is None:
        return True
    of_ranks = [torch.empty_like(loss.drift.sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, loss.drift.sums, group)
    return bool(loss.drift.sums.all()) and all(torch.equal(sums, loss.drift.sums) for sums in of_ranks)


@torch.no_grad()
def evaluate(case, whole, part, encoder, items, own, group, share):
    """In evaluation mode, with statistics, whose mean over rows must be the whole batch's."""
    before = snapshot(part)
    results = []
    for loss, rows in ((whole.eval(), items), (part.eval(), items[own])):
        z = [encoder.encode(rows, view).to(case.dtype) for view in (0, 1)]
        results.append(loss(*z, rows if case.index else None, return_stats=True))
    (expected, expected_stats), (value, stats) = results
    of_rows = (*MEANS, *OF_ISIR) if case.options.get("sampler") == "isir" else MEANS
    names = [name for name in of_rows if name in stats]
    # A rank's value is its share of the whole mean already; the others are means over its rows.
    weighted = [stats[name] * share * dist.get_world_size(group) for name in names]
    if case.loss in ("ntxent", "clip"):
        names, weighted = [*names, "ntxent"], [*weighted, stats["ntxent"]]
    mean_value, *means = averaged([value, *weighted], group)
    return {
        "evaluation": relative(mean_value, expected, 1),
        "statistics": max(
            relative(mean, expected_stats[name].double(), 1.0 if name == "staleness" else 1e-2)
            for name, mean in zip(names, means, strict=True)
        ),
        "carried": expected_stats["carried_weight"].item() if case.options.get("sampler") == "isir" else None,
        "unchanged": all(torch.equal(table, before[name]) for name, table in snapshot(part).items()),
    }


def checks(rank, size):
    # Ranks of one parity each: where a group is not the default one, a rank's number in it is not its own.
    groups = [dist.new_group(list(range(parity, size, 2))) for parity in range(min(size, 2))]
    mine = rank % 2
    everywhere = {name: partial(compare, CASES[name]) for name in cases(size)}
    return everywhere | {
        f"subgroup: {name}": partial(compare, CASES[name], groups[mine], seed=1 + mine) for name in IN_A_SUBGROUP
    }
