"""The random-number contract: which draw has which value, whatever computes it.

Philox4x32 with 7 rounds (Salmon et al., SC 2011). key = (seed low 32 bits, seed high 32 bits); counter
= (block, chain low 32, sample << 16 | (chain >> 32) << 8 | stream, step). This is the contract in plain torch,
for the reference backend and the tests; csrc/philox.h states it for the kernels. 32-bit words are kept in int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACCEPTANCE, POSITION, GUMBEL, VIEW_COIN, CARRIED = range(5)  # streams

NUM_ROUNDS = 7  # the fewest that pass BigCrush
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Block = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply_wide(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps modulo 2^64, which keeps all 64 of them."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(counter: Block, seed: int | Tensor) -> Block:
    """Four 32-bit words for each counter; the counter's words broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply_wide(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_wide(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(
    chain: Tensor, block: Tensor, *, stream: int, seed: int | Tensor, step: int | Tensor, sample: int = 0
) -> Tensor:
    """The words of given blocks of given chains' streams.

    Args:
        chain: int64 below 2^40, broadcasts against ``block``.
        block: int64 below 2^32.
        stream: one of the five.
        seed: 0 <= seed < 2^64.
        step: 0 <= step < 2^32.
        sample: 0 <= sample < 2^16, 0 but in the Gumbel stream.

    Returns:
        (..., 4) int64, words in 0 .. 2^32 - 1.
    """
    chain, block = torch.broadcast_tensors(chain, block)
    tag = sample << 16 | (chain >> 32) << 8 | stream
    counter_step = torch.zeros_like(block) + step
    return torch.stack(philox4x32((block, chain & _MASK, tag, counter_step), seed), dim=-1)


def _word_of_proposal(chain_ids: Tensor, proposals: range, **counter: int | Tensor) -> Tensor:
    """(n, M): word p % 4 of block p // 4, so that one call of the generator serves four neighbouring proposals."""
    first_block, end_block = proposals.start // 4, -(-proposals.stop // 4)
    blocks = torch.arange(first_block, end_block, dtype=torch.int64, device=chain_ids.device)
    drawn = words(chain_ids[:, None], blocks[None], **counter).flatten(1)
    return drawn[:, proposals.start - 4 * first_block : proposals.stop - 4 * first_block]


def acceptance(
    chain_ids: Tensor, proposals: range, *, seed: int | Tensor, step: int | Tensor, dtype: torch.dtype
) -> Tensor:
    """E = -log u ~ Exp(1) of each chain's proposals: accept iff score + E > current score.

    Args:
        chain_ids: (n,) int64.
        proposals: M consecutive proposal numbers.

    Returns:
        (n, M) of ``dtype``. u = (word >> 9) * 2^-23 + 2^-24 is exact in float32 and inside (0, 1).
    """
    word = _word_of_proposal(chain_ids, proposals, stream=ACCEPTANCE, seed=seed, step=step)
    u = (word >> 9).to(dtype) * 2.0**-23 + 2.0**-24
    return (-u.log()).clamp_min(0)  # rounding must not put a threshold below its score


def proposal_positions(
    chain_ids: Tensor, proposals: range, num_keys: int, *, seed: int | Tensor, step: int | Tensor
) -> Tensor:
    """Uniform positions in 0 .. num_keys - 1, with replacement.

    Args:
        chain_ids: (n,) int64.
        proposals: M consecutive proposal numbers.

    Returns:
        (n, M) int64: the high 64 bits of value * num_keys, value being the 64-bit half p % 2 of block p // 2.
    """
    number = torch.arange(proposals.start, proposals.stop, dtype=torch.int64, device=chain_ids.device)[None]
    drawn = words(chain_ids[:, None], number // 2, stream=POSITION, seed=seed, step=step)
    odd = number % 2 == 1
    low, high = torch.where(odd, drawn[..., 2], drawn[..., 0]), torch.where(odd, drawn[..., 3], drawn[..., 1])
    keys_low, keys_high = num_keys & _MASK, num_keys >> 32
    # Schoolbook product in 32-bit limbs. Products of two limbs wrap in int64 with all bits kept; their high halves need
    # the mask.
    low_low, low_high, high_low = low * keys_low, low * keys_high, high * keys_low
    middle = ((low_low >> 32) & _MASK) + (low_high & _MASK) + (high_low & _MASK)
    return high * keys_high + ((low_high >> 32) & _MASK) + ((high_low >> 32) & _MASK) + (middle >> 32)


def gumbel(
    chain_ids: Tensor,
    columns: range,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    dtype: torch.dtype,
    sample: int = 0,
    stream: int = GUMBEL,
) -> Tensor:
    """Gumbel noise -log E of each chain's columns, (n, M); E = -log1p(-v), v = (word + 0.5) * 2^-32.

    The acceptance draws' shift by 9 would truncate it at 16.6, below the maximum of 10^7 keys.

    Args:
        stream: GUMBEL, of keys; CARRIED, of what a chain brings along.
    """
    word = _word_of_proposal(chain_ids, columns, stream=stream, seed=seed, step=step, sample=sample)
    v = (word.to(torch.float64) + 0.5) * 2.0**-32
    return (-(-torch.log1p(-v)).log()).to(dtype)


def view_coin(items: Tensor, *, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """Which of an item's views is proposed at this step, (b,) int64 of 0 and 1: the top bit of word 0 of block 0."""
    return words(items, torch.zeros_like(items), stream=VIEW_COIN, seed=seed, step=step)[..., 0] >> 31
