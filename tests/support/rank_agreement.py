"""Run by every rank (see ranks.py): what one rank does or meets, and the others have to be told."""

from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from helpers import assert_unchanged, normal, snapshot
from rank_wrapped import DIM, ITEMS, make

from emc2_kernels import ChainStore, EmbeddingBank, losses
from emc2_kernels.transition import MHState

B = 3
# By option: what the last rank has instead, and what both need for it to have a meaning.
OTHERS = {
    "temperature": (0.5, {}),
    "num_items": (ITEMS + 1, {}),
    "dim": (DIM + 1, {}),
    "gather": ("ring", {}),
    "seed": (2**64 - 1, {}),
    "bimodal": (True, {}),
    "normalize": (False, {}),
    "bank_dtype": (torch.float16, {}),
    "learn_temperature": (True, {}),
    "max_scale": (50.0, {}),
    "sampler": ("isir", {}),  # of the walk, unless another is said
    "queue": (9, {"sampler": "isir"}),
    "decoupled": (False, {"sampler": "isir"}),
    "proposals": ("bank", {}),
    "views": ("both", {}),
    "num_proposals": (9, {"proposals": "bank", "num_proposals": 8}),
    "burn_in": (0.25, {}),
    "num_samples": (2, {"num_samples": 1}),
    "carry": ("recompute", {"encode": torch.stack}),
    "sharded": (True, {}),
    "encode": (torch.stack, {}),
    "refresh": (0.5, {"encode": torch.stack}),
    "gamma": (0.5, {}),
    "gamma_schedule": ("cosine", {}),
    "gamma_steps": (5, {"gamma_schedule": "cosine", "gamma_steps": 4}),
    "temperature_lr": (0.5, {}),
    "temperature_momentum": (0.5, {}),
    "temperature_bounds": ((0.1, 0.3), {}),
    "rho": (0.5, {}),
}
OPTIONS = [
    f"{name}: {option}"
    for name in ("ntxent", "clip", "emc2", "sogclr", "isogclr", "cached")
    for option in losses.TABLE[name].options()
    if option not in ("process_group", "backend")  # which may differ
    if option not in ("estimator", "individual_temperature")  # which have one value
    if not (option == "gather" and name in ("sogclr", "isogclr", "cached"))  # which have no other
]
PAIRS = [("ntxent", "emc2"), ("emc2", "cached"), ("cached", "sogclr"), ("clip", "ntxent"), ("sogclr", "isogclr")]
GATHERING = ["ntxent all", "clip ring", "emc2 all", "emc2 ring", "emc2 sharded", "isogclr all", "cached all"]
GATHERING += ["isir all", "isir ring", "isir sharded"]


def gathering(name, gather="all", **options):
    return make(name, options, **({"gather": "all", "sharded": True} if gather == "sharded" else {"gather": gather}))


def call(loss, rank, **change):
    z = {f"z{view}": normal(10 * rank + view, B, getattr(loss, "dim", DIM)) for view in (0, 1)}
    return loss(**z | {"index": torch.arange(B) + B * rank} | change)


def met(action):
    """[error's class, its message]."""
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]


def unlike(case, rank, last):
    """The last rank's loss has another option."""
    name, option = case.split(": ")
    other, both = OTHERS[option]
    different = {option: other} | ({"gamma_steps": 4} if option == "gamma_schedule" else {})
    sizes = {"num_items": ITEMS, "dim": DIM, "temperature": 0.25, "gather": "all"}
    takes = losses.TABLE[name].options()
    given = {size: value for size, value in ({"sampler": "mh"} | sizes).items() if size in takes}
    given |= both | (different if last else {})
    loss = losses.get(name, **given)
    before = local(loss)
    error = met(lambda: call(loss, rank))
    torch.testing.assert_close(local(loss), before, rtol=0, atol=0, equal_nan=True)
    return error


def local(loss):
    """What this rank keeps."""
    tables = loss.state_dict().items()
    return {name: (t.to_local() if hasattr(t, "to_local") else t).clone() for name, t in tables}


def other_loss(pair, rank, last):
    return met(lambda: call(make(pair[last], {}, gather="all"), rank))


BAD = {
    "NaN": lambda: {"z0": torch.full((B, DIM), torch.nan)},
    "shape": lambda: {"z0": torch.zeros(B, DIM, 1)},
    "list": lambda: {"z0": [[0.0] * DIM] * B},
    "meta": lambda: {"z0": torch.zeros(B, DIM, device="meta")},
    "index": lambda: {"index": torch.tensor([0, -1, 2])},
    "return_stats": lambda: {"return_stats": 1},
}


def ready(loss, before, rank):
    """Whether the loss is as it was, and a right call finds all ranks there."""
    assert_unchanged(loss, before)
    return call(loss, rank).isfinite().item()


def bad_argument(case, what, rank, last):
    loss = gathering(*case.split())
    call(loss, rank)
    before = snapshot(loss)
    return [met(lambda: call(loss, rank, **(BAD[what]() if last else {}))), ready(loss, before, rank)]


WATCHING = ["emc2 all", "isir all", "isogclr all", "cached all"]


def warned(case, rank, last):
    """One rank's index looks like classes, where warnings are errors."""

    def look(*_):
        raise UserWarning("index seems to name classes")

    loss = gathering(*case.split())
    call(loss, rank)
    before = snapshot(loss)
    if last:
        loss._watch.look = look
    error = met(lambda: call(loss, rank))
    loss._watch.__dict__.pop("look", None)
    return [error, ready(loss, before, rank)]


def bad_temperature(rank, last):
    loss = gathering("ntxent", learn_temperature=True)
    if last:
        loss.log_scale.detach().fill_(torch.nan)
    return met(lambda: call(loss, rank))


