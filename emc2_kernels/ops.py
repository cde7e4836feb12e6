"""The operators as torch sees them: plain tensors in and out, the backend chosen inside, so that nothing is built while
a graph is traced. Arguments have been checked and are not looked at again, but where a call comes through torch.

The public functions (mh.py, lse.py, gumbel.py) check theirs and come here; losses, whose arguments are made of what
they have checked themselves, come here at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .backends import resolve
from .backends.params import CarriedParams, DrawParams, ScoreParams, WalkParams, score_dtype
from .dispatch import operator


def _check_mh_step(
    walk: WalkParams, key: Tensor, score: Tensor, key_labels: Tensor | None, _: bool, return_lse: bool, __: str
) -> None:
    walk.check_shapes()
    checks.state((key, score), walk.queries)
    if key_labels is not None:
        checks.vector("key_labels", key_labels, walk.keys.shape[0], torch.int64, walk.queries.device)
    if return_lse and not walk.is_sweep:  # whose log-sum-exp nothing would write
        raise ValueError("return_lse must be False without a sweep, which sees every key, got True")


def _fake_mh_step(
    walk: WalkParams, _key: Tensor, _score: Tensor, _: Tensor | None, return_accepts: bool, return_lse: bool, __: str
) -> list[Tensor]:
    n, floats, new = walk.queries.shape[0], score_dtype(walk.queries), walk.queries.new_empty
    results = [new(n, walk.num_samples, dtype=torch.int32), new(n, dtype=torch.int64)]
    results += [new(n, dtype=floats) for _ in range(2)]
    accepted, lse = [new(n, dtype=torch.int32)] * return_accepts, [new(n, dtype=floats)] * return_lse
    return results + accepted + lse


@operator("Tensor[]", check=_check_mh_step, fake=_fake_mh_step)
def mh_step(
    walk: WalkParams,
    state_key: Tensor,
    state_score: Tensor,
    key_labels: Tensor | None,
    return_accepts: bool,
    return_lse: bool,
    backend: str,
) -> list[Tensor]:
    """[samples, key, score, threshold], then accepted and lse if asked for."""
    chosen = resolve(backend, walk.queries, walk, more_results=return_accepts or return_lse)
    return chosen.step(walk, state_key, state_score, key_labels, return_accepts, return_lse)


def _fake_mh_transition(walk: WalkParams, _: str) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype, new = (walk.queries.shape[0], walk.num_samples), score_dtype(walk.queries), walk.queries.new_empty
    return new(shape, dtype=dtype), new(shape, dtype=dtype), new(shape, dtype=torch.int64)


@operator(
    "(Tensor threshold, Tensor score, Tensor position)",
    check=lambda walk, _: walk.check_shapes(),
    fake=_fake_mh_transition,
)
def mh_transition(walk: WalkParams, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return resolve(backend, walk.queries, walk).transition(walk)


@operator(
    "Tensor",
    check=lambda items, *_: checks.vector("items", items, None, torch.int64, items.device),
    fake=lambda items, *_: torch.empty_like(items),
)
def view_coin(items: Tensor, seed: int | Tensor, step: int | Tensor, backend: str) -> Tensor:
    """(b,) int64 of 0 and 1: which of an item's views is proposed at this step."""
    return resolve(backend, items).view_coin(items, seed, step)


def _fake_lse(scores: ScoreParams, _: str) -> Tensor:
    return scores.queries.new_empty(scores.queries.shape[0], dtype=score_dtype(scores.queries))


@operator("Tensor", check=lambda scores, _: scores.check(), fake=_fake_lse, differentiable=True)
def contrastive_lse(scores: ScoreParams, backend: str) -> Tensor:
    """(n,) of operands that nothing is differentiated through; lse.py has the gradient."""
    return resolve(backend, scores.queries, op="lse").contrastive_lse(scores)


def _fake_lse_backward(
    scores: ScoreParams, _grad: Tensor, _lse: Tensor, keys_wanted: bool, _: str
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys = scores.queries, scores.keys
    rows = queries.shape[0] if isinstance(scores.temperature, Tensor) else 0
    d_keys = queries.new_empty(keys.shape if keys_wanted and not scores.symmetric else 0)
    return queries.new_empty(queries.shape), d_keys, queries.new_empty(rows, dtype=score_dtype(queries))


def _check_lse_backward(scores: ScoreParams, grad: Tensor, lse: Tensor, _keys_wanted: bool, _: str) -> None:
    scores.check()
    for name, value in (("grad", grad), ("lse", lse)):
        checks.vector(name, value, scores.queries.shape[0], score_dtype(scores.queries), scores.queries.device)


@operator("(Tensor queries, Tensor keys, Tensor temperatures)", check=_check_lse_backward, fake=_fake_lse_backward)
def contrastive_lse_backward(
    scores: ScoreParams, grad: Tensor, lse: Tensor, keys_wanted: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and the rows' temperatures, for grad (n,) of lse (n,). Without ``keys_wanted``, about
    half the work, the keys' is of shape (0,)."""
    return resolve(backend, scores.queries, op="lse").contrastive_lse_backward(grad, lse, scores, keys_wanted)


def _check_gumbel_sample(scores: ScoreParams, draw: DrawParams, _: str) -> None:
    scores.check_shapes()
    checks.chain_ids(scores.queries, scores.keys, draw.chain_ids, scores.query_ids, scores.key_ids)
    draw.check_num_samples()


@operator(
    "Tensor",
    check=_check_gumbel_sample,
    fake=lambda scores, draw, _: scores.queries.new_empty(scores.queries.shape[0], draw.num_samples, dtype=torch.int64),
)
def gumbel_sample(scores: ScoreParams, draw: DrawParams, backend: str) -> Tensor:
    """(n, R) int64 positions."""
    return resolve(backend, scores.queries, op="gumbel").gumbel_sample(scores, *draw)


def _check_isir_step(scores: ScoreParams, carried: CarriedParams, _: str) -> None:
    scores.check_shapes()
    carried.check_shapes(scores)


def _fake_isir_step(scores: ScoreParams, _: CarriedParams, __: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, new, dtype = scores.queries.shape[0], scores.queries.new_empty, score_dtype(scores.queries)
    integers, floats = [new(n, dtype=torch.int64) for _ in range(2)], [new(n, dtype=dtype) for _ in range(2)]
    return *integers, *floats, new(n, dtype=torch.float64)


@operator(
    "(Tensor position, Tensor key, Tensor score, Tensor lse, Tensor value)",
    check=_check_isir_step,
    fake=_fake_isir_step,
    differentiable=True,
)
def isir_step(
    scores: ScoreParams, carried: CarriedParams, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of operands that nothing is differentiated through; isir.py has the gradient of lse."""
    return resolve(backend, scores.queries, op="isir").isir_step(scores, carried)
