"""What losses and stores keep of a data set: loaded whole or, where anything is wrong with a state, not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks

FINITE = (-math.nextafter(math.inf, 0), math.nextafter(math.inf, 0))
MAX_STEP = 2**32 - 1


class StrictState(nn.Module):
    """A module with counters for buffers, and perhaps tables (``SlotTable``), in ``state_dict``.

    A state is looked at before any of it is copied, together with that of the modules below. One that does not fit, or
    that no training can have left, is a RuntimeError that says all that is wrong, in a bigger module's
    ``load_state_dict`` as well; with ``strict=True`` of the module's own, so are missing and unexpected keys. (A bigger
    module looks for those when all has been loaded, as torch does.) Of a sharded store each rank looks at its part.

    Tensors that leave the meta device, as with ``to_empty``, are what they are in a new module.
    """

    saved_facts: ClassVar[tuple[str, ...]] = ()  # attributes that go into a state's metadata, and must be those of it

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, but all or nothing."""
        if strict and isinstance(state_dict, Mapping):
            expected = self.state_dict()
            names = {
                "Missing": [key for key in expected if key not in state_dict],
                "Unexpected": [key for key in state_dict if key not in expected],
            }
            self._refuse([f"{what} key(s) in state_dict: {', '.join(keys)}" for what, keys in names.items() if keys])
        return super().load_state_dict(state_dict, strict, assign)

    def _refuse(self, wrong: list[str]) -> None:
        if wrong:
            raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(self).__name__}:", *wrong]))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        of_module = getattr(destination, "_metadata", {}).get(prefix[:-1], {})
        of_module.update({name: getattr(self, name) for name in self.saved_facts})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *of_module: Any
    ) -> None:
        wrong: list[str] = []
        # What is below first: a loss looks at what its stores have found.
        for name, module in reversed(list(self.named_modules())):
            if isinstance(module, StrictState):
                below = f"{prefix}{name}." if name else prefix
                wrong += module._misfits(state_dict, below, {} if name else local_metadata)
        self._refuse(wrong)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *of_module)

    def _misfits(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> list[str]:
        """What is wrong with the state of this module, without those below, a line each."""
        wrong = [
            f"{prefix}{name} must be {getattr(self, name)}, got a state that was saved with {metadata[name]}"
            for name in self.saved_facts
            if metadata.get(name, getattr(self, name)) != getattr(self, name)  # older states have no such metadata
        ]
        kept = self._kept_here()
        missing = [name for name in kept if prefix + name not in state_dict]
        if 0 < len(missing) < len(kept):  # a part of what belongs together
            wrong.append(f"{prefix}{', '.join(missing)} must be in the state beside the others, got none")
        for name in self._counters():
            if prefix + name in state_dict:
                wrong += _wrong_counter(prefix + name, state_dict[prefix + name])
        return wrong

    def _counters(self) -> list[str]:
        return [name for name in self._buffers if name not in self._non_persistent_buffers_set]

    def _kept_here(self) -> list[str]:
        """Names in ``state_dict``, without those of modules below."""
        return self._counters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StrictState:
        super()._apply(lambda tensor: self._moved(fn, tensor, 0), recurse=False)
        for child in self.children() if recurse else ():
            child._apply(fn)
        return self

    @staticmethod
    def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor, initial: float) -> Tensor:
        """Moved as asked for, but not cast: a score rounded to half precision, or an item's id through a float, would
        be another chain."""
        moved = fn(tensor)
        moved = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return moved.fill_(initial) if tensor.is_meta and not moved.is_meta else moved


def _wrong_counter(name: str, value: Any) -> list[str]:
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dim() > 1:
        return [f"{name} must be a tensor with one number, got {checks.describe(value)}"]
    return wrong_kind(name, value, torch.int64) or range_errors(name, value, 0, MAX_STEP)


def wrong_kind(name: str, value: Tensor, dtype: torch.dtype) -> list[str]:
    """Numbers of another precision are taken, numbers of another kind are not."""
    floating = dtype.is_floating_point
    if value.dtype != torch.bool and not value.is_complex() and value.is_floating_point() == floating:
        return []
    return [f"{name} must hold {'floating-point numbers' if floating else 'integers'}, got {checks.describe(value)}"]


def range_errors(name: str, values: Tensor, low: float, high: float) -> list[str]:
    """One line if a value is not in [low, high], or is NaN."""
    if values.is_meta or values.numel() == 0:
        return []
    lowest, highest = (bound.item() for bound in torch.aminmax(values))
    if low <= lowest and highest <= high:
        return []
    return [f"{name} must hold values in [{low}, {high}], got values from {lowest} to {highest}"]
