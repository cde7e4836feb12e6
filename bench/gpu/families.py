"""The smoke stage's trials of walks, draws, log-sum-exps and graphs. Losses are in loss_trials.py.

Sizes: rows and keys that no tile divides, sample points in many tiles, burn-in, half of the chains with a state. A
kernel takes one of two ways by its rows: where they are fewer than the GPU has places for, keys are split over programs
(SPLIT), else one program walks all keys of its rows (FILLS). 33,755 rows fill 264 places with blocks of up to 128.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import emc2_kernels as emc2
from bench.gpu.oracle import (
    LATENT,
    Problem,
    gradient_error,
    isir_gradients,
    judge_gumbel,
    judge_isir,
    judge_walk,
    lse_and_gradients,
    lse_error,
    spread_rows,
)
from bench.gpu.trial import Case, Context, Trial, capture, compare, compare_exactly, compare_rows, merge_cases
from emc2_kernels import rng

Shape = tuple[tuple[int, ...], tuple[int, ...]]  # on a GPU, and in a rehearsal

# (rows, keys), and the number of proposals where they are gathered.
# Of the last 512 of 597 proposals 16 samples are whole numbers of proposals apart, as users have it; else they are not.
FILLS: Shape = (33_755, 597), (70, 149)
LONG: Shape = (33_755, 1301), (70, 1301)  # more than eight tiles: a second launch takes few samples
SPLIT_LONG: Shape = (8000, 2600), (140, 2600)  # the same in two splits
SPLIT: Shape = (3000, 1500), (40, 300)  # three tiles a split on an H100
ALIGNED: Shape = (512, 1024), (32, 128)
WHOLE_TILES: Shape = (33_755, 1280), (70, 256)  # as the sweep on Hopper's matrix units takes them
SPLIT_TILES: Shape = (3000, 6144), (40, 384)
FEW_ROWS: Shape = (40, 1800), (20, 300)
FEW_ROWS_WIDE: Shape = (60, 500), (20, 200)
GATHERED: Shape = (3001, 7001, 300), (33, 70, 40)
GATHERED_SPLIT: Shape = (40, 7001, 1000), (20, 70, 90)

SEED, STEP = 2**63 + 5, 2**32 - 7
NUM_SAMPLES = 16
LN_2 = math.log(2)


def shape_name(shape: tuple[int, ...]) -> str:
    """As in "3000x1500"."""
    return "x".join(map(str, shape))


def incoming_state(n: int, temperature: float) -> emc2.MHState:
    """Half of the chains have a state: most within the range of the scores, some that nothing moves, some NaN."""
    state = emc2.init_state(n)
    score = torch.randn(n, generator=torch.Generator().manual_seed(5)) / temperature / LATENT**0.5
    score[::16], score[2::16] = 1000.0, torch.nan
    state.score[::2], state.key[::2] = score[::2], 10_000_019
    return state


def all_options(n: int, m: int, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Temperatures a row, and ids, labels and proposal weights; a row has one key in 37 excluded."""
    draw = torch.Generator().manual_seed(6)
    return temperature * torch.linspace(0.8, 1.25, n), {
        "chain_ids": torch.randint(0, 2**40, (n,), generator=draw),
        "query_ids": torch.arange(n) % 37,
        "key_ids": torch.randint(0, 37, (m,), generator=draw),
        "key_labels": torch.randint(0, 2**40, (m,), generator=draw),
        "log_proposal": 0.5 * torch.randn(m, generator=draw),
    }


def move_problem(problem: Problem, device: torch.device) -> Problem:
    """Made on the CPU, so that it is the same on every machine; from here on the device's."""
    options = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in problem.options.items()
    }
    state = problem.state and emc2.MHState(*(field.to(device) for field in problem.state))
    temperature = problem.temperature.to(device) if isinstance(problem.temperature, Tensor) else problem.temperature
    queries = problem.queries.to(device)
    keys = queries if problem.keys is problem.queries else problem.keys.to(device)
    return problem._replace(queries=queries, keys=keys, temperature=temperature, state=state, options=options)


