"""Bad and degenerate input of emc2_kernels.batching: a named error that changes nothing, or a result.

Each table has (change to a valid call, expected exception, regex with the argument's name).
"""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import assert_identical, int64, named_error, normal, table, with_rows
from scipy import sparse
from torch.utils.data import SequentialSampler

from emc2_kernels.batching import GlobalContrastiveBatchSampler, consecutive_order, global_train_gap, similarity_graph

INF, NAN = torch.inf, torch.nan
N, D = 24, 8
X, Y = normal(0, N, D), normal(1, N, D)
BASE = X[:1].repeat(N, 1)

TOWER_ERRORS = {
    "x is None": ({"x": None}, TypeError, "x must be a tensor"),
    "x is a list": ({"x": X.tolist()}, TypeError, "x must be a tensor"),
    "x is an array": ({"x": X.numpy()}, TypeError, "x must be a tensor"),
    "x is one vector": ({"x": X[0]}, ValueError, "x must have shape"),
    "x has 3 dimensions": ({"x": X[None]}, ValueError, "x must have shape"),
    "x is integers": ({"x": X.long()}, TypeError, "x must be"),
    "x is bools": ({"x": X > 0}, TypeError, "x must be"),
    "x is complex": ({"x": X.cfloat()}, TypeError, "x must be"),
    "x is sparse": ({"x": X.to_sparse()}, TypeError, "x must be"),
    "x's columns are apart": ({"x": normal(0, D, N).T}, ValueError, "x must have a last stride of 1"),
    "y is a list": ({"y": Y.tolist()}, TypeError, "y must be a tensor"),
    "y is one vector": ({"y": Y[0]}, ValueError, "(x and )?y must have"),
    "y has fewer rows": ({"y": Y[1:]}, ValueError, "(x and )?y must have"),
    "y has more columns": ({"y": normal(1, N, D + 1)}, ValueError, "(x and )?y must have"),
    "y is integers": ({"y": Y.int()}, TypeError, "y must be"),
    "y is elsewhere": ({"y": Y.to("meta")}, ValueError, "y must"),
    "y's columns are apart": ({"y": normal(1, D, N).T}, ValueError, "y must have a last stride of 1"),
}

GRAPH_ERRORS = TOWER_ERRORS | {
    "x has no columns": ({"x": X[:, :0]}, ValueError, "x must have shape .N, d., N >= 2, d >= 1"),
    "x is of zeros": ({"x": X * 0}, ValueError, "x's rows must be nonzero.* 24 that are not, of 24"),
    "x has a row of zeros": ({"x": with_rows(X, 5, 0.0)}, ValueError, "x's rows must be nonzero.* row 5, "),
    "x vanishes in float32": ({"x": X.double() * 1e-50}, ValueError, "x's rows must be nonzero"),
    "x has a NaN": ({"x": with_rows(X, (2, 3), NAN)}, ValueError, "x's rows must be finite.* row 2, "),
    "x has an infinity": ({"x": with_rows(X, (2, 3), INF)}, ValueError, "x's rows must be finite.* row 2, "),
    "x has a -infinity": ({"x": with_rows(X, (23, 0), -INF)}, ValueError, "x's rows must be finite.* row 23, .-inf"),
    "x overflowed in float16": ({"x": (X * 1e6).half()}, ValueError, "x's rows must be finite"),
    "y has a NaN": ({"y": with_rows(Y, (0, 0), NAN)}, ValueError, "y's rows must be finite"),
    "y has a row of zeros": ({"y": with_rows(Y, 0, 0.0)}, ValueError, "y's rows must be nonzero"),
    "rows are all equal": ({"x": BASE}, ValueError, "x and y must have similarities that differ.*collapsed"),
    "rows of both are all equal": ({"x": BASE, "y": -2 * BASE}, ValueError, "x and y must have similarities that diff"),
    "rows are equal up to rounding": ({"x": BASE + 1e-7 * X}, ValueError, "x and y must have similarities that differ"),
    "rows differ in length only": ({"x": BASE * X[:, :1].abs()}, ValueError, "x and y must have similarities that dif"),
    "x and y have one row": ({"x": X[:1], "y": Y[:1]}, ValueError, "x must have"),
}


