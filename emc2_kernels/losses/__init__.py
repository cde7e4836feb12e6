"""Contrastive losses with one call: ``loss(z0, z1, index)``, each the mean over its 2b anchors of ``-s+ + ...`` with s
divided by the temperature and no further factor of it, so that gradients of different methods are on one scale.

``get(name, **options)`` makes one by its name in ``TABLE``.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple, overload

from torch import nn

from .. import checks
from .cached import CachedSoftmaxLoss
from .emc2 import EMC2Loss
from .ntxent import ClipLoss, NTXentLoss
from .sogclr import ISogCLRLoss, SogCLRLoss

__all__ = [
    "TABLE",
    "CachedSoftmaxLoss",
    "ClipLoss",
    "EMC2Loss",
    "ISogCLRLoss",
    "Method",
    "NTXentLoss",
    "SogCLRLoss",
    "get",
]


class Method(NamedTuple):
    """What a name in ``TABLE`` stands for.

    Attributes:
        loss: its class.
        fixed: options that the name stands for.
    """

    loss: type[nn.Module]
    fixed: dict[str, Any]

    def options(self) -> dict[str, inspect.Parameter]:
        """What ``get`` takes for it."""
        parameters = inspect.signature(self.loss.__init__).parameters
        return {name: parameter for name, parameter in parameters.items() if name not in ("self", *self.fixed)}


TABLE = {
    "emc2": Method(EMC2Loss, {}),
    "sogclr": Method(SogCLRLoss, {"individual_temperature": False}),
    "isogclr": Method(ISogCLRLoss, {"individual_temperature": True}),
    "ntxent": Method(NTXentLoss, {}),
    "simclr": Method(NTXentLoss, {}),
    "clip": Method(ClipLoss, {}),
    "cached": Method(CachedSoftmaxLoss, {}),
}


@overload
def get(name: Literal["emc2"], **options: Any) -> EMC2Loss: ...
@overload
def get(name: Literal["isogclr"], **options: Any) -> ISogCLRLoss: ...
@overload
def get(name: Literal["sogclr"], **options: Any) -> SogCLRLoss: ...
@overload
def get(name: Literal["clip"], **options: Any) -> ClipLoss: ...
@overload
def get(name: Literal["ntxent", "simclr"], **options: Any) -> NTXentLoss: ...
@overload
def get(name: Literal["cached"], **options: Any) -> CachedSoftmaxLoss: ...
@overload
def get(name: str, **options: Any) -> nn.Module: ...
def get(name: str, **options: Any) -> nn.Module:
    """The loss of that name.

    Args:
        name: a key of ``TABLE``; "simclr" is another name of "ntxent".
        **options: the constructor's arguments, by name.

    Raises:
        ValueError: there is no such name, or an option has a value that the loss refuses.
        TypeError: the loss has no such option, or needs one that is not given.
    """
    if not (isinstance(name, str) and name in TABLE):
        raise ValueError(f"name must be one of {', '.join(map(repr, TABLE))}, got {checks.shown(name)}")
    method, takes = TABLE[name], TABLE[name].options()
    unknown = sorted(option for option in options if option not in takes)
    if unknown:
        raise TypeError(f"{unknown[0]} is no option of the loss {name!r}: it takes {', '.join(takes)}, got {unknown}")
    missing = [option for option, p in takes.items() if p.default is p.empty and option not in options]
    if missing:
        raise TypeError(f"{missing[0]} must be given for the loss {name!r}, got {', '.join(options) or 'no options'}")
    return method.loss(**method.fixed, **options)