def walk_problem(
    shape: tuple[int, ...],
    d: int,
    dtype: torch.dtype,
    temperature: float,
    kind: str,
    full: bool,
    num_samples: int = NUM_SAMPLES,
    weights: bool = True,
) -> Problem:
    """A walk of a kind, "sweep", "uniform" or "given", with everything that it can be given or with nothing. Without
    ``weights`` proposals have none in any case."""
    n, m, *drawn = shape
    temperatures, options = all_options(n, m, temperature) if full else (temperature, {})
    if not weights:
        options.pop("log_proposal", None)
    count = drawn[0] if drawn else m
    if kind == "uniform":
        options |= {"proposal": "uniform", "num_proposals": count}
    elif kind == "given":
        options["proposal"] = torch.randint(0, m, (n, count), generator=torch.Generator().manual_seed(7))
    options |= {"burn_in": count // 7, "num_samples": num_samples}
    queries, keys = spread_rows(n, d, 1, dtype), spread_rows(m, d, 2, dtype)
    return Problem(queries, keys, temperatures, SEED, STEP, incoming_state(n, temperature), options)


def number_tensor(number: int, device: torch.device) -> Tensor:
    """A seed or step as a 0-d int64 tensor: the bits of the unsigned number."""
    return torch.tensor(number - 2**64 if number >= 2**63 else number, device=device)


def run_step(problem: Problem, backend: str, **changes: object) -> emc2.MHResult:
    """``mh_step`` of a problem."""
    options = {"temperature": problem.temperature, "seed": problem.seed, "step": problem.step} | problem.options
    return emc2.mh_step(problem.queries, problem.keys, problem.state, backend=backend, **(options | changes))


def walks(
    context: Context,
    backend: str,
    *,
    d: int,
    dtype: torch.dtype,
    shapes: tuple[Shape, ...],
    temperature: float = 0.35,
    kind: str = "sweep",
    full: bool = False,
    counts: bool = False,
    num_samples: int = NUM_SAMPLES,
    weights: bool = True,
) -> Iterator[Trial]:
    """Walks against the literal one. ``full``: every option, seed and step on the device. ``counts``: accepts counted,
    and the log-sum-exp of a sweep."""
    for shape in (context.choose(*both) for both in shapes):
        problem = move_problem(
            walk_problem(shape, d, dtype, temperature, kind, full, num_samples, weights), context.device
        )
        changes: dict[str, object] = {"return_accepts": counts, "return_lse": counts and kind == "sweep"}
        if full:
            changes |= {name: number_tensor(getattr(problem, name), context.device) for name in ("seed", "step")}
        call = partial(run_step, problem, backend, **changes)
        name = f"{kind} {shape_name(shape)} d={d} {str(dtype).removeprefix('torch.')}{' options' if full else ''}"
        yield Trial(name, call, partial(judge_walk, name, problem))


def walk_variants(
    context: Context, backend: str, *, each: tuple[dict[str, object], ...], **common: object
) -> Iterator[Trial]:
    """Walks with different options, one after another."""
    for options in each:
        yield from walks(context, backend, **(common | options))


def gumbels(context: Context, backend: str, *, num_samples: int, full: bool) -> Iterator[Trial]:
    """Exact draws from the softmax, d = 128. ``full``: ids, chain ids, seed and step on the device."""
    for shape in (context.choose(*both) for both in (FILLS, SPLIT)):
        n, m = shape
        ids = all_options(n, m, 1.0)[1]
        options = {name: ids[name] for name in ("chain_ids", "query_ids", "key_ids")} if full else {}
        operands = spread_rows(n, 128, 1, torch.bfloat16), spread_rows(m, 128, 2, torch.bfloat16)
        problem = move_problem(Problem(*operands, 0.35, SEED, STEP, None, options), context.device)
        call = partial(
            emc2.gumbel_sample,
            problem.queries,
            problem.keys,
            temperature=problem.temperature,
            seed=number_tensor(SEED, context.device) if full else SEED,
            step=number_tensor(STEP, context.device) if full else STEP,
            num_samples=num_samples,
            backend=backend,
            **problem.options,
        )
        name = shape_name(shape)
        yield Trial(name, call, partial(judge_gumbel, name, problem, num_samples))


def lses(context: Context, backend: str, *, d: int, dtype: torch.dtype) -> Iterator[Trial]:
    """Log-sum-exp and its gradients: two matrices with ids and a temperature a row, and one matrix that is both."""
    for kind, both in {"two": FILLS, "two split": SPLIT, "symmetric": ALIGNED}.items():
        n, m = context.choose(*both)
        if kind == "symmetric":
            queries, item = spread_rows(n, d, 1, dtype).to(context.device), torch.arange(n, device=context.device)
            problem = Problem(queries, queries, 0.35, 0, 0, None, {"query_ids": item, "key_ids": item})
        else:
            temperature, ids = all_options(n, m, 0.35)
            ids = {name: ids[name] for name in ("query_ids", "key_ids")}
            operands = spread_rows(n, d, 1, dtype), spread_rows(m, d, 2, dtype)
            problem = move_problem(Problem(*operands, temperature, 0, 0, None, ids), context.device)
        weights = (torch.arange(n) % 5 - 2.5).to(context.device)
        name = f"{kind} {len(problem.queries)}x{len(problem.keys)}"
        call = partial(lse_with_gradients, problem, weights, backend)
        yield Trial(name, call, partial(judge_lse, name, problem, weights))


def lse_with_gradients(problem: Problem, weights: Tensor, backend: str) -> list[Tensor | None]:
    """As ``lse_and_gradients``, by the library."""
    symmetric, per_row = problem.keys is problem.queries, isinstance(problem.temperature, Tensor)
    queries = problem.queries.clone().requires_grad_()
    keys = queries if symmetric else problem.keys.clone().requires_grad_()
    temperature = problem.temperature.clone().requires_grad_() if per_row else problem.temperature
    lse = emc2.contrastive_lse(queries, keys, temperature=temperature, backend=backend, **problem.options)
    (lse * weights).sum().backward()
    return [lse.detach(), queries.grad, None if symmetric else keys.grad, temperature.grad if per_row else None]


def judge_lse(name: str, problem: Problem, weights: Tensor, found: list[Tensor | None]) -> list[Case]:
    """Values row by row; gradients by the length of a row's error. Expected: autograd in float64."""
    (_, d), m = problem.queries.shape, problem.keys.shape[0]
    lse, d_queries, d_keys, d_temperature = lse_and_gradients(problem, weights)
    temperature = problem.temperature.double() if isinstance(problem.temperature, Tensor) else problem.temperature
    values = compare(f"{name} lse", found[0], lse, lse_error(d, temperature, m))
    return [values, *compare_gradients(name, problem, found[1:], [d_queries, d_keys, d_temperature])]


def compare_gradients(
    name: str, problem: Problem, found: list[Tensor | None], expected: list[Tensor | None]
) -> list[Case]:
    """Of queries, keys and temperatures; None: there is none."""
    (_, d), m = problem.queries.shape, problem.keys.shape[0]
    per_row = isinstance(problem.temperature, Tensor)
    temperature = problem.temperature.double() if per_row else problem.temperature
    of_gradient = gradient_error(d, float(temperature.min()) if per_row else temperature, m, problem.queries.dtype)
    d_queries, d_keys, d_temperature = expected
    cases = [compare_rows(f"{name} d_queries", found[0], d_queries, of_gradient)]
    if d_keys is not None:
        cases.append(compare_rows(f"{name} d_keys", found[1], d_keys, of_gradient))
    if d_temperature is not None:  # -<q, dq> / temperature, and q has length 1
        allowed = of_gradient * d_queries.norm(dim=1) / temperature
        cases.append(compare(f"{name} d_temperature", found[2], d_temperature, allowed))
    return cases


def isirs(context: Context, backend: str, *, d: int, dtype: torch.dtype, full: bool) -> Iterator[Trial]:
    """Steps over all keys. ``full``: every option, seed and step on the device, and the gradients of the sums."""
    for kind, both in {"two": FILLS, "two split": SPLIT, "symmetric": ALIGNED}.items():
        problem = move_problem(isir_problem(context.choose(*both), d, dtype, kind == "symmetric", full), context.device)
        weights = (torch.arange(len(problem.queries)) % 5 - 2.5).to(context.device) if full else None
        name = f"{kind} {len(problem.queries)}x{len(problem.keys)}"
        call = partial(isir_with_gradients, problem, weights, backend)
        yield Trial(name, call, partial(judge_isir_gradients, name, problem, weights))


def isir_problem(shape: tuple[int, ...], d: int, dtype: torch.dtype, symmetric: bool, full: bool) -> Problem:
    """A step of chains of which half have a state. ``symmetric``: queries are the keys, with one set of ids."""
    n, m = shape
    queries = spread_rows(n, d, 1, dtype)
    keys = queries if symmetric else spread_rows(m, d, 2, dtype)
    temperature, options = all_options(n, len(keys), 0.35) if full else (0.35, {})
    if symmetric and full:  # and one temperature, for which a gradient is of both roles at once
        temperature = 0.35
        options["query_ids"] = options["key_ids"] = torch.arange(n) // 2
    if full:
        options["carried_ids"] = (7 * torch.arange(n) + 3) % 37
    return Problem(queries, keys, temperature, SEED, STEP, incoming_state(n, 0.35), options)


def isir_with_gradients(
    problem: Problem, weights: Tensor | None, backend: str
) -> tuple[emc2.ISIRResult, list[Tensor | None]]:
    """A step, and as ``isir_gradients``, by the library; without ``weights`` no gradients."""
    if weights is None:
        return emc2.isir_step(
            problem.queries, problem.keys, problem.state, temperature=problem.temperature, seed=problem.seed,
            step=problem.step, backend=backend, **problem.options,
        ), []  # fmt: skip
    symmetric, per_row = problem.keys is problem.queries, isinstance(problem.temperature, Tensor)
    queries = problem.queries.clone().requires_grad_()
    keys = queries if symmetric else problem.keys.clone().requires_grad_()
    temperature = problem.temperature.clone().requires_grad_() if per_row else problem.temperature
    state = problem.state._replace(score=problem.state.score.clone().requires_grad_())
    seed, step = (number_tensor(number, weights.device) for number in (problem.seed, problem.step))
    options = dict(problem.options)
    if symmetric:
        options["key_ids"] = options["query_ids"]  # one tensor still, after its way to the device
    result = emc2.isir_step(
        queries, keys, state, temperature=temperature, seed=seed, step=step, backend=backend, **options
    )
    (result.lse * weights).sum().backward()
    result = result._replace(lse=result.lse.detach())
    d_keys, d_temperature = None if symmetric else keys.grad, temperature.grad if per_row else None
    return result, [queries.grad, d_keys, d_temperature, state.score.grad]


def judge_isir_gradients(
    name: str, problem: Problem, weights: Tensor | None, found: tuple[emc2.ISIRResult, list[Tensor | None]]
) -> list[Case]:
    """Of a state's score, the gradient is its share of the sum."""
    result, of_lse = found
    cases = judge_isir(name, problem, result)
    if weights is None:
        return cases
    *expected, d_score = isir_gradients(problem, weights)
    (_, d), m = problem.queries.shape, problem.keys.shape[0]
    temperature = problem.temperature.double() if isinstance(problem.temperature, Tensor) else problem.temperature
    allowed = weights.double().abs() * lse_error(d, temperature, m)
    cases += compare_gradients(name, problem, of_lse[:3], expected)
    return [*cases, compare(f"{name} d_score", of_lse[3], d_score.nan_to_num(0.0), allowed)]


def graphs(context: Context, backend: str) -> Iterator[Trial]:
    """Replays of a captured step whose seed and step lie on the device, against eager calls with numbers."""
    for kind, shape in {"sweep": (64, 32), "uniform": (64, 300, 40)}.items():
        problem = move_problem(walk_problem(shape, 128, torch.bfloat16, 0.35, kind, True), context.device)

        yield Trial(
            f"{kind} in a graph", partial(replay_pairs, problem, backend, context), partial(judge_replays, kind)
        )


def judge_replays(kind: str, pairs: list[tuple[tuple[Tensor, ...], ...]]) -> list[Case]:
    """Bits of every output of every replay."""
    fields = [pair for replayed, eager in pairs for pair in zip(replayed, eager, strict=True)]
    return merge_cases([compare_exactly(f"{kind} replays", *pair) for pair in fields])


def replay_pairs(problem: Problem, backend: str, context: Context) -> list[tuple[tuple[Tensor, ...], ...]]:
    """(replayed, eager) for two steps, each (samples, key, score, threshold)."""
    seed, step = (number_tensor(number, context.device) for number in (problem.seed, 0))

    def tensors(**numbers: object) -> tuple[Tensor, ...]:
        result = run_step(problem, backend, **numbers)
        return result.samples, *result.state, result.threshold

    replay = capture(lambda: tensors(seed=seed, step=step), context)
    out = []
    for number in (3, STEP):
        step.fill_(number)
        out.append((replay(), tensors(step=number)))
    return out


def by_address(context: Context, backend: str) -> Iterator[Trial]:
    """Calls made twice: Triton launches a binary the first time, and we do the second time, by addresses; the same
    bits. Of kernels that the other families call once."""
    options = {"d": 128, "dtype": torch.bfloat16}
    for name, trials in {
        "walk": walk_variants(
            context,
            backend,
            each=({"shapes": (FEW_ROWS,)}, {"shapes": (GATHERED_SPLIT,), "kind": "uniform"}),
            **options,
        ),
        "draw": gumbels(context, backend, num_samples=1, full=False),
        "lse": lses(context, backend, **options),
        "i-SIR": isirs(context, backend, full=False, **options),
    }.items():
        for trial in trials:
            yield Trial(f"{name} {trial.name}", partial(call_twice, trial.call), partial(judge_again, name, trial.name))


def call_twice(call: Callable[[], object]) -> list[list[Tensor]]:
    """The tensors of both results."""
    return [[leaf for leaf in tree_leaves(call()) if isinstance(leaf, Tensor)] for _ in range(2)]


def judge_again(kind: str, name: str, found: list[list[Tensor]]) -> list[Case]:
    """All of a call's tensors as one case."""
    return merge_cases([compare_exactly(f"{kind} {name} again", *pair) for pair in zip(*found, strict=True)])


def logarithms(context: Context, backend: str) -> Iterator[Trial]:
    """lg2.approx as the walks use it, on all 2^23 values of u: the error of E = -ln u, and where it misbehaves."""
    count = context.choose((1 << 23,), (1 << 12,))[0]
    stride = (1 << 23) // count

    def call() -> tuple[Tensor, Tensor]:
        raw = torch.empty(count, device=context.device)
        clamped = torch.empty_like(raw)
        if backend == "triton":
            from bench.gpu.log2 import fill_log2  # Triton must not be imported where it is not used

            fill_log2(raw, clamped, stride)
        else:
            raw.copy_(uniforms(count, stride, context.device).float().log2())
            clamped.copy_(raw.clamp_max(0))
        return raw, clamped

    def judge(found: tuple[Tensor, Tensor]) -> list[Case]:
        raw, clamped = found
        u = uniforms(count, stride, context.device)
        shape = describe_draws(raw.double() * -LN_2, u)
        cases = [judge_draws("log2 -> E", raw, u, shape), judge_draws("clamped -> E", clamped, u, {})]
        return [*cases, compare_exactly("clamped is min(log2, 0)", clamped, raw.clamp_max(0))]

    yield Trial("log2", call, judge)


def uniforms(count: int, stride: int, device: torch.device) -> Tensor:
    """(count,) float64: u = (k + 1/2) * 2^-23 of every ``stride``-th k."""
    return (torch.arange(count, device=device).double() * stride + 0.5) * 2.0**-23


def judge_draws(name: str, log2: Tensor, u: Tensor, notes: dict) -> Case:
    """E = -ln 2 * log2 in float64, so that the logarithm's error alone is left: 2^-22, or 2^-22 of it if larger."""
    e = -u.log()
    return compare(name, log2.double() * -LN_2, e, 2.0**-22 * e.clamp_min(LN_2), notes)


def describe_draws(e: Tensor, u: Tensor) -> dict[str, float]:
    """Of E (k,) at ascending u: how often it is below 0 (a threshold below its score) and how often it rises."""
    rises = e.diff()
    below = e < 0
    return {
        "below_zero": int(below.sum()),
        "least": float(e.min()),
        "least_u_below_zero": float(u[below].min()) if bool(below.any()) else 1.0,
        "rises": int((rises > 0).sum()),
        "largest_rise": float(rises.max().clamp_min(0)),
    }


def kernel_draws(context: Context, backend: str) -> Iterator[Trial]:
    """E as a walk has it, clamped at 0, for every value of u: thresholds over scores of 0, of chains that draw it."""
    chain, word, k = find_draws(context)

    def call() -> Tensor:
        e = torch.empty(len(chain), device=context.device)
        for number in range(4):
            ids = chain[word == number]
            zeros = torch.zeros(1, 8, device=context.device)
            transition = emc2.mh_transition(
                zeros.expand(len(ids), 8), zeros, temperature=1.0, seed=SEED, step=STEP, chain_ids=ids,
                first_proposal=number, backend=backend,
            )  # fmt: skip
            e[word == number] = transition.threshold[:, 0]
        return e

    def judge(e: Tensor) -> list[Case]:
        u = (k.double() + 0.5) * 2.0**-23
        expected = -u.log()
        allowed = 2.0**-22 * expected.clamp_min(LN_2) + 2.0**-24 * expected  # and E is rounded
        notes = describe_draws(e, u) | {"zeros": int((e == 0).sum()), "values_of_u": len(e)}
        clamped = compare("E is at least 0", e.clamp_max(0), torch.zeros_like(u), 2.0**-60)
        return [compare("E in a walk", e, expected, allowed, notes), clamped]

    yield Trial("every draw", call, judge)


def find_draws(context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """For k = 0 .. 2^23 - 1 a chain (k,) and a word 0 .. 3 of its block 0 with word >> 9 = k, and k: those found.

    4 * 2^20 words a round: after 48, 24 times as many as values, one of them is missing with probability 3e-4.
    """
    chains_a_round, rounds = context.choose((1 << 20, 48), (1 << 10, 2))
    owner = torch.full((1 << 23,), -1, device=context.device)
    for first in range(0, rounds * chains_a_round, chains_a_round):
        chains = torch.arange(first, first + chains_a_round, device=context.device)
        block = torch.zeros_like(chains)
        drawn = rng.words(chains, block, stream=rng.ACCEPTANCE, seed=SEED, step=STEP) >> 9
        owner[drawn.flatten()] = (chains[:, None] * 4 + torch.arange(4, device=context.device)).flatten()
        if bool((owner >= 0).all()):
            break
    k = (owner >= 0).nonzero()[:, 0]
    return owner[k] // 4, owner[k] % 4, k