def graph(change):
    return similarity_graph(**({"x": X} | change))


GRAPH_OPTION_ERRORS = {
    "x has one row": ({"x": X[:1]}, ValueError, "x must have shape .N, d., N >= 2"),
    "x has no rows": ({"x": X[:0]}, ValueError, "x must have shape .N, d., N >= 2"),
    "products overflow": ({"x": X * 1e20, "normalize": False}, ValueError, "x and y must have finite similarities"),
    "one product overflows": (
        {"x": with_rows(X, 3, 1e20), "y": with_rows(Y, 4, 1e20), "normalize": False},
        ValueError,
        "x and y must have finite similarities",
    ),
    "x is of zeros, which have a product": ({"x": X * 0, "normalize": False}, ValueError, "x and y must have.*differ"),
    "seed is negative": ({"seed": -1}, ValueError, "seed"),
    "seed has 65 bits": ({"seed": 2**64}, ValueError, "seed"),
    "seed is a float": ({"seed": 1.0}, TypeError, "seed"),
}

OPTION_ERRORS = {
    "quantile is 1": ({"quantile": 1}, ValueError, "quantile"),
    "quantile is negative": ({"quantile": -0.1}, ValueError, "quantile"),
    "quantile is NaN": ({"quantile": NAN}, ValueError, "quantile"),
    "quantile is a word": ({"quantile": "0.9"}, TypeError, "quantile"),
    "quantile is a bool": ({"quantile": False}, TypeError, "quantile"),
    "scope is a typo": ({"scope": "rows"}, ValueError, "scope must be one of 'global', 'row'"),
    "scope is None": ({"scope": None}, ValueError, "scope"),
    "max_per_row is 0": ({"max_per_row": 0}, ValueError, "max_per_row"),
    "max_per_row is a float": ({"max_per_row": 8.0}, TypeError, "max_per_row"),
    "normalize is a number": ({"normalize": 1}, TypeError, "normalize"),
    "progress is a word": ({"progress": "yes"}, TypeError, "progress"),
    "an unknown argument": ({"quantil": 0.9}, TypeError, ".*quantil"),
}

CONSTRUCTOR_ERRORS = OPTION_ERRORS | {
    "num_items is 0": ({"num_items": 0}, ValueError, "num_items"),
    "num_items is a float": ({"num_items": 24.0}, TypeError, "num_items"),
    "num_items is a sampler": ({"num_items": SequentialSampler(X)}, TypeError, "num_items .*use_distributed_sampler"),
    "num_items is too small": ({"num_items": 3, "drop_last": True}, ValueError, "num_items must be .*= 4 with drop_l"),
    "batch_size is 0": ({"batch_size": 0}, ValueError, "batch_size"),
    "batch_size is None": ({"batch_size": None}, TypeError, "batch_size"),
    "batch_size is a bool": ({"batch_size": True}, TypeError, "batch_size"),
    "drop_last is a number": ({"drop_last": 0}, TypeError, "drop_last"),
    "seed is negative": ({"seed": -1}, ValueError, "seed"),
    "seed has 65 bits": ({"seed": 2**64}, ValueError, "seed"),
    "seed is a word": ({"seed": "0"}, TypeError, "seed"),
    "rank without world_size": ({"rank": 0}, ValueError, "rank and world_size"),
    "world_size without rank": ({"world_size": 1}, ValueError, "rank and world_size"),
    "rank is world_size": ({"rank": 2, "world_size": 2}, ValueError, "rank must be in"),
    "rank is negative": ({"rank": -1, "world_size": 2}, ValueError, "rank"),
    "rank is a float": ({"rank": 0.0, "world_size": 2}, TypeError, "rank"),
    "world_size is 0": ({"rank": 0, "world_size": 0}, ValueError, "world_size"),
    "rank is all of 0": ({"rank": "all", "world_size": 0}, ValueError, "world_size"),
    "rank is another word": ({"rank": "each", "world_size": 2}, TypeError, "rank"),
}

