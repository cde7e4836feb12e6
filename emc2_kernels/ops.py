"""The walk's operators as torch sees them: plain tensors in and out, registered with ``torch.library``.

The backend is chosen inside the operator, so that nothing is built while a graph is traced. ``seed`` and ``step`` come
as integers or, with the integer ignored, as 0-d tensors; so does ``temperature``, as a number or one value per row.

A call through torch's dispatcher is a notable share of a step at batch 32 (docs/decisions.md has the figures). Where
the dispatcher has nothing to do, the functions below go round it.
"""

from __future__ import annotations

from collections.abc import Callable

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

_SIGN_BIT, _TWO_64 = 1 << 63, 1 << 64


def integer_or_tensor(value: int | Tensor) -> tuple[int, Tensor | None]:
    """A seed or a step as the operators take it; an unsigned 64-bit seed travels as the int64 with its bits."""
    if isinstance(value, Tensor):
        return 0, value
    return (value - _TWO_64 if value >= _SIGN_BIT else value), None


def detached(value: Tensor | None) -> Tensor | None:
    return value.detach() if value is not None and value.requires_grad else value


def _walk(arguments: tuple) -> Walk:
    """The first 18 arguments of an operator, numbers and tensors merged."""
    queries, keys, temperature, temperatures, seed, seed_tensor, step, step_tensor = arguments[:8]
    return Walk(
        queries,
        keys,
        temperature if temperatures is None else temperatures,
        seed if seed_tensor is None else seed_tensor,
        step if step_tensor is None else step_tensor,
        *arguments[8:18],
    )


def _mh_step(*arguments):
    walk = _walk(arguments)
    return resolve(arguments[-1], walk.queries, walk).step(walk, *arguments[18:-1])


def _mh_transition(*arguments):
    walk = _walk(arguments)
    return resolve(arguments[-1], walk.queries, walk).transition(walk)


def _view_coin(items, seed, seed_tensor, step, step_tensor, backend):
    chosen = resolve(backend, items)
    return chosen.view_coin(
        items, seed if seed_tensor is None else seed_tensor, step if step_tensor is None else step_tensor
    )


def nothing_to_dispatch(operand: Tensor) -> bool:
    """Whether torch would only pass the call on: no graph being traced, no mode, transform, subclass or profiler."""
    return not (
        torch.compiler.is_compiling()
        or type(operand) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def registered(name: str, implementation: Callable, *, differentiable: bool = False) -> Callable:
    """The operator as a function that goes round the dispatcher where it can. It is called with tensors that torch need
    not differentiate.

    Args:
        differentiable: its gradient is registered elsewhere. Else results never have one, whatever the arguments have.
    """
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.emc2_kernels, name).default

    def without_gradient(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    if not differentiable:
        LIBRARY.impl(name, without_gradient, "Autograd")

    def call(*arguments):
        return (implementation if nothing_to_dispatch(arguments[0]) else operator)(*arguments)

    return call


mh_step = registered("mh_step", _mh_step)
mh_transition = registered("mh_transition", _mh_transition)
view_coin = registered("view_coin", _view_coin)


def _score_dtype(queries: Tensor) -> torch.dtype:
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


@torch.library.register_fake("emc2_kernels::mh_step", lib=LIBRARY)
def _mh_step_fake(*arguments):
    walk, (return_accepts, return_lse) = _walk(arguments), arguments[-3:-1]
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
    walk = _walk(arguments)
    shape, dtype = (walk.queries.shape[0], walk.num_samples), _score_dtype(walk.queries)
    new = walk.queries.new_empty
    return new(shape, dtype=dtype), new(shape, dtype=dtype), new(shape, dtype=torch.int64)


@torch.library.register_fake("emc2_kernels::view_coin", lib=LIBRARY)
def _view_coin_fake(items, seed, seed_tensor, step, step_tensor, backend):
    return torch.empty_like(items)
