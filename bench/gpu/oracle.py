"""The formulas in float64 on the device where the kernels ran: what the smoke stage compares them with.

Nothing here is shared with the kernels but the random-number contract as plain torch, emc2_kernels.rng, which has tests
with known answers. Operands are widened, never rounded, so that a bound is the kernels' own rounding alone.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import emc2_kernels as emc2
from bench.gpu.trial import Case, compare, merge_cases
from emc2_kernels import rng

ROUNDING = 2.0**-24  # of float32
LATENT = 8  # dimensions in which operands differ: scores then spread by 1 / sqrt(8), whatever d is
ROWS_AT_ONCE = 4096  # of arrays that have several words an element


class Problem(NamedTuple):
    """One call of ``mh_step``, ``gumbel_sample``, ``contrastive_lse`` or ``isir_step``; all tensors on one device."""

    queries: Tensor  # (n, d)
    keys: Tensor  # (m, d)
    temperature: float | Tensor  # or (n,) float32
    seed: int
    step: int
    state: emc2.MHState | None = None
    options: dict[str, object] = {}  # ids, labels, log_proposal, proposal, schedule, as their arguments are named

    def column(self, values: float | Tensor) -> float | Tensor:
        """A number, or a value a row as (n, 1)."""
        return values[:, None] if isinstance(values, Tensor) else values


class Walked(NamedTuple):
    samples: Tensor  # (n, R) int64
    key: Tensor  # (n,) int64
    score: Tensor  # (n,) float64
    accepted: Tensor  # (n,) int64
    threshold: Tensor  # (n,) float64
    lse: Tensor  # (n,) float64 of the proposals' similarities / temperature
    closest_tie: Tensor  # (n,) float64  least |score + E - current score|


# Bounds.
#
# Operands are unit vectors whose products are exact in float32 or, for float32 operands, fused into the addition.
# A matrix unit adds d of them in blocks and truncates (Fasi et al., PeerJ CS 2021: blocks of 8, 9 truncations of at
# most 2^-24 of the largest term or so), others round d times by 2^-24 of a partial sum; partial sums are at most 1.
# So a product is off by d * 2^-24 at most, and a score by that over the temperature. 1 / temperature, the product with
# it and the subtraction of log g round once each, with values of at most 1 / temperature + 4: 3 * 2^-24 / temperature
# and 2^-22 hold them.


def score_error(d: int, temperature: float | Tensor) -> float | Tensor:
    """Of a float32 score; () or (n,) as the temperature is."""
    return (d + 3) * ROUNDING / temperature + 2.0**-22


def level_error(d: int, temperature: float | Tensor) -> float | Tensor:
    """Of a float32 score + E.

    lg2.approx is off by 2^-22 between 1/2 and 2 and by 2^-22 of itself elsewhere, and E is at most 16.64: 4.0e-6. E and
    the sum are rounded: 2^-24 * (2 * 16.64 + 1 / temperature) <= 2.0e-6 + 2^-24 / temperature.
    """
    return score_error(d, temperature) + ROUNDING / temperature + 6e-6


def lse_error(d: int, temperature: float | Tensor, m: int) -> float | Tensor:
    """Of a float32 log-sum-exp of m scores: their own error, and that of a sum of positive terms.

    The longest running sum that a kernel keeps has m / 8 terms, two roundings each. An exponential is off by 2^-22 for
    its instruction and a few roundings for its argument, and a new maximum multiplies by one more: 64 roundings.
    """
    return score_error(d, temperature) + (m / 4 + 64) * ROUNDING + 2.0**-23 * (1 / temperature + math.log(max(m, 2)))


def gradient_error(d: int, temperature: float, m: int, dtype: torch.dtype) -> float:
    """Of a row of a softmax's gradient, relative to its length.

    Each weight exp(s - lse) is off by the two errors in its exponent, and rounded to the operands' dtype before it is
    multiplied; the sum is rounded to that dtype, too. Terms have both signs and so have the errors, so the sum is off
    by the same share as its terms. float32 adds its own m + d roundings.
    """
    rounded = 2 * torch.finfo(dtype).eps / 2  # weight and result
    return rounded + score_error(d, temperature) + lse_error(d, temperature, m) + (m / 8 + d) * ROUNDING


def spread_rows(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, d) unit vectors on the CPU whose inner products spread by 1 / sqrt(LATENT): independent ones would by 1 /
    sqrt(d), and walk alike whatever their scores are. Made in float64, so that all machines round to the same ones."""
    basis = torch.randn(LATENT, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    rows = torch.randn(n, LATENT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ basis
    return torch.nn.functional.normalize(rows, dim=1).to(dtype)


def chain_ids(problem: Problem) -> Tensor:
    """(n,) int64: what names the rows' random streams."""
    named = [problem.options.get(name) for name in ("chain_ids", "query_ids")]
    rows = torch.arange(problem.queries.shape[0], device=problem.queries.device)
    return next((ids for ids in named if ids is not None), rows)


def proposed_keys(problem: Problem) -> Tensor:
    """(n, K) int64 rows of keys; K = m for a sweep."""
    (n, _), m = problem.queries.shape, problem.keys.shape[0]
    proposal = problem.options.get("proposal", "sweep")
    if isinstance(proposal, Tensor):
        return proposal
    if proposal == "sweep":
        return torch.arange(m, device=problem.keys.device).expand(n, m)
    numbers = range(problem.options["num_proposals"])
    return rng.proposal_positions(chain_ids(problem), numbers, m, seed=problem.seed, step=problem.step)


def similarities(problem: Problem) -> Tensor:
    """(n, m) float64: s_ij, -inf where key j is excluded for row i or the score is not finite."""
    dots = problem.queries.double() @ problem.keys.double().T
    scores = dots / problem.column(problem.temperature)
    counted = scores.isfinite()
    for name in ("query_ids", "carried_ids"):
        if problem.options.get(name) is not None:
            counted &= problem.options[name][:, None] != problem.options["key_ids"]
    return torch.where(counted, scores, -torch.inf)


def walk(problem: Problem) -> Walked:
    """The walk done literally, one proposal of all rows after another."""
    options, proposed = problem.options, proposed_keys(problem)
    value = similarities(problem)
    if isinstance(options.get("proposal"), Tensor) or options.get("proposal") == "uniform":
        value = value.gather(1, proposed)
    lse = torch.logsumexp(value, 1)
    if options.get("log_proposal") is not None:
        value = value - options["log_proposal"].double()[proposed]
    count = value.shape[1]
    draw = {"seed": problem.seed, "step": problem.step, "dtype": torch.float64}
    level = value + rng.acceptance(chain_ids(problem), range(count), **draw)

    started = problem.state.score > -torch.inf  # NaN has not
    start = torch.where(started, problem.state.score.double(), -torch.inf)
    proposals, score, accepted, tie = walk_columns(level, value, start, sample_points(problem, count))
    moved = proposals >= 0
    samples = torch.where(moved, proposed.gather(1, proposals.clamp_min(0)), -1)
    labels = options.get("key_labels", options.get("key_ids"))
    last = samples[:, -1].clamp_min(0)
    label = last if labels is None else labels[last]
    key = torch.where(moved[:, -1], label, torch.where(started, problem.state.key, -1))
    return Walked(samples, key, score, accepted, level.amax(1), lse, tie)


def sample_points(problem: Problem, count: int) -> list[int]:
    """The proposals after which samples are taken: burn_in + ceil((r + 1) * (M - burn_in) / R) - 1."""
    burn_in, num_samples = problem.options.get("burn_in", 0), problem.options.get("num_samples", 1)
    return [burn_in + math.ceil((r + 1) * (count - burn_in) / num_samples) - 1 for r in range(num_samples)]


def walk_columns(
    level: Tensor, value: Tensor, start: Tensor, points: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From scores ``start`` (n,), through thresholds and scores (n, K), -inf for what is not proposed.

    Returns:
        (n, R) int64 proposal at which the chain was after each of the points, -1: none; (n,) score at the end; (n,)
        number of accepts; (n,) closest tie.
    """
    levels, values = level.T.contiguous(), value.T.contiguous()
    current, at = start.clone(), torch.full_like(start, -1, dtype=torch.int64)
    accepted, tie = torch.zeros_like(at), torch.full_like(start, torch.inf)
    wanted, samples = set(points), []
    for p in range(levels.shape[0]):
        ahead = levels[p] - current  # NaN where neither is: fmin leaves it out, and it is not above 0
        tie = torch.fmin(tie, ahead.abs())
        moves = ahead > 0
        current, at = torch.where(moves, values[p], current), torch.where(moves, p, at)
        accepted = accepted + moves
        if p in wanted:
            samples.append(at)
    return torch.stack(samples, 1), current, accepted, tie


def judge_walk(name: str, problem: Problem, result: emc2.MHResult) -> list[Case]:
    """Samples, key, count and score in rows clear of ties; threshold and log-sum-exp, which have none, in all rows."""
    walked, d = walk(problem), problem.queries.shape[1]
    temperature = problem.temperature.double() if isinstance(problem.temperature, Tensor) else problem.temperature
    of_score, of_level = score_error(d, temperature), level_error(d, temperature)
    clear = walked.closest_tie > of_score + of_level
    wrong = (result.samples != walked.samples).any(1) | (result.state.key != walked.key)
    if result.num_accepted is not None:
        wrong |= result.num_accepted != walked.accepted
    found, expected = (torch.where(clear, score.double(), 0) for score in (result.state.score, walked.score))
    wrong |= (found != expected) & ~((found - expected).abs() <= of_score)
    score = compare("score", found, expected, of_score)
    chains = Case(
        f"{name} chains", len(clear), int(clear.sum()), int((clear & wrong).sum()), score.largest_error, score.bound
    )
    cases = [chains, compare(f"{name} threshold", result.threshold, walked.threshold, of_level)]
    if result.lse is not None:
        of_lse = lse_error(d, temperature, problem.keys.shape[0])
        cases.append(compare(f"{name} lse", result.lse, walked.lse, of_lse))
    return cases


def judge_gumbel(name: str, problem: Problem, num_samples: int, drawn: Tensor) -> list[Case]:
    """Drawn keys (n, R): by how much each drawn key lost to the best one, which rounding alone may have decided.

    A noise is off by 1e-5 of a power of two (philox.py), 7e-6, and the sum rounds values of at most 1 / temperature +
    23: 1.4e-6 and 2^-24 / temperature; two such sums are compared.
    """
    d, temperature = problem.queries.shape[1], problem.temperature
    error = 2 * (score_error(d, temperature) + ROUNDING / temperature + 1e-5)
    scores, chains = similarities(problem), chain_ids(problem)
    draw = {"seed": problem.seed, "step": problem.step, "dtype": torch.float64}
    cases = []
    for r in range(num_samples):
        for rows in torch.arange(len(chains), device=chains.device).split(ROWS_AT_ONCE):
            sums = scores[rows] + rng.gumbel(chains[rows], range(scores.shape[1]), sample=r, **draw)
            best, second = sums.topk(2).values.unbind(1)
            place = drawn[rows, r, None]
            legal = (place >= 0) & (place < sums.shape[1])
            own = torch.where(legal, sums.gather(1, torch.where(legal, place, 0)), -torch.inf)[:, 0]
            case = compare(f"{name} draws", own, best, error)
            case.compared = int(((best - second > error) | (best - own > error)).sum())
            cases.append(case)
    return merge_cases(cases)


def candidates(problem: Problem) -> Tensor:
    """(n, 1 + m) float64 scores of what a step of i-SIR draws from, the chain's own state first; -inf: none."""
    own = problem.state.score.double()
    scores = similarities(problem)
    if problem.options.get("log_proposal") is not None:
        scores = scores - problem.options["log_proposal"].double()
    return torch.cat((torch.where(own.isfinite(), own, -torch.inf)[:, None], scores), 1)


def judge_isir(name: str, problem: Problem, result: emc2.ISIRResult) -> list[Case]:
    """Position, key and score in rows clear of ties, as ``judge_gumbel`` has them; the sums in all rows."""
    (_, d), m = problem.queries.shape, problem.keys.shape[0]
    temperature = problem.temperature.double() if isinstance(problem.temperature, Tensor) else problem.temperature
    scores, chains = candidates(problem), chain_ids(problem)
    error = 2 * (score_error(d, temperature) + ROUNDING / temperature + 1e-5)
    # A key's score is its value less its noise, of at most 23: four roundings.
    of_score = score_error(d, temperature) + 4 * ROUNDING * (1 / temperature + 24)
    draw = {"seed": problem.seed, "step": problem.step, "dtype": torch.float64}
    best, column = [], []
    for rows in torch.arange(len(chains), device=chains.device).split(ROWS_AT_ONCE):
        own = rng.gumbel(chains[rows], range(1), stream=rng.CARRIED, **draw)
        two = (scores[rows] + torch.cat((own, rng.gumbel(chains[rows], range(m), **draw)), 1)).topk(2)
        best.append(two.values)
        column.append(two.indices[:, 0])
    (first, second), column = torch.cat(best).unbind(1), torch.cat(column)
    clear, position = first - second > error, column - 1  # of the chain's own: -1
    labels = problem.options.get("key_labels", problem.options.get("key_ids"))
    numbers = position.clamp_min(0)
    key = torch.where(position < 0, problem.state.key, numbers if labels is None else labels[numbers])
    wrong = (result.position != position) | (result.state.key != key)
    drawn = scores.gather(1, column[:, None])[:, 0]
    found, expected = (torch.where(clear, score.double(), 0) for score in (result.state.score, drawn))
    wrong |= (found - expected).abs() > of_score
    score = compare("score", found, expected, of_score)
    sizes = len(clear), int(clear.sum()), int((clear & wrong).sum())
    lse, of_lse = torch.logsumexp(scores, 1), lse_error(d, temperature, m)
    weight = torch.where(scores[:, 0] > -torch.inf, (scores[:, 0] - lse).exp(), 0)
    return [
        Case(f"{name} steps", *sizes, score.largest_error, score.bound),
        compare(f"{name} lse", result.lse, lse, of_lse),
        compare(f"{name} weight", result.carried_weight, weight, of_lse),
    ]


def lse_and_gradients(problem: Problem, weights: Tensor) -> list[Tensor | None]:
    """Log-sum-exp (n,) and, for ``weights`` (n,) on it, the gradients of queries, keys and temperatures, by autograd.

    Of queries that are the keys, one gradient, and None in the keys' place; None for a temperature that is a number.
    """
    problem, leaves = differentiable(problem)
    lse = torch.logsumexp(similarities(problem), 1)
    return [lse.detach(), *gradients(lse, weights, leaves)]


def isir_gradients(problem: Problem, weights: Tensor) -> list[Tensor | None]:
    """The same gradients of a step's log-sum-exp, and that of the states' scores (n,)."""
    problem, leaves = differentiable(problem)
    problem = problem._replace(state=problem.state._replace(score=problem.state.score.double().requires_grad_()))
    return gradients(torch.logsumexp(candidates(problem), 1), weights, [*leaves, problem.state.score])


def differentiable(problem: Problem) -> tuple[Problem, list[Tensor | None]]:
    """The problem in float64, and its queries, keys and temperatures as leaves; None as in ``lse_and_gradients``."""
    symmetric, per_row = problem.keys is problem.queries, isinstance(problem.temperature, Tensor)
    queries = problem.queries.double().requires_grad_()
    keys = queries if symmetric else problem.keys.double().requires_grad_()
    temperature = problem.temperature.double().requires_grad_() if per_row else problem.temperature
    leaves = [queries, None if symmetric else keys, temperature if per_row else None]
    return problem._replace(queries=queries, keys=keys, temperature=temperature), leaves


def gradients(values: Tensor, weights: Tensor, leaves: list[Tensor | None]) -> list[Tensor | None]:
    """Of the weighted sum of values (n,), in the leaves' places."""
    found = iter(torch.autograd.grad((values * weights.double()).sum(), [leaf for leaf in leaves if leaf is not None]))
    return [None if leaf is None else next(found) for leaf in leaves]