UPDATE_ERRORS = GRAPH_ERRORS | {
    "x has fewer rows": ({"x": X[1:]}, ValueError, "x must have num_items = 24 rows"),
    "x has more rows": ({"x": normal(0, N + 1, D)}, ValueError, "x must have num_items = 24 rows"),
    "x has no rows": ({"x": X[:0]}, ValueError, "x must have num_items = 24 rows"),
}


@table(GRAPH_ERRORS | GRAPH_OPTION_ERRORS | OPTION_ERRORS)
def test_similarity_graph_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        graph(change)


@table(GRAPH_ERRORS)
def test_similarity_graph_by_rows_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        graph(change | {"scope": "row"})


@table(CONSTRUCTOR_ERRORS)
def test_constructor_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        GlobalContrastiveBatchSampler(**({"num_items": N, "batch_size": 4} | change))


def warm_sampler(**options):
    """In the middle of its second epoch, with an order, and another one for the next epoch."""
    sampler = GlobalContrastiveBatchSampler(N, 4, quantile=0.8, **options)
    sampler.update(X)
    iterator = itertools.chain(sampler, sampler)
    list(itertools.islice(iterator, 8))
    sampler.update(Y)
    return sampler, iterator


def assert_goes_on(sampler, iterator, change):
    """As if ``change``, which must fail, had not been tried."""
    twin, twin_iterator = warm_sampler()
    change()
    assert_identical(sampler.state_dict(), twin.state_dict())
    assert (sampler.facts, sampler.epoch) == (twin.facts, twin.epoch)
    assert [list(iterator), list(sampler)] == [list(twin_iterator), list(twin)]


def assert_refused(exception, regex, call):
    sampler, iterator = warm_sampler()

    def change():
        with named_error(exception, regex):
            call(sampler)

    assert_goes_on(sampler, iterator, change)


@table(UPDATE_ERRORS)
def test_update_names_what_is_wrong_and_changes_nothing(change, exception, regex):
    assert_refused(exception, regex, lambda sampler: sampler.update(**({"x": X} | change)))


@pytest.mark.parametrize("x", [BASE, X * 0, X[1:]], ids=["equal", "zeros", "rows"])
def test_the_first_update_that_fails_leaves_a_shuffled_sampler(x):
    sampler, twin = (GlobalContrastiveBatchSampler(N, 4) for _ in range(2))
    with pytest.raises(ValueError, match="got"):
        sampler.update(x)
    assert sampler.facts is None
    assert list(sampler) == list(twin)


SET_EPOCH_ERRORS = {
    "negative": (-1, ValueError, "epoch"),
    "a float": (1.0, TypeError, "epoch"),
    "None": (None, TypeError, "epoch"),
    "a bool": (True, TypeError, "epoch"),
}
BATCHES_DONE_ERRORS = {
    "negative": (-1, ValueError, "batches_done"),
    "more than an epoch has": (7, ValueError, "batches_done must be at most 6"),
    "a float": (2.0, TypeError, "batches_done"),
    "a bool": (True, TypeError, "batches_done"),
}


@table(SET_EPOCH_ERRORS)
def test_set_epoch_names_what_is_wrong_and_changes_nothing(change, exception, regex):
    assert_refused(exception, regex, lambda sampler: sampler.set_epoch(change))


@table(BATCHES_DONE_ERRORS)
def test_state_dict_names_what_is_wrong_and_changes_nothing(change, exception, regex):
    assert_refused(exception, regex, lambda sampler: sampler.state_dict(change))


