"""GlobalContrastiveBatchSampler in process groups of three and of two, started once for all that is checked."""

import datetime
import itertools
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import normal

from emc2_kernels.batching import GlobalContrastiveBatchSampler

N, D, SIZE = 50, 8, 4
SECONDS = 60  # that a rank waits for another one, and the test for all of them


UNLIKE = {"num_items": N + 1, "batch_size": SIZE + 1, "drop_last": True, "seed": 2**63}


def embeddings(rank):
    return normal(rank, N, D)


def make(num_items=N, batch_size=SIZE, **options):
    return GlobalContrastiveBatchSampler(num_items, batch_size, quantile=0.9, **options)


def error_of(call, *arguments):
    try:
        call(*arguments)
    except (ValueError, TypeError) as error:
        return type(error), str(error)
    return None


def update_error(sampler, x):
    return error_of(sampler.update, x)


def after_a_look(rank):
    """What update says where the first rank alone has looked at a batch, and after set_epoch."""
    sampler = make()
    if rank == 0:
        next(iter(sampler))
    errors = [update_error(sampler, embeddings(5))]
    facts = sampler.facts
    sampler.set_epoch(0)
    return [*errors, update_error(sampler, embeddings(5))], facts


def observed(rank, early):
    """What one rank sees; ``early`` was built before there was a group."""
    sampler = make()
    seen = {"place": (sampler.rank, sampler.world_size), "shuffled": list(sampler)}
    wrong = {"zeros": torch.zeros(N, D), "rows": normal(0, N - 1, D), "no tensor": None}
    seen["errors"] = {name: update_error(sampler, x if rank == 0 else embeddings(0)) for name, x in wrong.items()}
    seen["after errors"] = (sampler.facts, list(sampler))
    sampler.update(embeddings(rank) if rank < 2 else torch.zeros(3))
    seen["own x"] = (sampler.facts, sampler.state_dict()["order"].tolist(), list(sampler))
    sampler.update(embeddings(5) if rank == 0 else None)
    seen["no x"] = (sampler.facts, sampler.state_dict()["order"].tolist(), list(sampler))
    last = rank == dist.get_world_size() - 1
    unlike = {name: make(**({name: value} if last else {})) for name, value in UNLIKE.items()}
    seen["unlike"] = {name: update_error(sampler, embeddings(0)) for name, sampler in unlike.items()}
    alone = make(rank=0, world_size=1)
    alone.update(embeddings(rank))
    seen["alone"] = alone.state_dict()["order"].tolist()
    seen["after a look"] = after_a_look(rank)
    seen["early"] = (early.rank, early.world_size, *(error_of(*call) for call in ((iter, early), (early.update, None))))
    seen["dealt"] = make(rank="all").world_size
    return seen


def process(rank, folder):
    torch.set_num_threads(1)
    for ranks in (3, 2):
        if rank < ranks:
            early = make()
            method, timeout = f"file://{folder}/group{ranks}", datetime.timedelta(seconds=SECONDS)
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks, timeout=timeout)
            torch.save(observed(rank, early), f"{folder}/{ranks}-{rank}")
            dist.barrier()
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """By the number of ranks, what each has seen."""
    folder = tmp_path_factory.mktemp("ranks")
    context, deadline = mp.spawn(process, args=(str(folder),), nprocs=3, join=False), time.monotonic() + 2 * SECONDS
    while not context.join(timeout=1):  # raises what a process has raised
        if time.monotonic() > deadline:
            for each in context.processes:
                each.kill()
            pytest.fail(f"processes have not ended within {2 * SECONDS} seconds")
    return {
        ranks: [torch.load(folder / f"{ranks}-{rank}", weights_only=False) for rank in range(ranks)] for ranks in (2, 3)
    }


@pytest.fixture(params=[2, 3])
def seen(request, groups):
    return groups[request.param]


def in_one_process(seen, epoch, x=None):
    """The batches of each rank, from samplers that are told their place and compute for themselves."""
    samplers = [make(rank=rank, world_size=len(seen)) for rank in range(len(seen))]
    for sampler in samplers:
        if x is not None:
            sampler.update(x)
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def assert_every_item_comes(batches):
    """Once, but for fewer repeats than there are ranks."""
    items = list(itertools.chain(*itertools.chain(*batches)))
    assert set(items) == set(range(N))
    assert len(items) - N < len(batches)


def test_rank_and_world_size_are_those_of_the_group(seen):
    assert [each["place"] for each in seen] == [(rank, len(seen)) for rank in range(len(seen))]


@pytest.mark.one_seed
def test_without_an_update_ranks_share_the_items_out(seen):
    batches = [each["shuffled"] for each in seen]
    assert batches == in_one_process(seen, 0)
    assert_every_item_comes(batches)


def test_all_ranks_raise_the_first_ranks_error_and_stay_as_they_were(seen):
    for each in seen:
        assert each["errors"] == seen[0]["errors"]
    errors = seen[0]["errors"]
    assert errors["zeros"][0] is ValueError and "x's rows must be nonzero" in errors["zeros"][1]
    assert errors["rows"][0] is ValueError and f"num_items = {N} rows" in errors["rows"][1]
    assert errors["no tensor"][0] is TypeError and "x must be a tensor" in errors["no tensor"][1]
    assert [each["after errors"] for each in seen] == [(None, batches) for batches in in_one_process(seen, 1)]


@pytest.mark.parametrize("name", UNLIKE)
def test_ranks_with_unlike_samplers_all_raise_the_same_error(seen, name):
    got = make(), make(**{name: UNLIKE[name]})
    values = " and ".join(f"{getattr(s, name)} on rank {r}" for s, r in zip(got, (0, len(seen) - 1), strict=True))
    message = f"{name} must be the same on all ranks, got {values}"
    assert [each["unlike"][name] for each in seen] == [(ValueError, message)] * len(seen)


@pytest.mark.one_seed
@pytest.mark.parametrize(("name", "x_of", "epoch"), [("own x", 0, 2), ("no x", 5, 3)])
def test_all_ranks_get_the_order_of_the_first_ranks_embeddings(seen, name, x_of, epoch):
    facts, orders, batches = zip(*(each[name] for each in seen), strict=True)
    assert all(facts[0] == other for other in facts) and facts[0].entries > 0
    assert all(orders[0] == other for other in orders)
    assert list(batches) == in_one_process(seen, epoch, embeddings(x_of))
    assert_every_item_comes(batches)


def test_a_sampler_that_is_told_it_is_alone_computes_for_itself(seen):
    orders = [each["alone"] for each in seen]
    assert orders[0] == seen[0]["own x"][1]
    assert orders[1] not in (orders[0], seen[1]["own x"][1])


def test_ranks_that_have_begun_other_passes_are_an_error_on_all_of_them(seen):
    """Till set_epoch: their epochs would lose items."""
    for each in seen:
        (error, after_set_epoch), facts = each["after a look"]
        assert error[0] is ValueError and after_set_epoch is None and facts is None
        assert error[1].startswith("the epoch that comes (")
        assert error[1].endswith("got 1 on rank 0 and 0 on rank 1")


def test_a_sampler_that_was_built_before_the_group_says_so(seen):
    """It would have all items on every rank."""
    for each in seen:
        rank, world_size, *errors = each["early"]
        assert (rank, world_size) == (0, 1)
        for error in errors:
            assert error[0] is ValueError and f"got None, in a group of {len(seen)}" in error[1]


def test_batches_of_all_ranks_are_those_of_the_group(seen):
    assert {each["dealt"] for each in seen} == {len(seen)}
