"""GlobalContrastiveBatchSampler in accelerate, transformers' Trainer and Lightning: two processes see all items, or an
error that says what to pass (rank_frameworks.py), and a resumed epoch is gone on with."""

import functools
import itertools
import warnings

import pytest
import ranks
import torch
from torch.utils.data import DataLoader

from emc2_kernels.batching import GlobalContrastiveBatchSampler as Sampler

ITEMS, SIZE, EPOCHS = 50, 4, 2  # as in rank_frameworks.py
STEPS = -(-ITEMS // (2 * SIZE))


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = ranks.shared_folder(tmp_path_factory)
    return functools.partial(ranks.found, 2, folder=folder, modules=("rank_frameworks",))


def in_one_process(epoch, options):
    """A rank's batches, of each of two."""
    samplers = [Sampler(ITEMS, SIZE, rank=rank, world_size=2, **options) for rank in range(2)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def assert_an_epoch(passes, epoch, *, drop_last=False, evened=True):
    """``passes``: one of each rank. Whole runs are those that ranks without a framework would have; what is left of the
    items comes too, once where accelerate does not fill batches up."""
    expected, whole = in_one_process(epoch, {"drop_last": drop_last}), ITEMS // (2 * SIZE)
    for batches, alone in zip(passes, expected, strict=True):
        assert len(batches) == whole + (not drop_last) and batches[:whole] == alone[:whole]
    items = list(itertools.chain(*itertools.chain(*passes)))
    assert len(set(items)) == (2 * SIZE * whole if drop_last else ITEMS)
    assert len(items) == (2 * SIZE * len(passes[0]) if evened else ITEMS)


@pytest.mark.parametrize("kind", ["all", "all, drop_last"])
def test_accelerate_deals_out_batches_of_all_ranks(of_ranks, kind):
    pytest.importorskip("accelerate")
    seen = of_ranks(f"accelerate: {kind}")
    drop_last = "drop_last" in kind
    assert [first for first, _ in seen] == [each[:2] for each in in_one_process(0, {"drop_last": drop_last})]
    assert_an_epoch([second for _, second in seen], 1, drop_last=drop_last)


def test_accelerate_dispatches_batches_of_all_ranks(of_ranks):
    """From the first process, which alone looks at the sampler."""
    pytest.importorskip("accelerate")
    for seen in (of_ranks("accelerate: all, dispatched"), of_ranks("accelerate: all, drop_last, dispatched")):
        items = list(itertools.chain(*(batch for _, second in seen for batch in second)))
        assert sorted(items) == list(range(len(items))) and len(items) == ITEMS // (2 * SIZE) * 2 * SIZE


@pytest.mark.parametrize("kind", ["all", "all, drop_last"])
def test_the_trainer_deals_out_batches_of_all_ranks(of_ranks, kind):
    pytest.importorskip("transformers")
    seen, drop_last = of_ranks(f"trainer: {kind}"), "drop_last" in kind
    steps = STEPS - drop_last
    assert {len(batches) for batches in seen} == {EPOCHS * steps}
    for epoch in range(EPOCHS):
        parts = [batches[epoch * steps : (epoch + 1) * steps] for batches in seen]
        assert_an_epoch(parts, epoch, drop_last=drop_last)


@pytest.mark.parametrize("check", ["accelerate: own", "accelerate: own, dispatched", "trainer: own"])
def test_what_would_be_sharded_twice_says_what_to_pass(of_ranks, check):
    pytest.importorskip("transformers" if check.startswith("trainer") else "accelerate")
    for rank, message in enumerate(of_ranks(check)):
        assert message.startswith("ValueError: rank must be 'all' in a loader that accelerate has prepared")
        assert message.endswith(f"got {rank}, and world_size 2")


@pytest.mark.parametrize("check", ["sampler injected", "sampler injected into a loader"])
def test_a_sampler_of_lightnings_says_what_to_pass(of_ranks, check):
    pytest.importorskip("lightning")
    for message in of_ranks(f"lightning: {check}"):
        assert message.startswith("TypeError: num_items must be an integer") and "use_distributed_sampler" in message


def test_lightning_without_its_sampler_has_all_items(of_ranks):
    pytest.importorskip("lightning")
    seen = of_ranks("lightning")
    for epoch in range(EPOCHS):
        assert_an_epoch([batches[epoch * STEPS : (epoch + 1) * STEPS] for batches in seen], epoch, evened=False)


def test_lightning_with_a_limit_on_batches_has_others_in_each_epoch(of_ranks):
    pytest.importorskip("lightning")
    expected = [in_one_process(epoch, {}) for epoch in range(EPOCHS)]
    for rank, batches in enumerate(of_ranks("lightning: limited")):
        assert batches == expected[0][rank][:2] + expected[1][rank][:2]


def prepared(sampler):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(DataLoader(torch.arange(ITEMS), batch_sampler=sampler))


@pytest.mark.parametrize("told", [True, False])
def test_a_resumed_epoch_in_accelerates_loader(told):
    """Its count begins at 0 again: the sampler's place is kept where the loader is told, else its loss is warned of."""
    sampler, resumed = Sampler(ITEMS, SIZE), Sampler(ITEMS, SIZE)
    batches = prepared(sampler)
    epochs = [[batch.tolist() for batch in batches] for _ in range(2)]
    sampler.set_epoch(1)
    resumed.load_state_dict(sampler.state_dict(batches_done=5))
    again = prepared(resumed)
    with warnings.catch_warnings() if told else pytest.warns(UserWarning, match="drops .*batch 5 of epoch 1"):
        if told:
            warnings.simplefilter("error")
            again.set_epoch(resumed.epoch)
        seen = [batch.tolist() for batch in again]
    assert seen == (epochs[1][5:] if told else epochs[0])
    assert resumed.epoch == (2 if told else 1)


def test_a_pass_of_accelerates_that_was_given_up_is_warned_of_where_it_comes_again():
    """Its count goes up with whole passes only; the loader is told, as in a resumed epoch."""
    batches, sampler = prepared(Sampler(ITEMS, SIZE)), Sampler(ITEMS, SIZE)
    for epoch in range(3):
        batches.set_epoch(epoch)
        taken = [batch.tolist() for batch, _ in zip(batches, range(3), strict=False)]
        sampler.set_epoch(epoch)
        assert taken == list(sampler)[:3]
    with pytest.warns(UserWarning, match="epoch 2 begins again"):
        assert torch.equal(next(iter(batches)), torch.tensor(taken[0]))
