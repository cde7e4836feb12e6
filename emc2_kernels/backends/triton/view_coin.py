"""The view coin: which of an item's views is proposed at a step."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import NUMBERS
from .philox import VIEW_COIN, chain_words, seed_words, step_word, words


@triton.jit(do_not_specialize=NUMBERS)
def coin_kernel(
    items_ptr, coins_ptr, count: tl.int64, seed_ptr, seed_low: tl.int32, seed_high: tl.int32, step_ptr, step: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key_0, key_1 = seed_words(seed_ptr, seed_low, seed_high)
    low, tag = chain_words(tl.load(items_ptr + at, at < count, other=0), VIEW_COIN)
    block = tl.zeros((BLOCK,), tl.uint32)
    word, _w1, _w2, _w3 = words(block, low, tag, step_word(step_ptr, step), key_0, key_1, 0)
    tl.store(coins_ptr + at, (word >> 31).to(tl.int64), at < count)