ITEMS = torch.arange(N)
STATE_ERRORS = {
    "num_items is another": ({"num_items": N + 1}, ValueError, "state must be of a sampler with num_items = 24"),
    "batch size is another": ({"run": 8}, ValueError, "state must be .*batch_size . world_size = 4"),
    "drop_last is another": ({"drop_last": True}, ValueError, "state must be .*drop_last = False"),
    "seed is another": ({"seed": 1}, ValueError, "state must be .*seed = 0"),
    "epoch is negative": ({"epoch": -1}, ValueError, "state..epoch.."),
    "epoch is None": ({"epoch": None}, TypeError, "state..epoch.."),
    "batches_done is negative": ({"batches_done": -1}, ValueError, "state..batches_done.."),
    "batches_done is past the epoch": ({"batches_done": 7}, ValueError, "state..batches_done.. must be at most 6"),
    "batches_done is a float": ({"batches_done": 1.0}, TypeError, "state..batches_done.."),
    "order is a list": ({"order": list(range(N))}, TypeError, "state..order.. must be a tensor"),
    "order is int32": ({"order": ITEMS.int()}, TypeError, "state..order.. must be int64"),
    "order is a column": ({"order": ITEMS[:, None]}, ValueError, "state..order.. must have shape"),
    "order is too short": ({"order": ITEMS[1:]}, ValueError, "state..order.. must have shape"),
    "order has an item twice": ({"order": with_rows(ITEMS, 0, 1)}, ValueError, "state..order.. must have every item"),
    "order starts at 1": ({"order": ITEMS + 1}, ValueError, "state..order.. must have every item"),
    "next_order has an item twice": ({"next_order": with_rows(ITEMS, 0, 1)}, ValueError, "state..next_order.."),
    "next_order is a word": ({"next_order": "none"}, TypeError, "state..next_order.."),
    "facts lack a field": ({"facts": {"threshold": 0.5}}, ValueError, "state..facts.."),
    "facts are a list": ({"facts": [0.5, 0.9, 0.0, 1, 0]}, ValueError, "state..facts.."),
    "an unknown entry": ({"orders": None}, ValueError, "state must be a dict"),
    "an entry whose name is no word": ({3: None}, ValueError, "state must be a dict"),
}
NO_STATES = {"None": None, "a list": [], "an empty dict": {}, "another module's": {"weight": X}}


@table(STATE_ERRORS)
def test_load_state_dict_names_what_is_wrong_and_changes_nothing(change, exception, regex):
    state = warm_sampler()[0].state_dict() | change
    assert_refused(exception, regex, lambda sampler: sampler.load_state_dict(state))


@pytest.mark.parametrize("state", NO_STATES.values(), ids=NO_STATES)
def test_load_state_dict_refuses_what_is_no_state(state):
    assert_refused(ValueError, "state must be a dict", lambda sampler: sampler.load_state_dict(state))


GAP_ERRORS = TOWER_ERRORS | {
    "x and y have no rows": ({"x": X[:0], "y": Y[:0]}, ValueError, "x and y must have the same shape .N, d., N >= 1"),
    "y is None": ({"y": None}, TypeError, "y must be a tensor"),
    "y has another dtype": ({"y": Y.half()}, ValueError, "y must be"),
    "x has a NaN": ({"x": with_rows(X, (2, 3), NAN)}, ValueError, "x must be finite"),
    "y has an infinity": ({"y": with_rows(Y, (2, 3), INF)}, ValueError, "y must be finite"),
    "products overflow": ({"x": X * 1e20, "y": Y * 1e20, "normalize": False}, ValueError, "the similarities of x and"),
    "a row's overflow": ({"y": with_rows(Y, 3, 1e20), "normalize": False}, ValueError, "the similarities of x and y"),
    "temperature is 0": ({"temperature": 0}, ValueError, "temperature"),
    "temperature is NaN": ({"temperature": NAN}, ValueError, "temperature"),
    "temperature is None": ({"temperature": None}, TypeError, "temperature"),
    "temperatures are two": ({"temperature": torch.ones(2)}, ValueError, "temperature"),
    "normalize is a word": ({"normalize": "no"}, TypeError, "normalize"),
    "there are no batches": ({"batches": []}, ValueError, "batches must have at least one item"),
    "an item is negative": ({"batches": [[0, 1], [-1, 2]]}, ValueError, "batches' entries must hold values in .0, 24."),
    "an item is past the end": ({"batches": [[0, N]]}, ValueError, "batches' entries must hold values in .0, 24."),
    "items are floats": ({"batches": [[0.5, 1.5]]}, TypeError, "batches' entries must be int64"),
    "items are a mask": ({"batches": [torch.arange(N) < 4]}, TypeError, "batches' entries must be int64"),
    "a batch is an item": ({"batches": [0, 1]}, ValueError, "batches' entries must have shape"),
    "a batch has two dimensions": ({"batches": [int64(0, 1)[None]]}, ValueError, "batches' entries must have shape"),
}


