"""The view coin: which of an item's views is proposed at a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import check_items, check_step
from .launch import NUMBERS, Kernel, device_guard, random_arguments
from .philox import VIEW_COIN, chain_words, load_generator, random_words

BLOCK = 256


@triton.jit
def draw_view(item, block, generator):
    """0 or 1, int64; ``block`` is zeros of the items' shape."""
    low, tag = chain_words(item, VIEW_COIN)
    word, _w1, _w2, _w3 = random_words(block, low, tag, generator, 0)
    return (word >> 31).to(tl.int64)


@triton.jit(do_not_specialize=NUMBERS)
def view_coin_kernel(
    items_ptr,  # (n,) int64
    coins_ptr,  # (n,) int64, written
    n: tl.int64,
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr, step: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: items i * BLOCK and on."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, step)
    item = tl.load(items_ptr + at, at < n, other=0)
    tl.store(coins_ptr + at, draw_view(item, tl.zeros((BLOCK,), tl.uint32), generator), at < n)


VIEW_COIN_KERNEL = Kernel(view_coin_kernel)


def view_coin(items: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """(b,) int64 of 0 and 1; see ``emc2_kernels.rng.view_coin``.

    Roofline: 16 bytes and seven rounds of Philox an item; for the few items of a batch, the launch.
    """
    if items.is_cpu:  # the interpreter's
        check_items(items)
        check_step(step)
    items = items.contiguous()
    coins, n = torch.empty_like(items), items.numel()
    arguments = random_arguments(seed, step)
    arguments |= {"items_ptr": items, "coins_ptr": coins, "n": n, "BLOCK": BLOCK}
    with device_guard(items):
        VIEW_COIN_KERNEL((-(-n // BLOCK), 1, 1), arguments, {"num_warps": 4})
    return coins
