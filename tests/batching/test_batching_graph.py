"""similarity_graph and consecutive_order against literal formulas, and their limits on memory."""

import numpy as np
import pytest
import torch
import tqdm
from helpers import normal
from scipy import sparse
from torch.overrides import TorchFunctionMode

from emc2_kernels.batching import consecutive_order, graph, similarity_graph

QUANTILES = [0, 0.5, 0.9, 0.999]
N, D = 60, 8


def similarities(x, y=None, normalize=True):
    """In float64."""
    x, y = (value.double() for value in (x, x if y is None else y))
    if normalize:
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    return (x @ y.T).numpy()


def off_diagonal(scores):
    return scores[~np.eye(len(scores), dtype=bool)]


def formula(scores, quantile, scope, max_per_row):
    """The graph as a dense array, and its facts."""
    n = len(scores)
    order = np.argsort(-(scores - np.diag(np.full(n, np.inf))), 1)  # each row's largest first, itself last
    if scope == "row":
        found = np.full(n, max(1, round((1 - quantile) * (n - 1))))
        threshold = None
    else:
        ranked = np.sort(off_diagonal(scores))
        threshold = ranked[int(quantile * len(ranked))] - graph.EQUAL * np.abs(ranked).max()
        found = (scores >= threshold).sum(1) - (np.diag(scores) >= threshold)
    dense = np.zeros((n, n), bool)
    for row, count in enumerate(found):
        dense[row, order[row, : min(count, max_per_row)]] = True
    level = 1 - found.sum() / (n * (n - 1))
    return dense, graph.GraphFacts(threshold, level, 0.0, int(dense.sum()), int((found > max_per_row).sum()))


def assert_is_formula(x, y=None, *, quantile=0.9, scope="global", max_per_row=1024, normalize=True):
    options = {"quantile": quantile, "scope": scope, "max_per_row": max_per_row}
    matrix, facts = similarity_graph(x, y, normalize=normalize, **options)
    dense, expected = formula(similarities(x, y, normalize), **options)
    assert np.array_equal(matrix.toarray(), dense)
    assert facts._replace(threshold=None, level=0) == expected._replace(threshold=None, level=0)
    assert facts.level == pytest.approx(expected.level, abs=1e-12)
    assert facts.threshold == (None if scope == "row" else pytest.approx(expected.threshold, rel=1e-5))
    assert (matrix.dtype, matrix.indices.dtype, matrix.has_canonical_format) == (bool, np.int32, True)


@pytest.mark.parametrize("quantile", QUANTILES)
@pytest.mark.parametrize("scope", ["global", "row"])
@pytest.mark.parametrize("y", [None, normal(1, N, D)], ids=["x", "x, y"])
class TestFormula:
    @pytest.mark.parametrize("normalize", [True, False], ids=["", "as they are"])
    def test_all_entries(self, y, scope, quantile, normalize):
        assert_is_formula(normal(0, N, D), y, quantile=quantile, scope=scope, normalize=normalize)

    @pytest.mark.parametrize("max_per_row", [1, 5, N - 1])
    def test_rows_that_have_too_many_keep_the_largest(self, y, scope, quantile, max_per_row):
        assert_is_formula(normal(0, N, D), y, quantile=quantile, scope=scope, max_per_row=max_per_row)


def test_two_items():
    assert_is_formula(normal(0, 2, D), normal(1, 2, D), quantile=0.5)
    assert_is_formula(normal(0, 2, D), normal(1, 2, D), quantile=0.999, scope="row")


