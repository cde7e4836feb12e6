"""Errors that name the argument, what was expected, and what came.

Shapes, dtypes and devices are always checked, and Python numbers. Values in tensors are looked at on the CPU: at once
where they can be seen, and else, while a graph is traced or in a subclass, by an operator when it runs. On a GPU a look
would wait for the device, so the device looks.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .dispatch import operator as torch_operator

OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_CHAIN_ID = 2**40
MAX_POSITION = 2**31  # samples are int32
MAX_INTEGER = 2**63  # operators take int64
# Kernels multiply by the inverse of a temperature. At the first of these the scores of unit vectors, and of
# similarities up to some fifty, are finite float32 numbers; those that are not are left out, or make sums NaN. Well
# above the second the inverse is a denormal, which counts as zero, and a batch's temperatures do not add up.
MIN_TEMPERATURE, MAX_TEMPERATURE = 2.0**-120, 2.0**100


class _Short(reprlib.Repr):
    """A line or less of a value of any size: tensors by their shape, of containers the first entries."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxtuple, self.maxlist, self.maxdict, self.maxstring, self.maxother = 2, 3, 3, 3, 60, 60

    def repr1(self, value: Any, level: int) -> str:
        if isinstance(value, Tensor):
            return describe(value)
        if isinstance(value, Mapping):  # an encoder's output, say
            return self.repr_dict(value, level)
        if isinstance(value, tuple):
            return self.repr_tuple(value, level)
        return " ".join(super().repr1(value, level).split())


shown = _Short().repr


def describe(value: Any) -> str:
    """A value as an error message shows it."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{shown(value)} ({type(value).__name__})"


def tensor(name: str, value: Any) -> None:
    """A dense one: of others neither sizes nor memory can be asked for."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a tensor that is {kind}")


def values_visible(value: Tensor) -> bool:
    """Whether looking at a value costs nothing else: a real tensor (no fake one) on the CPU, outside compilation."""
    return value.is_cpu and type(value) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {describe(value)}") from None


def at_least(name: str, value: Any, lowest: int) -> int:
    number = integer(name, value)
    if number < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {number}")
    if number >= MAX_INTEGER:
        raise ValueError(f"{name} must be below 2^63, got {number}")
    return number


