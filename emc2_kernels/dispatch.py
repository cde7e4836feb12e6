"""Functions as operators of torch: registered with ``torch.library`` by their signature, called past the dispatcher
where it has nothing to do.

A call through torch's dispatcher is a notable share of a step at batch 32 (docs/decisions.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import torch
from torch import Tensor

LIBRARY = torch.library.Library("emc2_kernels", "DEF")

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", int | None: "SymInt?", float: "float", bool: "bool",
    str: "str",
}  # fmt: skip
# What is a number or a tensor is two arguments of an operator: where there is a tensor, the number means nothing.
_NUMBERS = {int | Tensor: ("SymInt", 0), float | Tensor: ("float", 1.0)}
_SIGN_BIT, _TWO_64 = 1 << 63, 1 << 64
_PLAIN = frozenset((Tensor, int, float, bool, str, type(None)))


def detached(value: Tensor | None) -> Tensor | None:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def nothing_to_dispatch(arguments: tuple) -> bool:
    """Whether torch would only pass the call on: no graph being traced, no mode, transform, subclass or profiler, and
    every tensor has memory with its values in it, which those of "meta" and views with the negative bit have not."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    ) and _all_plain(arguments)


def _all_plain(arguments: tuple) -> bool:
    for x in arguments:
        kind = type(x)
        if kind is Tensor:
            if x.is_neg() or x.is_meta:
                return False
        elif kind not in _PLAIN and not (isinstance(x, tuple) and _all_plain(x)):
            return False
    return True


def _is_params(hint: Any) -> bool:
    """Whether it is a NamedTuple, whose fields are arguments each."""
    return isinstance(hint, type) and issubclass(hint, tuple)


def schema_of(name: str, hint: Any) -> Iterator[str]:
    """The arguments of an operator's schema that an argument of a function with this type is."""
    if _is_params(hint):
        for field, field_hint in get_type_hints(hint).items():
            yield from schema_of(field, field_hint)
    elif hint in _NUMBERS:
        yield from (f"{_NUMBERS[hint][0]} {name}", f"Tensor? {name}_tensor")
    else:
        yield f"{_SCHEMA_TYPES[hint]} {name}"


def flatten(value: Any, hint: Any) -> Iterator[Any]:
    """An argument as those of the schema. An unsigned 64-bit seed travels as the int64 with its bits."""
    if _is_params(hint):
        for field, field_hint in zip(value, get_type_hints(hint).values(), strict=True):
            yield from flatten(field, field_hint)
    elif hint not in _NUMBERS:
        yield value
    elif isinstance(value, Tensor):
        yield from (_NUMBERS[hint][1], value)
    else:
        yield from (value - _TWO_64 if hint == int | Tensor and value >= _SIGN_BIT else value, None)


def unflatten(flat: Iterator[Any], hint: Any) -> Any:
    """The argument that the next of the schema's are."""
    if _is_params(hint):
        return hint(*(unflatten(flat, field_hint) for field_hint in get_type_hints(hint).values()))
    value = next(flat)
    if hint in _NUMBERS:
        tensor = next(flat)
        return value if tensor is None else tensor
    return value


class Operator:
    """A function that torch sees as one step. It is called with arguments that have been checked, and with tensors that
    torch need not differentiate.

    Args:
        function: its parameters have types that schemas have, NamedTuples of such, or a number or a tensor.
        returns: of the schema.
        check: of the same arguments, shapes and dtypes, where it is not known who calls: what has another would read
            foreign memory.
        fake: of the same arguments, empty results for a graph being traced.
        differentiable: its gradient is registered elsewhere. Else results never have one, whatever the arguments have.
    """

    def __init__(
        self,
        function: Callable,
        returns: str,
        check: Callable[..., None],
        fake: Callable[..., Any],
        differentiable: bool,
    ) -> None:
        self.function, self.__doc__ = function, function.__doc__
        self.hints = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
        name = function.__name__
        self.name = f"emc2_kernels::{name}"
        arguments = ", ".join(text for argument in self.hints.items() for text in schema_of(*argument))
        LIBRARY.define(f"{name}({arguments}) -> {returns}")

        def dispatched(*flat: Any) -> Any:
            # A subclass that keeps its values as torch does: what looks at them asks for torch's own.
            plain = [x.as_subclass(Tensor) if isinstance(x, Tensor) and type(x) is not Tensor else x for x in flat]
            arguments = self.unflatten(plain)
            check(*arguments)
            return function(*arguments)

        LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
        torch.library.register_fake(self.name, lambda *flat: fake(*self.unflatten(flat)), lib=LIBRARY)
        self.overload = getattr(torch.ops.emc2_kernels, name).default

        def without_gradient(*flat: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*flat)

        if not differentiable:
            LIBRARY.impl(name, without_gradient, "Autograd")

    def flatten(self, arguments: tuple) -> list[Any]:
        return [x for value, hint in zip(arguments, self.hints.values(), strict=True) for x in flatten(value, hint)]

    def unflatten(self, flat: list[Any] | tuple) -> list[Any]:
        rest = iter(flat)
        return [unflatten(rest, hint) for hint in self.hints.values()]

    def __call__(self, *arguments: Any) -> Any:
        if nothing_to_dispatch(arguments):
            return self.function(*arguments)
        return self.overload(*self.flatten(arguments))


def operator(
    returns: str, *, check: Callable[..., None], fake: Callable[..., Any], differentiable: bool = False
) -> Callable[[Callable], Operator]:
    """Makes a function an ``Operator`` of its name."""
    return lambda function: Operator(function, returns, check, fake, differentiable)
