"""contrastive_lse on every backend against plain formulas in float64, and under torch's machinery."""

import math

import pytest
import torch
from helpers import COMPILED, RUNNABLE, assert_identical, normal, relative_rms, with_rows

from emc2_kernels import contrastive_lse, ops
from emc2_kernels.backends import gpu
from emc2_kernels.backends.params import ScoreParams
from emc2_kernels.lse import mean_similarity

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # of the relative RMS
INF, NAN = torch.inf, torch.nan
# On and beside the edges of the kernels' tiles: 16 rows (made small below), 128 keys, 16 to 32 dimensions.
SIZES = [(1, 1, 1), (5, 3, 2), (16, 128, 32), (17, 129, 33), (3, 130, 70)]


@pytest.fixture(autouse=True)
def small_poisoned_kernels(monkeypatch):
    """Small blocks, since the interpreter's time goes by them; what kernels must fill comes with rubbish in it."""
    if not gpu.interpreting():
        return
    from emc2_kernels.backends.triton import tuning

    monkeypatch.setattr(tuning, "lse", lambda *key: tuning.Lse(16, 16, 4, 1, "for tests"))
    monkeypatch.setattr(
        tuning, "lse_gradient", lambda *key: tuning.LseGradient(16, 128, 16, 32, 4, 1, False, "for tests")
    )
    new_empty = torch.Tensor.new_empty

    def poisoned(*sizes, **options):
        tensor = new_empty(*sizes, **options)
        return tensor.fill_(NAN if tensor.is_floating_point() else -77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def unit(seed, n, d, dtype=torch.float32):
    return torch.nn.functional.normalize(normal(seed, n, d), dim=1).to(dtype)


def formula(queries, keys, temperature, query_ids=None, key_ids=None):
    scores = queries @ keys.T / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    if query_ids is not None:
        scores = scores.masked_fill(query_ids[:, None] == key_ids, -INF)
    return torch.logsumexp(scores, 1)


def value_and_gradients(function, queries, keys, temperature, weights, **options):
    """The values, and gradients of a weighted sum of them; ``keys`` None: the queries themselves."""
    leaves = [queries.detach().clone(), None if keys is None else keys.detach().clone(), temperature]
    leaves = [leaf.requires_grad_() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    given_keys = leaves[0] if keys is None else leaves[1]
    lse = function(leaves[0], given_keys, temperature=leaves[2], **options)
    started = lse > -INF
    (lse[started] * weights[started]).sum().backward()
    return [lse.detach(), *(leaf.grad for leaf in leaves if isinstance(leaf, torch.Tensor))]


def assert_equals_formula(backend, queries, keys, temperature, **ids):
    weights = torch.linspace(-1, 2, len(queries))
    actual = value_and_gradients(contrastive_lse, queries, keys, temperature, weights, **ids, backend=backend)
    wide = [x.double().detach() if isinstance(x, torch.Tensor) else x for x in (queries, keys, temperature)]
    expected = value_and_gradients(formula, *wide, weights.double(), **ids)
    assert actual[0].dtype == torch.float32
    assert torch.equal(actual[0].isfinite(), expected[0].isfinite())
    finite = expected[0].isfinite()
    pairs = [(actual[0][finite], expected[0][finite]), *zip(actual[1:], expected[1:], strict=True)]
    for (result, exact), tolerance in zip(pairs, [1e-5] + [TOLERANCE[queries.dtype]] * 3, strict=False):
        assert relative_rms(result, exact) <= tolerance or torch.equal(result.double(), exact)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_values_and_gradients(backend, n, m, d, dtype):
    ids = {"query_ids": torch.arange(n) % 7, "key_ids": torch.arange(m) % 5 + 2}
    temperature = torch.linspace(0.05, 0.5, n) if n % 2 else 0.1
    assert_equals_formula(backend, unit(0, n, d, dtype), unit(1, m, d, dtype), temperature, **ids)


@pytest.mark.parametrize("per_row", [False, True], ids=["", "temperatures"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_queries_that_are_the_keys(backend, dtype, per_row):
    ids = torch.arange(150) % 75
    temperature = torch.linspace(0.05, 0.5, 150) if per_row else 0.1
    assert_equals_formula(backend, unit(0, 150, 7, dtype), None, temperature, query_ids=ids, key_ids=ids)
    assert_equals_formula(backend, unit(0, 37, 5, dtype), None, 0.2)


@pytest.mark.skipif(not gpu.interpreting(), reason="with a GPU, tests/gpu runs the kernels on it")
def test_keys_split_over_programs(monkeypatch):
    from emc2_kernels.backends.triton import tuning

    monkeypatch.setattr(tuning, "splits", lambda *sizes: 3)
    ids = {"query_ids": torch.arange(17), "key_ids": torch.arange(130) % 20}
    for dtype in (torch.float32, torch.bfloat16):
        assert_equals_formula("triton", unit(0, 17, 20, dtype), unit(1, 130, 20, dtype), torch.full((17,), 0.1), **ids)


TILED = {
    "no ids": lambda n, m: {},
    "few, the first": lambda n, m: {"query_ids": torch.arange(n), "key_ids": torch.arange(m) // 3},
    "few, the last": lambda n, m: {"query_ids": torch.arange(n), "key_ids": (m - 1 - torch.arange(m)) // 3},
    "a third": lambda n, m: {"query_ids": torch.arange(n) % 3, "key_ids": torch.arange(m) % 4},
    "all but one": lambda n, m: {"query_ids": torch.ones(n).long(), "key_ids": with_rows(torch.ones(m).long(), 7, 2)},
}


@pytest.mark.parametrize("ids", TILED.values(), ids=TILED)
@pytest.mark.parametrize(("n", "m"), [(300, 700), (1100, 500), (130, 9001)])
def test_tiles_of_the_cpu(n, m, ids):
    """Several row blocks, key tiles and a last one that is narrower."""
    for keys in (unit(1, m, 9), unit(1, m, 9, torch.bfloat16)):
        assert_equals_formula("cpu", unit(0, n, 9, keys.dtype), keys, 0.07, **ids(n, m))


@pytest.mark.parametrize("backend", COMPILED)
def test_operands_without_components(backend):
    """They have no address: keys are not taken for none, which would be read as rows, far past the rows' end."""
    m = 5_000_000 if backend == "cpu" else 200
    queries, keys = torch.zeros(3, 0, requires_grad=True), torch.zeros(m, 0, requires_grad=True)
    lse = contrastive_lse(queries, keys, temperature=torch.full((3,), 0.1, requires_grad=True), backend=backend)
    gradients = torch.autograd.grad(lse.sum(), (queries, keys))
    assert [gradient.shape for gradient in gradients] == [(3, 0), (m, 0)]
    torch.testing.assert_close(lse, torch.full((3,), math.log(m)))


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("per_row", [False, True], ids=["one temperature", "a temperature for each row"])
def test_keys_that_need_no_gradient_get_none(backend, per_row, monkeypatch):
    """Nor is one made: the others are the same bits, through autograd and at the operator."""
    asked, function = [], ops.contrastive_lse_backward.function
    monkeypatch.setattr(
        ops.contrastive_lse_backward, "function", lambda *given: asked.append(given[3]) or function(*given)
    )
    found = []
    for wanted in (True, False):
        queries, keys = (normal(seed, size, 6).requires_grad_() for seed, size in ((0, 9), (1, 140)))
        keys.requires_grad_(wanted)
        temperature = torch.full((9,), 0.2, requires_grad=True) if per_row else 0.2
        lse = contrastive_lse(queries, keys, temperature=temperature, backend=backend)
        lse.sum().backward()
        found.append([queries.grad, *([temperature.grad] if per_row else [])])
        assert (keys.grad is not None) == wanted
        scores = ScoreParams(queries.detach(), keys.detach(), 0.2, None, None)
        made = ops.contrastive_lse_backward(scores, torch.ones(9), lse.detach(), wanted, backend)
        assert made[1].shape == (keys.shape if wanted else (0,))
        found[-1].append(made[0])
    assert_identical(*found)
    assert asked == [True, True, False, False]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_key_that_is_not_finite_is_one_that_is_excluded(bad):
    """To the last bit, at scores so large that sums in another order would show."""
    queries, keys = normal(0, 40, 9) * 300, normal(1, 70, 9) * 300

    def made(keys, key_ids):
        q, k = queries.clone().requires_grad_(), keys.clone().requires_grad_()
        ids = {"query_ids": torch.full((40,), 999), "key_ids": key_ids}
        lse = contrastive_lse(q, k, temperature=torch.full((40,), 0.3), backend="cpu", **ids)
        return lse.detach(), *torch.autograd.grad(lse.sum(), (q, k))

    numbers = torch.arange(70)
    assert_identical(made(with_rows(keys, 11, bad), numbers), made(keys, with_rows(numbers, 11, 999)))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_row_that_is_not_finite_takes_no_part(bad):
    """Neither as a query nor as a key, where they are one operand."""
    rows = unit(0, 40, 9)
    others = torch.arange(40) != 11

    def made(rows):
        rows = rows.clone().requires_grad_()
        lse = contrastive_lse(rows, rows, temperature=0.2, backend="cpu")
        return lse.detach(), *torch.autograd.grad(lse[lse > -INF].sum(), rows)

    found, expected = made(with_rows(rows, 11, bad)), made(rows[others])
    assert found[0][11] == -INF and (found[1][11] == 0).all()
    torch.testing.assert_close([part[others] for part in found], list(expected))


def test_the_gradient_of_temperatures_over_many_keys():
    queries, keys = unit(0, 2, 4), unit(1, 300_000, 4)
    temperature = torch.full((2,), 0.5, requires_grad=True)
    lse = contrastive_lse(queries, keys, temperature=temperature, backend="cpu")
    (found,) = torch.autograd.grad(lse.sum(), temperature)
    wide = temperature.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(formula(queries.double(), keys.double(), wide).sum(), wide)
    torch.testing.assert_close(found.double(), exact, rtol=5e-6, atol=0)  # 1e-4 and more by one running sum


def test_a_row_of_the_cpu_has_one_result():
    """Whatever the number of threads, and whatever rows stand beside it."""
    queries, keys, weights = unit(0, 300, 40), unit(1, 500, 40), normal(2, 300)
    ids = torch.arange(300) % 50, torch.arange(500) % 60

    def made(rows=slice(None), threads=1):
        q, k = queries[rows].clone().requires_grad_(), keys.clone().requires_grad_()
        torch.set_num_threads(threads)
        lse = contrastive_lse(q, k, temperature=0.1, query_ids=ids[0][rows], key_ids=ids[1], backend="cpu")
        (lse * weights[rows]).sum().backward()
        return lse.detach(), q.grad, k.grad

    before = torch.get_num_threads()
    try:
        expected = made()
        for threads in (2, 3, 7):
            assert_identical(made(threads=threads), expected)
        for rows in (slice(3, 4), slice(250, None), torch.randperm(300, generator=torch.Generator().manual_seed(0))):
            lse, d_queries, _ = made(rows)
            assert_identical((lse, d_queries), (expected[0][rows], expected[1][rows]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("temperature", [0.3, torch.tensor(0.3), torch.linspace(0.2, 1, 6)], ids=["", "0-d", "rows"])
def test_gradcheck(temperature, ids):
    queries, keys = normal(0, 6, 3, dtype=torch.float64), normal(1, 5, 3, dtype=torch.float64)
    inputs = [queries.requires_grad_(), keys.requires_grad_()]
    if isinstance(temperature, torch.Tensor):
        inputs.append(temperature.double().requires_grad_())
    names = {"query_ids": torch.arange(6) % 4, "key_ids": torch.arange(5) % 3} if ids else {}

    def call(queries, keys, t=temperature):
        return contrastive_lse(queries, keys, temperature=t, **names)

    assert torch.autograd.gradcheck(call, inputs)
    if ids:
        names["key_ids"] = names["query_ids"]
    assert torch.autograd.gradcheck(lambda q, *t: call(q, q, *t), [inputs[0], *inputs[2:]])


@pytest.mark.parametrize("backend", RUNNABLE)
class TestDegenerate:
    def test_rows_apart(self, backend):
        queries, keys = unit(0, 10, 24)[:, 3:11], unit(1, 40, 8)[::3]
        assert_equals_formula(backend, queries, keys, 0.1)
        assert_equals_formula(backend, unit(0, 1, 8).expand(5, 8), keys, 0.1)

    @pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (0, 0)])
    def test_nothing(self, backend, n, m):
        for temperature in (0.1, torch.full((n,), 0.1)):
            results = value_and_gradients(
                contrastive_lse, unit(0, n, 3), unit(1, m, 3), temperature, torch.ones(n), backend=backend
            )
            assert torch.equal(results[0], torch.full((n,), -INF))
            assert not any(gradient.any() for gradient in results[1:])

    @pytest.mark.parametrize("size", [5, 200])
    def test_rows_without_keys(self, backend, size):
        queries, keys = unit(0, size, 4).requires_grad_(), unit(1, size, 4).requires_grad_()
        temperature = torch.full((size,), 0.1, requires_grad=True)
        ids = {"query_ids": torch.zeros(size).long(), "key_ids": torch.zeros(size).long()}
        ids["query_ids"][2] = 1
        lse = contrastive_lse(queries, keys, temperature=temperature, **ids, backend=backend)
        lse.backward(torch.ones(size))
        others = torch.arange(size) != 2
        assert lse[2].isfinite() and (lse[others] == -INF).all()
        for gradient in (queries.grad, temperature.grad):
            assert gradient[2].all() and not gradient[others].any()
        assert keys.grad.isfinite().all() and keys.grad.any()

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_temperature_001_is_finite(self, backend, dtype):
        assert_equals_formula(backend, unit(0, 20, 16, dtype), unit(0, 20, 16, dtype), 0.01)

    @pytest.mark.parametrize("size", [6, 150])
    @pytest.mark.parametrize("bad", [INF, -INF, NAN])
    def test_scores_that_are_not_finite_are_left_out(self, backend, bad, size):
        """Bad keys and queries change nothing for the others, whose values and gradients are those without them."""
        queries, keys = unit(0, size, 5), unit(1, size, 5)
        leaves = [with_rows(queries, (2, 1), bad).requires_grad_(), with_rows(keys, (3, 0), bad).requires_grad_()]
        leaves.append(torch.full((size,), 0.2, requires_grad=True))
        lse = contrastive_lse(leaves[0], leaves[1], temperature=leaves[2], backend=backend)
        lse.backward(torch.ones(size))
        rows, columns = torch.arange(size) != 2, torch.arange(size) != 3
        ones = torch.ones(size - 1).double()
        expected = value_and_gradients(
            formula, queries[rows].double(), keys[columns].double(), 0.2 * ones, torch.ones(size - 1).double()
        )
        assert lse[2] == -INF and not leaves[0].grad[2].any() and not leaves[1].grad[3].any()
        actual = [lse[rows], leaves[0].grad[rows], leaves[1].grad[columns], leaves[2].grad[rows]]
        for result, exact in zip(actual, expected, strict=True):
            assert relative_rms(result, exact) <= 1e-5

    def test_products_that_overflow_are_left_out(self, backend):
        queries, keys = torch.full((2, 2), 1e20, requires_grad=True), torch.tensor([[1e20, 1e20], [1e-20, 0]])
        lse = contrastive_lse(queries, keys, temperature=1.0, backend=backend)
        lse.sum().backward()
        torch.testing.assert_close(lse, torch.ones(2))
        torch.testing.assert_close(queries.grad, keys[1].expand(2, 2))

    def test_mean_similarity(self, backend):
        queries, keys, ids = unit(0, 12, 6), unit(1, 9, 6), {"query_ids": torch.arange(12), "key_ids": torch.arange(9)}
        ids["key_ids"][:] = 4
        options = {"temperature": 0.2, **ids, "backend": backend}
        lse = contrastive_lse(queries, keys, **options)
        scores = queries @ keys.T
        expected = ((scores / 0.2).softmax(1) * scores).sum(1) * (torch.arange(12) != 4)
        found = mean_similarity(lse, ScoreParams(queries, keys, 0.2, *ids.values()), backend)
        torch.testing.assert_close(found, expected)

    def test_key_ids_alone_exclude_nothing(self, backend):
        queries, keys = unit(0, 4, 3), unit(1, 5, 3)
        alone = contrastive_lse(queries, keys, temperature=0.1, key_ids=torch.arange(5), backend=backend)
        torch.testing.assert_close(alone, formula(queries, keys, 0.1))


def options_of(n, m, all_given):
    ids = {"query_ids": torch.arange(n) % 3, "key_ids": torch.arange(m) % 4}
    return {"temperature": torch.full((n,), 0.2), **ids} if all_given else {"temperature": 0.2}


@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_equals_eager(backend):
    def loss(queries, keys):
        both = contrastive_lse(queries, keys, **options_of(6, 5, True), backend=backend)
        return both.sum() + contrastive_lse(queries, queries, temperature=0.2, backend=backend).sum()

    torch.compiler.reset()
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [unit(0, 6, 4).requires_grad_(), unit(1, 5, 4).requires_grad_()]
        value = call(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("size", [6, 200])
@pytest.mark.parametrize("backend", COMPILED)
def test_autocast_and_inference_mode_change_nothing(backend, size):
    weights, options = torch.ones(size), options_of(size, size, True) | {"backend": backend}
    operands = unit(0, size, 4), unit(1, size, 4)
    temperature = options.pop("temperature")
    expected = value_and_gradients(contrastive_lse, *operands, temperature.clone(), weights, **options)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(contrastive_lse, *operands, temperature.clone(), weights, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    with torch.inference_mode():
        inferred = contrastive_lse(*operands, temperature=temperature, **options)
    torch.testing.assert_close(inferred.clone(), expected[0], rtol=0, atol=0)
    assert contrastive_lse(*operands, temperature=temperature, **options).isfinite().all()  # the buffer still serves


def test_a_second_derivative_is_an_error():
    queries = unit(0, 4, 3).requires_grad_()
    lse = contrastive_lse(queries, unit(1, 5, 3), temperature=0.2)
    (gradient,) = torch.autograd.grad(lse.sum(), queries, create_graph=True)
    with pytest.raises(NotImplementedError, match="contrastive_lse has no second derivative"):
        (lse.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("distance", [0, 1, 3])
def test_rows_that_overlap(backend, distance):
    """Keys are windows on a sequence: rows may be any distance apart, and fewer than they are long."""
    queries, windows = unit(1, 4, 48), normal(2, 200).as_strided((7, 48), (distance, 1))
    gradients = []
    for keys in (windows, windows.contiguous()):
        leaves = queries.clone().requires_grad_(), keys.detach().requires_grad_()
        lse = contrastive_lse(*leaves, temperature=0.5, backend=backend)
        gradients.append(torch.autograd.grad(lse.sum(), leaves))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_the_last_tile_of_sharp_scores(backend):
    """What stands in for rows that are not there is nobody's query: its exponential, of 100 above no log-sum-exp, would
    be infinite, and times its share of 0 a NaN."""
    rows = unit(0, 65, 8)
    gradients = []
    for name in (backend, "reference"):
        leaf = rows.clone().requires_grad_()
        lse = contrastive_lse(leaf, leaf, temperature=0.01, query_ids=torch.arange(65), key_ids=torch.arange(65),
                              backend=name)  # fmt: skip
        gradients.append(torch.autograd.grad(lse.sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", COMPILED)
def test_inputs_are_left_alone(backend):
    queries, keys, grad = unit(0, 150, 4), unit(1, 150, 4), torch.ones(150)
    before = queries.clone(), keys.clone()
    leaf = queries.requires_grad_()
    contrastive_lse(leaf, keys, temperature=0.1, backend=backend).backward(grad)
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1]) and (grad == 1).all()