# What overflows or encodes after the first exchange.
OVERFLOWING = ["emc2 all", "emc2 ring", "emc2 sharded", "isogclr all", "cached all"]
OVERFLOWING += ["isir all", "isir ring", "isir sharded"]
ENCODING = {
    "emc2 all": {"carry": "recompute"},
    "emc2 ring": {"carry": "recompute", "bimodal": True},
    "emc2 sharded": {"carry": "recompute"},
    "isir all": {"carry": "recompute", "views": "both"},
    "isir ring": {"carry": "recompute", "bimodal": True},
    "isir sharded": {"carry": "recompute"},
    "cached all": {"carry": "recompute", "num_samples": 2, "refresh": 0},
    "cached all refresh": {"refresh": 0.1},
}
# An evaluation refreshes nothing.
ENCODES = [(case, training) for case in ENCODING for training in (True, False) if training or "refresh" not in case]


def overflow(case, training, rank, last):
    loss = gathering(*case.split(), normalize=False)
    call(loss, rank)
    before = snapshot(loss)
    large = {f"z{view}": normal(view, B, DIM) * 1e25 for view in (0, 1)}
    error = met(lambda: call(loss.train(training), rank, **(large if last else {})))
    return [error, ready(loss, before, rank)]


class Interrupted(Exception):
    pass


def encode_fails(case, training, rank, last):
    broken = []

    def encode(items, views):
        if broken:
            raise Interrupted("no such image")
        return torch.ones(len(items), DIM)

    options = ENCODING[case] | ({"burn_in": 0.0} if "emc2" in case else {})
    loss = gathering(*case.split()[:2], encode=encode, **options)
    for step in range(2):
        call(loss, rank + 2 * step)
    before = snapshot(loss)
    broken.extend([1] * last)
    error = met(lambda: call(loss.train(training), rank))
    broken.clear()
    return [error, ready(loss, before, rank)]


def stores(rank):
    chains, bank = ChainStore(ITEMS, sharded=True), EmbeddingBank(ITEMS, DIM, sharded=True)
    index = torch.arange(B) + B * rank
    chains.write(index, 0, MHState(index * 2, normal(rank, B)))
    bank.update(index, 0, normal(rank, B, DIM), 1)
    return chains, bank


STORE_ERRORS = {  # of a call with a bad argument, and what it must begin with
    "read": (lambda chains, _, bad: chains.read(torch.tensor([ITEMS if bad else 0]), 0), "index must hold"),
    "write": (lambda chains, _, bad: chains.write(torch.tensor([0]), 2 if bad else 0, chain()), "view must be"),
    "update": (lambda _, bank, bad: bank.update(torch.tensor([0]), 0, torch.ones(1, DIM + bad), 1), "embeddings must"),
    "lookup": (lambda _, bank, bad: bank.lookup(torch.tensor([-2 if bad else 0])), "labels must hold"),
    "rescore": (
        lambda chains, bank, bad: chains.read(torch.tensor([0]), 0, torch.ones(1, DIM + bad), bank, 0.1),
        "queries must have",
    ),
}


def chain():
    return MHState(torch.tensor([4]), torch.tensor([0.5]))


def store_error(what, rank, last):
    chains, bank = stores(rank)
    before = snapshot(chains), snapshot(bank)
    error = met(lambda: STORE_ERRORS[what][0](chains, bank, last))
    chains.read(torch.tensor([0]), 0)
    for store, kept in zip((chains, bank), before, strict=True):
        assert_unchanged(store, kept)
    return error


def unlike_stores(rank, last):
    """[num_items differs, views differ, one writes what another reads, one rescores and then others write]."""
    index = torch.tensor([0])
    found = [met(lambda: ChainStore(ITEMS + last, sharded=True).read(index, 0))]
    found.append(met(lambda: ChainStore(ITEMS, views=2 + last, sharded=True).read(index, 0)))
    found.append(met(lambda: EmbeddingBank(ITEMS, DIM + last, sharded=True).lookup(index)))
    chains, bank = stores(rank)
    found.append(met(lambda: chains.read(index, 0) if last else chains.write(index, 0, chain())))

    def one_rescores():
        chains.read(index, 0, *((torch.ones(1, DIM), bank, 0.1) if last else ()))
        if not last:
            chains.write(index, 0, chain())

    return [*found, met(one_rescores)]


def alone(rank, last):
    """The notes of the error that the last rank's call ends with, since no other rank has come."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    loss = make("emc2", {}, gather="all" if last else "none", process_group=group)
    notes = []
    try:
        call(loss, rank)
    except RuntimeError as error:
        notes = error.__notes__
    dist.barrier()
    return notes


def checks(rank, size):
    if size != 2:
        return {}
    last = rank == size - 1
    found = {f"unlike {case}": partial(unlike, case, rank, last) for case in OPTIONS}
    found |= {f"other loss: {' '.join(pair)}": partial(other_loss, pair, rank, last) for pair in PAIRS}
    for what in BAD:
        found |= {f"bad {what}: {case}": partial(bad_argument, case, what, rank, last) for case in GATHERING}
    found |= {f"warned: {case}": partial(warned, case, rank, last) for case in WATCHING}
    found["bad log_scale"] = partial(bad_temperature, rank, last)
    for training in (True, False):
        found |= {f"overflow {training}: {case}": partial(overflow, case, training, rank, last) for case in OVERFLOWING}
    for case, training in ENCODES:
        found[f"encode {training}: {case}"] = partial(encode_fails, case, training, rank, last)
    found |= {f"store {what}": partial(store_error, what, rank, last) for what in STORE_ERRORS}
    return found | {"unlike stores": partial(unlike_stores, rank, last), "alone": partial(alone, rank, last)}