def number_in(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> float:
    """A finite number between two, which belong to it unless said otherwise."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    number = float(value)
    inside = low <= number <= high and not (open_low and number == low) and not (open_high and number == high)
    if not inside:
        brackets = "(["[not open_low] + f"{low}, {high}" + ")]"[not open_high]
        raise ValueError(f"{name} must be in {brackets}, got {shown(value)}")
    return number


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def operand_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in OPERAND_DTYPES or value.layout != torch.strided:
        layout = "" if value.layout == torch.strided else f"{value.layout} "
        expected = "a dense float32, bfloat16, float16 or float64 tensor"
        raise TypeError(f"{name} must be {expected}, got {layout}{describe(value)}")


def embedding_dtype(name: str, value: Any) -> None:
    if value not in OPERAND_DTYPES:
        raise TypeError(f"{name} must be torch.float32, bfloat16, float16 or float64, got {describe(value)}")


def matrix(name: str, value: Any) -> None:
    """A (rows, dim) floating-point tensor with unit last stride; rows may be any distance apart."""
    tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape (rows, dim), got {describe(value)}")
    operand_dtype(name, value)
    if value.stride(1) != 1 and value.shape[1] > 1 and value.shape[0] > 0:
        raise ValueError(f"{name} must have a last stride of 1, got strides {value.stride()}: call .contiguous() on it")


def operands(queries: Any, keys: Any) -> None:
    matrix("queries", queries)
    matrix("keys", keys)
    if keys.shape[1] != queries.shape[1]:
        raise ValueError(f"keys must have the dim of queries, {queries.shape[1]}, got {describe(keys)}")
    if keys.dtype != queries.dtype:
        raise TypeError(f"keys must have the dtype of queries, {queries.dtype}, got {describe(keys)}")
    if keys.device != queries.device:
        raise ValueError(f"keys must be on the device of queries, {queries.device}, got {describe(keys)}")
    if keys.shape[0] >= MAX_POSITION:
        raise ValueError(f"keys must have fewer than 2^31 rows, got {describe(keys)}")


def vector(name: str, value: Any, length: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """A 1-d tensor of ``length`` (None: any), dtype and device."""
    tensor(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {describe(value)}")
    if value.dim() != 1 or (length is not None and value.shape[0] != length):
        raise ValueError(f"{name} must have shape ({'m' if length is None else length},), got {describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {describe(value)}")


def within(
    name: str, value: Tensor, lowest: int, end: int, *, on_gpu: bool = False, before: Iterable[Tensor] = ()
) -> Tensor:
    """Returns ``value``, int64, every element of which is in lowest .. end - 1. Where it cannot be seen yet, what is
    returned is a copy that exists once somebody has looked: go on with that one.

    Args:
        on_gpu: where the values are a GPU's, let it look: a wrong value is then an error at the next synchronisation.
            For values that no kernel of ours checks.
        before: what is written to afterwards whatever ``value`` holds. See ``look_within``.
    """
    if value.numel() == 0:
        return value
    if values_visible(value):
        _refuse_outside(name, value, lowest, end)
    elif value.is_cpu:
        return look_within(value, name, lowest, end, list(before))
    elif on_gpu and value.is_cuda and not torch.compiler.is_compiling():
        every = ((value >= lowest) & (value < end)).all()
        torch._assert_async(every, f"{name} must hold values in [{lowest}, {end})")
    return value


def _refuse_outside(name: str, value: Tensor, lowest: int, end: int) -> None:
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < lowest or high >= end:
        place = ((value < lowest) | (value >= end)).nonzero()[0].tolist()
        raise ValueError(f"{name} must hold values in [{lowest}, {end}), got {int(value[*place])} at {place}")


def _check_look(value: Tensor, name: str, *_: Any) -> None:
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {describe(value)}")


@torch_operator("Tensor", check=_check_look, fake=lambda value, *_: torch.empty_like(value))
def look_within(value: Tensor, name: str, lowest: int, end: int, before: list[Tensor]) -> Tensor:
    """``within`` at the time when a graph runs. What reads or writes by the copy that is returned comes after the look,
    and a compiler cannot drop it.

    Args:
        before: tensors that are not looked at. Being read here, they are written to after the look, too: a compiler may
            move a write past what it does not depend on.

    Raises:
        ValueError: as ``within``.
    """
    if value.numel() > 0:
        _refuse_outside(name, value, lowest, end)
    return value.clone()


def finite(name: str, value: Tensor, *, or_inf: bool = False) -> None:
    if not (value.numel() and values_visible(value)) or math.isfinite(value.detach().sum()):
        return
    legal = torch.isfinite(value)
    if or_inf:
        legal |= value == torch.inf
    if not bool(legal.all()):  # else large values have summed up to infinity
        count, expected = int((~legal).sum()), "finite or +inf" if or_inf else "finite"
        raise ValueError(f"{name} must be {expected}, got {count} values that are infinite or NaN, of {value.numel()}")


def temperature(
    value: Any, rows: int, device: torch.device, least: float = MIN_TEMPERATURE, *, operator_looks: bool = False
) -> None:
    """A number, a 0-d tensor or a (rows,) tensor, from ``least`` to MAX_TEMPERATURE.

    Args:
        operator_looks: at rows that come to it as they are, and with this error.
    """
    if isinstance(value, Tensor):
        tensor("temperature", value)
        if not value.dtype.is_floating_point:
            raise TypeError(f"temperature must be a floating-point tensor, got {describe(value)}")
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != rows):
            raise ValueError(f"temperature must be a number or have shape () or ({rows},), got {describe(value)}")
        if value.device != device:
            raise ValueError(f"temperature must be on {device}, got {describe(value)}")
        left = operator_looks and value.dim() == 1 and value.dtype == torch.float32
        if value.numel() and not left and values_visible(value):
            low, high = (float(bound) for bound in torch.aminmax(value.detach()))
            if not least <= low <= high <= MAX_TEMPERATURE:
                raise ValueError(f"temperature must be {_range(least)}, got values from {low} to {high}")
        return
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"temperature must be a number or a tensor, got {describe(value)}")
    if not least <= value <= MAX_TEMPERATURE:
        raise ValueError(f"temperature must be {_range(least)}, got {shown(value)}")


def one_or_rows(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A checked temperature as the operators take it: a number, or one value for each row of ``like``, differentiable;
    float32, float64 where ``like`` is."""
    if not isinstance(value, Tensor):
        return float(value)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return value.to(dtype).expand(like.shape[0])


def row_temperatures(value: float | Tensor, like: Tensor) -> None:
    """What ``one_or_rows`` has made, as it comes to an operator; not its values."""
    if isinstance(value, Tensor):
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        vector("temperature", value, like.shape[0], dtype, like.device)
    else:
        temperature(value, like.shape[0], like.device)


def ids(queries: Tensor, keys: Tensor, query_ids: Any, key_ids: Any, carried_ids: Any = None) -> None:
    """Exclusion ids of rows and keys, int64; those of the keys may come alone."""
    for name, of_rows in (("query_ids", query_ids), ("carried_ids", carried_ids)):
        if of_rows is None:
            continue
        if key_ids is None:
            raise ValueError(f"{name} need key_ids to be compared with, got key_ids=None")
        vector(name, of_rows, queries.shape[0], torch.int64, queries.device)
    if key_ids is not None:
        vector("key_ids", key_ids, keys.shape[0], torch.int64, queries.device)


def chain_ids(
    queries: Tensor, keys: Tensor, given: Any, query_ids: Any, key_ids: Any, carried_ids: Any = None
) -> Tensor | None:
    """Checks exclusion ids too, but no values; returns the chain ids with their default. None stands for the row
    numbers."""
    ids(queries, keys, query_ids, key_ids, carried_ids)
    if given is not None:
        vector("chain_ids", given, queries.shape[0], torch.int64, queries.device)
    return query_ids if given is None else given


def one_temperature(value: Any, least: float = MIN_TEMPERATURE) -> float:
    """A number, or a 0-d tensor that is read once."""
    if isinstance(value, Tensor) and value.dim() > 0:
        raise ValueError(f"temperature must be one number, got {describe(value)}")
    temperature(value, 0, value.device if isinstance(value, Tensor) else torch.device("cpu"), least)
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def counter(name: str, value: Any, bits: int, device: torch.device | None) -> int | Tensor:
    """`seed` or `step`: an integer or a 0-d int64 tensor on the operands' device, in [0, 2^bits)."""
    if isinstance(value, Tensor):
        tensor(name, value)
        if value.dtype != torch.int64 or value.dim() != 0:
            raise TypeError(f"{name} must be an integer or a 0-d int64 tensor, got {describe(value)}")
        if value.device != device:
            raise ValueError(f"{name} must be on {device}, got {describe(value)}")
        # Every int64 is the bit pattern of a seed.
        if bits < 64 and values_visible(value) and not 0 <= int(value) < 2**bits:
            raise ValueError(f"{name} must be in [0, 2^{bits}), got {int(value)}")
        return value
    number = integer(name, value)
    if not 0 <= number < 2**bits:
        raise ValueError(f"{name} must be in [0, 2^{bits}), got {number}")
    return number


def transition(name: str, value: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A Transition, or three tensors in its order, which are returned."""
    try:
        threshold, score, position = value
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a Transition(threshold, score, position), got {describe(value)}") from None
    for field, entry in (("threshold", threshold), ("score", score), ("position", position)):
        tensor(f"{name}.{field}", entry)
        if entry.dim() != 2 or entry.shape != threshold.shape or entry.shape[1] == 0:
            raise ValueError(
                f"{name}.{field} must have the shape (n, R), R >= 1, of the other fields, got {describe(entry)}"
            )
        if entry.device != threshold.device:
            raise ValueError(f"{name}.{field} must be on {threshold.device}, as threshold is, got {describe(entry)}")
    if threshold.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}.threshold must be float32 or float64, got {describe(threshold)}")
    if score.dtype != threshold.dtype:
        raise TypeError(f"{name}.score must have the dtype of threshold, {threshold.dtype}, got {describe(score)}")
    if position.dtype != torch.int64:
        raise TypeError(f"{name}.position must be int64, got {describe(position)}")
    return threshold, score, position


def state(value: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """An MHState, or two tensors in its order, which are returned: n = len(like) chains on its device; scores are
    float32, or float64 where `like` is."""
    try:
        key, score = value
    except (TypeError, ValueError):
        raise TypeError(f"state must be an MHState(key, score), got {describe(value)}") from None
    vector("state.key", key, like.shape[0], torch.int64, like.device)
    wide = like.dtype == torch.float64 and isinstance(score, Tensor) and score.dtype == torch.float64
    vector("state.score", score, like.shape[0], torch.float64 if wide else torch.float32, like.device)
    return key, score


def _range(least: float) -> str:
    return f"in [{least:.3g}, {MAX_TEMPERATURE:.3g}], where float32 can divide by it"