@pytest.mark.parametrize("scope", ["global", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, scope):
    assert_is_formula(normal(0, N, D, dtype=dtype), normal(1, N, D, dtype=dtype), scope=scope)
    assert_is_formula(normal(0, N, D, dtype=dtype), normal(1, N, D), scope=scope)


def test_rows_apart_and_embeddings_that_require_a_gradient():
    assert_is_formula(normal(0, 3 * N, 2 * D)[::3, 3 : 3 + D], normal(1, N, 4 * D)[:, :D])
    x = normal(0, N, D)
    graphs = [similarity_graph(value) for value in (x, x.clone().requires_grad_())]
    assert np.array_equal(*(result.matrix.toarray() for result in graphs))


@pytest.mark.parametrize("exponent", [-120, 120])
def test_a_row_has_a_direction_whatever_its_length(exponent):
    """Its square is 0, or infinite, in float32."""
    scale = torch.ones(N, 1)
    scale[::2] = 2.0**exponent
    x = normal(0, N, D)
    assert np.array_equal(*(similarity_graph(value).matrix.toarray() for value in (x, x * scale)))


@pytest.mark.parametrize("copies", [2, 5, 20])
def test_equal_similarities_are_entries_together(copies):
    """Items that occur several times: within 1e-7 of 1 to each other by rounding, and the quantile lies among these."""
    n = 20 * copies
    item = torch.arange(n) % 20
    matrix, facts = similarity_graph(normal(0, 20, 33)[item], quantile=1 - 0.3 * (copies - 1) / (n - 1))
    expected = (item[:, None] == item).numpy() & ~np.eye(n, dtype=bool)
    assert np.array_equal(matrix.toarray(), expected)
    assert facts.level == pytest.approx(1 - (copies - 1) / (n - 1), abs=1e-12)


def test_entries_that_equal_the_threshold_exactly():
    """Whole numbers have products without rounding: many are the same, and those at the threshold are in."""
    x = normal(0, N, 3).mul(2).round()
    scores = similarities(x, normalize=False)
    threshold = np.sort(off_diagonal(scores))[int(0.9 * N * (N - 1))]
    matrix, facts = similarity_graph(x, quantile=0.9, normalize=False)
    assert (off_diagonal(scores) == threshold).sum() > 20
    assert np.array_equal(matrix.toarray(), (scores >= threshold) & ~np.eye(N, dtype=bool))
    assert facts.threshold <= threshold and facts.level < 0.9  # exact
    assert facts.threshold > threshold - 1e-3


def clusters(seed, n, spread, dim=16):
    """Of sizes 1, 2, 4, ... around centres far apart, so that rows differ in how many alike they have."""
    centre = torch.arange(1, n + 1).log2().long()
    return normal(seed, 20, dim)[centre] + spread * normal(seed + 1, n, dim)


def popular(seed, n, dim=16):
    """Two towers: all items of x point one way, and those of y do so more or less: columns differ, rows do not."""
    direction = torch.nn.functional.normalize(normal(seed, 1, dim), dim=1)
    weight = torch.linspace(0, 1, n)[torch.randperm(n, generator=torch.Generator().manual_seed(seed)), None]
    return direction + 0.2 * normal(seed + 1, n, dim), weight * direction + normal(seed + 2, n, dim) / dim**0.5


SAMPLED = 400
DATA = {
    "one cloud": (normal(0, SAMPLED, 16), None),
    "two clouds": (normal(0, SAMPLED, 16), normal(1, SAMPLED, 16)),
    "clusters": (clusters(2, SAMPLED, 0.2), None),
    "loose clusters": (clusters(4, SAMPLED, 0.6), clusters(4, SAMPLED, 0.8)),
    "popular columns": popular(8, SAMPLED),
}


@pytest.mark.parametrize(
    ("rows", "columns", "least"),
    [(40, SAMPLED, 0.7), (300, SAMPLED, 0.7), (40, 100, 0.5)],
    ids=["rows", "most rows", "rows and columns"],
)
@pytest.mark.parametrize("data", DATA)
def test_the_stated_error_of_the_threshold_is_its_error(monkeypatch, data, rows, columns, least):
    """Of 250 samples. The spread of 250 levels is known to 4.5% (one standard deviation): six of these each way.
    With columns drawn too, what is each similarity's own counts twice, at most a factor of sqrt(2) too much."""
    monkeypatch.setattr(graph, "SAMPLE_COLUMNS", columns)
    monkeypatch.setattr(graph, "SAMPLE_ELEMENTS", rows * columns)
    quantile = 0.9
    facts = [similarity_graph(*DATA[data], quantile=quantile, seed=seed, max_per_row=1).facts for seed in range(250)]
    levels, stated = (np.array([getattr(fact, name) for fact in facts]) for name in ("level", "level_error"))
    assert (abs(levels - quantile) <= 5 * stated).all()
    ratio = levels.std() / np.sqrt((stated**2).mean())
    assert ratio > least and ratio < 1.3
    assert abs(levels.mean() - quantile) < 0.5 * levels.std()
    scores = off_diagonal(similarities(*DATA[data]))
    assert facts[0].level == pytest.approx((scores < facts[0].threshold).mean(), abs=2 / len(scores))


def test_the_sample_is_everything_up_to_the_stated_number_of_items():
    most = 5792
    assert most**2 <= graph.SAMPLE_ELEMENTS < (most + 1) ** 2
    assert graph.SAMPLE_ELEMENTS // graph.SAMPLE_COLUMNS == 256


@pytest.mark.parametrize("options", [{}, {"scope": "row"}, {"quantile": 0.1, "max_per_row": 7}], ids=str)
def test_tiles_make_no_difference(monkeypatch, options):
    x, y = normal(0, 101, D), normal(1, 101, D)
    results = []
    for elements in (1, 101, 101 * 7 + 5, 101 * 100, 1 << 25):
        monkeypatch.setattr(graph, "TILE_ELEMENTS", {"cpu": elements})
        matrix, facts = similarity_graph(x, y, **options)
        results.append((matrix.indptr.tolist(), matrix.indices.tolist(), facts))
    assert all(result == results[0] for result in results)


class Largest(TorchFunctionMode):
    """How many elements the largest tensor has that any of torch's functions returns."""

    numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("columns", [1000, 200])
@pytest.mark.parametrize("options", [{}, {"scope": "row"}, {"quantile": 0, "max_per_row": 20}], ids=str)
def test_no_tensor_is_larger_than_a_tile_a_sample_or_the_embeddings(monkeypatch, options, columns):
    n, elements = 1000, 30_000  # a 33rd of the similarities
    monkeypatch.setattr(graph, "TILE_ELEMENTS", {"cpu": elements})
    monkeypatch.setattr(graph, "SAMPLE_ELEMENTS", elements)
    monkeypatch.setattr(graph, "SAMPLE_COLUMNS", columns)
    with Largest() as largest:
        similarity_graph(normal(0, n, D), normal(1, n, D), **options)
    assert elements // 2 < largest.numel <= elements


class Bar:
    """In tqdm's place."""

    made = []

    def __init__(self, total, **options):
        self.total, self.done, self.closed = total, 0, False
        self.made.append(self)

    def update(self, count):
        self.done += count

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(graph, "PROGRESS_ABOVE", N)
    monkeypatch.setattr(graph, "TILE_ELEMENTS", {"cpu": 7 * N})
    return Bar.made


@pytest.mark.parametrize(
    ("n", "progress", "shown"), [(N, None, 0), (N + 1, None, 1), (N + 1, False, 0), (N, True, 1), (N - 1, None, 0)]
)
def test_a_bar_is_shown_above_a_number_of_items_or_as_one_wishes(bars, n, progress, shown):
    similarity_graph(normal(0, n, D), progress=progress)
    assert [(bar.total, bar.done, bar.closed) for bar in bars] == [(n, n, True)] * shown


def test_too_many_entries_are_an_error_that_closes_the_bar(bars, monkeypatch):
    monkeypatch.setattr(graph, "MAX_ENTRIES", 100)
    with pytest.raises(ValueError, match="^the graph must have .* got more: take a higher quantile or a lower max_per"):
        similarity_graph(normal(0, N, D), quantile=0.5, progress=True)
    assert [(bar.done < N, bar.closed) for bar in bars] == [(True, True)]


def shuffled(dense, seed):
    """The graph with its items renamed, and the names: item i is what was item names[i]."""
    names = np.random.default_rng(seed).permutation(len(dense))
    return sparse.csr_array(dense[names][:, names]), names


def bandwidth(dense):
    rows, columns = np.nonzero(dense)
    return int(abs(rows - columns).max())


@pytest.mark.parametrize("seed", range(10))
class TestOrder:
    def test_of_any_graph_is_a_permutation(self, seed):
        dense = np.random.default_rng(seed).random((N, N)) < 0.02 * seed
        order = consecutive_order(sparse.csr_array(dense), seed=seed)
        assert order.dtype == np.int64
        assert sorted(order) == list(range(N))

    def test_keeps_clusters_together(self, seed):
        """Some of one item; within the others each is joined to the next, one way, and to some more."""
        generator = np.random.default_rng(seed)
        cluster = np.repeat(np.arange(12), [1, 1, 1, 2, 3, 5, 8, 9, 10, 11, 20, 29])
        dense = (cluster[:, None] == cluster) & (generator.random((100, 100)) < 0.2)
        dense[np.arange(99), np.arange(1, 100)] = cluster[:-1] == cluster[1:]
        np.fill_diagonal(dense, False)
        matrix, names = shuffled(dense, seed)
        found = cluster[names][consecutive_order(matrix)]
        assert (found[1:] != found[:-1]).sum() == 11
        assert sorted(found[-3:]) == [0, 1, 2]

    @pytest.mark.parametrize(("width", "most"), [(1, 1), (4, 8)])
    def test_narrows_a_band(self, seed, width, most):
        """A path is found again. A wider band may come out twice as wide: a level of the search joins the next."""
        distance = np.subtract.outer(np.arange(N), np.arange(N))
        matrix, _ = shuffled((distance > 0) & (distance <= width), seed)
        order = consecutive_order(matrix)
        after = bandwidth(matrix.toarray()[order][:, order])
        assert after <= most < bandwidth(matrix.toarray())

    def test_items_that_nothing_is_joined_to_come_last_in_an_order_by_seed(self, seed):
        dense = np.zeros((N, N), bool)
        dense[[0, 7, 9], [7, 9, 30]] = True
        alone = np.setdiff1d(np.arange(N), [0, 7, 9, 30])
        order = consecutive_order(sparse.csr_array(dense), seed=seed)
        assert sorted(order[:4]) == [0, 7, 9, 30]
        assert sorted(order[4:]) == alone.tolist() != order[4:].tolist()
        assert np.array_equal(order, consecutive_order(sparse.csr_array(dense), seed=seed))
        assert not np.array_equal(order, consecutive_order(sparse.csr_array(dense), seed=seed + 1))


@pytest.mark.parametrize("n", [1, 2, 50])
def test_a_graph_without_entries_gives_a_shuffled_order(n):
    assert sorted(consecutive_order(sparse.csr_array((n, n), dtype=bool))) == list(range(n))


def test_graph_and_order_find_clusters_of_embeddings():
    cluster = torch.arange(120) % 6
    x = normal(0, 6, 16)[cluster] + 0.1 * normal(1, 120, 16)
    found = cluster.numpy()[consecutive_order(similarity_graph(x, quantile=0.9).matrix)]
    assert (found[1:] != found[:-1]).sum() == 5
