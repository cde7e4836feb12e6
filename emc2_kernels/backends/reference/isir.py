"""A step of iterated sampling importance resampling in plain torch: the formulas, and the oracle of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import rng
from ..params import CarriedParams, ScoreParams, score_dtype
from .lse import masked_scores, row_blocks


def isir_step(scores: ScoreParams, carried: CarriedParams) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Next states of n chains, drawn from the softmax over what each brings along and the keys, and its normaliser.

    Noise and what it is added to are float64 whatever the scores are, so that their rounding alone decides a tie.

    Returns:
        position (n,) int64: ``first_key`` + that of the key drawn, -1 - c where candidate c of the chain's own was, the
        first of equal ones; key (n,) int64 and score (n,) of what was drawn; lse (n,) over all candidates; value (n,)
        float64, the score and noise that won. A row without candidates: -1, -1, and -inf thrice.
    """
    carried.check_values(scores)
    n, own = carried.key.shape
    device, dtype = scores.queries.device, score_dtype(scores.queries)
    chains = torch.arange(n, dtype=torch.int64, device=device) if carried.chain_ids is None else carried.chain_ids
    numbers = torch.arange(scores.keys.shape[0], dtype=torch.int64, device=device) + carried.first_key
    labels = numbers if carried.key_labels is None else carried.key_labels
    places = torch.cat((-1 - torch.arange(own, dtype=torch.int64, device=device), numbers, numbers.new_full((1,), -1)))
    draw = {"seed": carried.seed, "step": carried.step, "dtype": torch.float64}
    found: list[tuple[Tensor, ...]] = []
    with torch.autocast(device.type, enabled=False):
        for rows, block in row_blocks(scores):
            brought = torch.where(carried.score[rows].isfinite(), carried.score[rows], -torch.inf)
            nobody = brought.new_full((len(brought), 1), -torch.inf)  # who wins where nobody else is
            candidates = torch.cat((brought, masked_scores(block), nobody), 1)
            names = torch.cat((carried.key[rows], labels.expand(len(brought), -1), -torch.ones_like(nobody).long()), 1)
            noise = (
                rng.gumbel(chains[rows], range(own), stream=rng.CARRIED, **draw),
                rng.gumbel(chains[rows], range(carried.first_key, carried.first_key + len(numbers)), **draw),
                torch.zeros_like(nobody),
            )
            value, column = (candidates + torch.cat(noise, 1)).max(1)  # of equal ones the first
            column = torch.where(value > -torch.inf, column, own + len(numbers))
            drawn = column[:, None]
            found.append(
                (
                    places[column],
                    names.gather(1, drawn)[:, 0],
                    candidates.gather(1, drawn)[:, 0],
                    torch.logsumexp(candidates, 1),
                    value,
                )
            )
    if not found:
        integers, floats = carried.key.new_empty(0), scores.queries.new_empty(0, dtype=dtype)
        return integers, integers.clone(), floats, floats.clone(), floats.double()
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
