"""The rate of bfloat16 products that a card is sold with: dense, accumulated in float32, at its boost clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# By what is in torch's name of the card, the first that is; flop/s. NVIDIA's data sheets give twice that with sparsity.
PEAKS: dict[str, tuple[float, str]] = {
    "GB200": (2500e12, "GB200 NVL72 data sheet"),
    "B200": (2250e12, "HGX B200 data sheet"),
    "H200": (989.4e12, "H200 data sheet, SXM"),
    "H100": (989.4e12, "H100 data sheet, SXM"),
    "A100": (312e12, "A100 data sheet"),
}
SLOWER = ("H100 NVL", "H100 PCIe", "H200 NVL", "GH200")  # of the same names, with other clocks or fewer multiprocessors


class Peak(NamedTuple):
    """What shares are of."""

    flops: float  # a second
    source: str


def find_peak(card: str, measure: Callable[[], float | None]) -> Peak | None:
    """Of a card by its name; of another one what ``measure`` finds, and None where that finds nothing."""
    for name, (flops, source) in PEAKS.items():
        if name in card and not any(word in card for word in SLOWER):
            return Peak(flops, source)
    measured = measure()
    return None if measured is None else Peak(measured, "no data sheet is known: the fastest torch.mm here")
