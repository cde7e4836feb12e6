"""The operators as torch sees them: plain tensors in and out, registered with ``torch.library``.

``Library.define`` and ``impl`` cost 8 us a call, ``custom_op`` several times that, and a step at batch 32 takes 40. The
backend is chosen inside the operator, so that nothing is built while a graph is traced. ``seed`` and ``step`` come as
integers or, with the integer ignored, as 0-d tensors; so does ``temperature``, as a number or one value per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import resolve
from .backends.walk import Walk

LIBRARY = torch.library.Library("emc2_kernels", "DEF")

_WALK = (
    "Tensor queries, Tensor keys, float temperature, Tensor? temperatures, SymInt seed, Tensor? seed_tensor, "
    "SymInt step, Tensor? step_tensor, Tensor? chain_ids, Tensor? query_ids, Tensor? key_ids, Tensor? positions, "
    "SymInt? num_draws, Tensor? log_proposal, SymInt burn_in, SymInt num_samples, SymInt first_proposal, "
    "SymInt total_proposals"
)
LIBRARY.define(
    f"mh_step({_WALK}, Tensor state_key, Tensor state_score, Tensor? key_labels, bool return_accepts, bool return_lse, "
    "str backend)"
    " -> Tensor[]"  # samples, key, score, threshold; then accepted, lse, if asked for
)
LIBRARY.define(f"mh_transition({_WALK}, str backend) -> (Tensor threshold, Tensor score, Tensor position)")
LIBRARY.define(
    "view_coin(Tensor items, SymInt seed, Tensor? seed_tensor, SymInt step, Tensor? step_tensor, str backend) -> Tensor"
)

MH_STEP = torch.ops.emc2_kernels.mh_step.default
MH_TRANSITION = torch.ops.emc2_kernels.mh_transition.default
VIEW_COIN = torch.ops.emc2_kernels.view_coin.default

_SIGN_BIT, _TWO_64 = 1 << 63, 1 << 64


def integer_or_tensor(value: int | Tensor) -> tuple[int, Tensor | None]:
    """A seed or a step as the operators take it; an unsigned 64-bit seed travels as the int64 with its bits."""
    if isinstance(value, Tensor):
        return 0, value
    return (value - _TWO_64 if value >= _SIGN_BIT else value), None


def _walk(
    queries, keys, temperature, temperatures, seed, seed_tensor, step, step_tensor, chain_ids, query_ids, key_ids,
    positions, num_draws, log_proposal, burn_in, num_samples, first_proposal, total_proposals,
) -> Walk:  # fmt: skip
    return Walk(
        queries,
        keys,
        temperature if temperatures is None else temperatures,
        seed if seed_tensor is None else seed_tensor,
        step if step_tensor is None else step_tensor,
        chain_ids,
        query_ids,
        key_ids,
        positions,
        num_draws,
        log_proposal,
        burn_in,
        num_samples,
        first_proposal,
        total_proposals,
    )


def _mh_step(*arguments):
    *walk, key, score, key_labels, return_accepts, return_lse, backend = arguments
    return resolve(backend, walk[0]).step(_walk(*walk), key, score, key_labels, return_accepts, return_lse)


def _mh_transition(*arguments):
    *walk, backend = arguments
    return resolve(backend, walk[0]).transition(_walk(*walk))


def _view_coin(items, seed, seed_tensor, step, step_tensor, backend):
    chosen = resolve(backend, items)
    return chosen.view_coin(
        items, seed if seed_tensor is None else seed_tensor, step if step_tensor is None else step_tensor
    )


for _name, _implementation in (("mh_step", _mh_step), ("mh_transition", _mh_transition), ("view_coin", _view_coin)):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


def _score_dtype(queries: Tensor) -> torch.dtype:
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


@torch.library.register_fake("emc2_kernels::mh_step", lib=LIBRARY)
def _mh_step_fake(*arguments):
    *walk, _, _, _, return_accepts, return_lse, _ = arguments
    walk = _walk(*walk)
    n, dtype = walk.queries.shape[0], _score_dtype(walk.queries)
    new = walk.queries.new_empty
    out = [
        new(n, walk.num_samples, dtype=torch.int32),
        new(n, dtype=torch.int64),
        new(n, dtype=dtype),
        new(n, dtype=dtype),
    ]
    if return_accepts:
        out.append(new(n, dtype=torch.int32))
    if return_lse:
        out.append(new(n, dtype=dtype))
    return out


@torch.library.register_fake("emc2_kernels::mh_transition", lib=LIBRARY)
def _mh_transition_fake(*arguments):
    walk = _walk(*arguments[:-1])
    shape, dtype = (walk.queries.shape[0], walk.num_samples), _score_dtype(walk.queries)
    new = walk.queries.new_empty
    return new(shape, dtype=dtype), new(shape, dtype=dtype), new(shape, dtype=torch.int64)


@torch.library.register_fake("emc2_kernels::view_coin", lib=LIBRARY)
def _view_coin_fake(items, seed, seed_tensor, step, step_tensor, backend):
    return torch.empty_like(items)
