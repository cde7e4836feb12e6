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

from . import checks
from .backends import resolve
from .backends.params import WalkParams

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
LIBRARY.define("labels_of(Tensor position, Tensor key_labels) -> Tensor")
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


def _walk(arguments: tuple) -> WalkParams:
    """The first 18 arguments of an operator, numbers and tensors merged."""
    queries, keys, temperature, temperatures, seed, seed_tensor, step, step_tensor = arguments[:8]
    return WalkParams(
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


def _check_mh_step(*arguments):
    walk, (key, score, key_labels) = _walk(arguments), arguments[18:21]
    walk.check_shapes()
    checks.state((key, score), walk.queries)
    if key_labels is not None:
        checks.vector("key_labels", key_labels, walk.keys.shape[0], torch.int64, walk.queries.device)
    if arguments[-2] and not walk.is_sweep:  # whose log-sum-exp nothing would write
        raise ValueError("return_lse must be False without a sweep, which sees every key, got True")


def _mh_transition(*arguments):
    walk = _walk(arguments)
    return resolve(arguments[-1], walk.queries, walk).transition(walk)


def _check_mh_transition(*arguments):
    _walk(arguments).check_shapes()


def _view_coin(items, seed, seed_tensor, step, step_tensor, backend):
    chosen = resolve(backend, items)
    return chosen.view_coin(
        items, seed if seed_tensor is None else seed_tensor, step if step_tensor is None else step_tensor
    )


def _check_view_coin(items, *_):
    checks.vector("items", items, None, torch.int64, items.device)


def _labels_of(position, key_labels):
    """(n,) int64 labels at positions (n,), 0 .. m - 1; where a position is -1 the label means nothing."""
    checks.within("transition.position, a position in key_labels,", position, -1, key_labels.shape[0], on_gpu=True)
    return key_labels[position.clamp_min(0)] if key_labels.numel() else position.clone()


def _check_labels_of(position, key_labels):
    checks.vector("transition.position", position, None, torch.int64, key_labels.device)
    checks.vector("key_labels", key_labels, None, torch.int64, key_labels.device)


_PLAIN = frozenset((Tensor, int, float, bool, str, type(None)))


def nothing_to_dispatch(arguments: tuple) -> bool:
    """Whether torch would only pass the call on: no graph being traced, no mode, transform, subclass or profiler, and
    every tensor has memory with its values in it, which those of "meta" and views with the negative bit have not."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for x in arguments:
        kind = type(x)
        if kind is Tensor:
            if x.is_neg():
                return False
        elif kind not in _PLAIN:
            return False
    return not arguments[0].is_meta


def registered(
    name: str, implementation: Callable, check: Callable[..., None], *, differentiable: bool = False
) -> Callable:
    """The operator as a function that goes round the dispatcher where it can. It is called with arguments that have
    been checked, and with tensors that torch need not differentiate.

    Args:
        check: of the same arguments, shapes and dtypes, where it is not known who calls: what has another would read
            foreign memory.
        differentiable: its gradient is registered elsewhere. Else results never have one, whatever the arguments have.
    """

    def dispatched(*arguments):
        # A subclass that keeps its values as torch does: what looks at them asks for torch's own.
        plain = [x.as_subclass(Tensor) if isinstance(x, Tensor) and type(x) is not Tensor else x for x in arguments]
        check(*plain)
        return implementation(*plain)

    LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.emc2_kernels, name).default

    def without_gradient(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    if not differentiable:
        LIBRARY.impl(name, without_gradient, "Autograd")

    def call(*arguments):
        return (implementation if nothing_to_dispatch(arguments) else operator)(*arguments)

    return call


mh_step = registered("mh_step", _mh_step, _check_mh_step)
mh_transition = registered("mh_transition", _mh_transition, _check_mh_transition)
view_coin = registered("view_coin", _view_coin, _check_view_coin)
labels_of = registered("labels_of", _labels_of, _check_labels_of)


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


@torch.library.register_fake("emc2_kernels::labels_of", lib=LIBRARY)
def _labels_of_fake(position, key_labels):
    return torch.empty_like(position)
