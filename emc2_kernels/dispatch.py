"""Functions as operators of torch: registered with ``torch.library`` by their signature, called past the dispatcher
where it has nothing to do.

A call through torch's dispatcher is a notable share of a step at batch 32 (figures: docs/development/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

LIBRARY = torch.library.Library("emc2_kernels", "DEF")

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", int | None: "SymInt?", float: "float", bool: "bool",
    str: "str", list[Tensor]: "Tensor[]",
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
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    return _all_plain(arguments)


def _all_plain(arguments: tuple) -> bool:
    for x in arguments:
        kind = type(x)
        if kind is Tensor:
            if x.is_neg() or x.is_meta:
                return False
        elif kind not in _PLAIN and not (isinstance(x, tuple) and _all_plain(x)):
            return False
    return True


class Argument(NamedTuple):
    """One of a function's, or a field of one that is a NamedTuple: what it is in an operator's schema."""

    name: str
    kind: type | None  # a NamedTuple
    fields: tuple[Argument, ...]  # of it
    schema: tuple[str, ...]  # of what is none
    number: int | float | None  # that stands beside a tensor, of what is either

    @classmethod
    def of(cls, name: str, hint: Any) -> Argument:
        if isinstance(hint, type) and issubclass(hint, tuple):
            return cls(name, hint, tuple(cls.of(*field) for field in get_type_hints(hint).items()), (), None)
        if hint in _NUMBERS:
            kind, number = _NUMBERS[hint]
            return cls(name, None, (), (f"{kind} {name}", f"Tensor? {name}_tensor"), number)
        return cls(name, None, (), (f"{_SCHEMA_TYPES[hint]} {name}",), None)

    def schemas(self) -> list[str]:
        return [text for field in self.fields for text in field.schemas()] + list(self.schema)

    def flatten(self, value: Any, flat: list[Any]) -> None:
        """Adds it as the operator's arguments. An unsigned 64-bit seed travels as the int64 with its bits."""
        if self.kind is not None:
            for field, own in zip(self.fields, value, strict=True):
                field.flatten(own, flat)
        elif self.number is None:
            flat.append(value)
        elif isinstance(value, Tensor):
            # Literals: an attribute would be a symbol to Dynamo, of a graph that it may not be in.
            flat.extend((0, value) if self.number == 0 else (1.0, value))
        else:
            flat.extend((value - _TWO_64 if self.number == 0 and value >= _SIGN_BIT else value, None))

    def unflatten(self, flat: Iterator[Any]) -> Any:
        """What the next of the operator's arguments are."""
        if self.kind is not None:
            return self.kind(*(field.unflatten(flat) for field in self.fields))
        value = next(flat)
        if self.number is None:
            return value
        tensor = next(flat)
        return value if tensor is None else tensor


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
        hints = get_type_hints(function)
        self.arguments = tuple(Argument.of(*hint) for hint in hints.items() if hint[0] != "return")
        name = function.__name__
        self.name = f"emc2_kernels::{name}"
        schema = ", ".join(text for argument in self.arguments for text in argument.schemas())
        LIBRARY.define(f"{name}({schema}) -> {returns}")

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

    def flatten(self, values: tuple) -> list[Any]:
        flat: list[Any] = []
        for argument, value in zip(self.arguments, values, strict=True):
            argument.flatten(value, flat)
        return flat

    def unflatten(self, flat: list[Any] | tuple) -> list[Any]:
        rest = iter(flat)
        return [argument.unflatten(rest) for argument in self.arguments]

    def __call__(self, *arguments: Any) -> Any:
        if nothing_to_dispatch(arguments):
            return self.function(*arguments)
        return self.overload(*self.flatten(arguments))


def operator(
    returns: str, *, check: Callable[..., None], fake: Callable[..., Any], differentiable: bool = False
) -> Callable[[Callable], Operator]:
    """Makes a function an ``Operator`` of its name."""
    return lambda function: Operator(function, returns, check, fake, differentiable)