@table(GAP_ERRORS)
def test_global_train_gap_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        global_train_gap(**({"x": X, "y": Y, "batches": [[0, 1, 2]], "temperature": 0.1} | change))


ORDER_ERRORS = {
    "a dense array": ({"matrix": np.eye(3)}, TypeError, "matrix must be a sparse"),
    "None": ({"matrix": None}, TypeError, "matrix must be a sparse"),
    "not square": ({"matrix": sparse.csr_array((3, 4))}, ValueError, "matrix must have shape .N, N."),
    "a negative seed": ({"seed": -1}, ValueError, "seed"),
    "a float for the seed": ({"seed": 0.0}, TypeError, "seed"),
}


@table(ORDER_ERRORS)
def test_consecutive_order_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        consecutive_order(**({"matrix": sparse.csr_array((3, 3))} | change))


DEGENERATE = {
    "two items": X[:2],
    "three items": X[:3],
    "one column": X[:, :1],
    "one item apart from equal ones": with_rows(BASE, 3, X[3]),
    "one row expanded, but for a little": BASE + 1e-2 * X,
    "lengths far apart": X * torch.logspace(-30, 30, N)[:, None],
    "largest float16": (X.sign() * 65504).half(),
    "smallest float64": X.double() * 1e-37,
}


@pytest.mark.parametrize("scope", ["global", "row"])
@pytest.mark.parametrize("x", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_embeddings_give_an_order(x, scope):
    result = similarity_graph(x, normal(2, *x.shape) if len(x) == 2 else None, scope=scope)
    assert sorted(consecutive_order(result.matrix)) == list(range(len(x)))
    assert 0 <= result.facts.level < 1 <= result.facts.entries  # exact


@pytest.mark.parametrize("module", ["scipy.sparse", "scipy.sparse.csgraph"])
def test_without_scipy_an_update_says_what_to_install_and_changes_nothing(monkeypatch, module):
    sampler, iterator = warm_sampler()

    def change():
        with monkeypatch.context() as context:
            context.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=r'package scipy: pip install "emc2_kernels\[batching\]"'):
                sampler.update(X)

    assert_goes_on(sampler, iterator, change)


def test_without_tqdm_a_bar_says_what_to_install_and_no_bar_needs_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    graph({"progress": False})
    with pytest.raises(ImportError, match=r'package tqdm: pip install "emc2_kernels\[batching\]"'):
        graph({"progress": True})


def test_importing_and_sampling_need_neither_scipy_nor_tqdm():
    code = """
import sys
sys.modules |= dict.fromkeys(("scipy", "scipy.sparse", "tqdm"))
from emc2_kernels.batching import GlobalContrastiveBatchSampler
print(len(list(GlobalContrastiveBatchSampler(24, 4))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "6", done.stderr


def test_tables_have_at_least_forty_cases():
    assert min(len(UPDATE_ERRORS | SET_EPOCH_ERRORS | STATE_ERRORS), len(GRAPH_ERRORS | OPTION_ERRORS)) >= 40
