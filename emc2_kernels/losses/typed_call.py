"""What type checkers and editors are told of ``loss(z0, z1, index)``: nn.Module's own call is untyped.

Bases of the losses, with nothing in them at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

Stats = dict[str, Tensor]
Scale = float | Tensor | None


class CalledWithIndex:
    """A loss that keeps something for each item."""

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, z0: Tensor, z1: Tensor, index: Tensor, *, return_stats: Literal[False] = False
        ) -> Tensor: ...

        @overload
        def __call__(
            self, z0: Tensor, z1: Tensor, index: Tensor, *, return_stats: Literal[True]
        ) -> tuple[Tensor, Stats]: ...

        @overload
        def __call__(
            self, z0: Tensor, z1: Tensor, index: Tensor, *, return_stats: bool
        ) -> Tensor | tuple[Tensor, Stats]: ...

        def __call__(
            self, z0: Tensor, z1: Tensor, index: Tensor, *, return_stats: bool = False
        ) -> Tensor | tuple[Tensor, Stats]: ...


class Called:
    """A loss that keeps nothing: the index may be left out."""

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            z0: Tensor,
            z1: Tensor,
            index: Tensor | None = None,
            *,
            logit_scale: Scale = None,
            return_stats: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            z0: Tensor,
            z1: Tensor,
            index: Tensor | None = None,
            *,
            logit_scale: Scale = None,
            return_stats: Literal[True],
        ) -> tuple[Tensor, Stats]: ...

        @overload
        def __call__(
            self, z0: Tensor, z1: Tensor, index: Tensor | None = None, *, logit_scale: Scale = None, return_stats: bool
        ) -> Tensor | tuple[Tensor, Stats]: ...

        def __call__(
            self,
            z0: Tensor,
            z1: Tensor,
            index: Tensor | None = None,
            *,
            logit_scale: Scale = None,
            return_stats: bool = False,
        ) -> Tensor | tuple[Tensor, Stats]: ...
