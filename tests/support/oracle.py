"""A walk done literally, proposal by proposal in float64, sharing nothing with the package but the draws.

It also says how close each row came to a tie: there a backend's rounding may decide
otherwise, and from there on its chain differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emc2_kernels import MHState, rng


@dataclass
class Walked:
    samples: Tensor  # (n, R)
    key: Tensor  # (n,)
    score: Tensor  # (n,) float64
    accepted: Tensor  # (n,)
    threshold: Tensor  # (n,) float64
    closest_tie: Tensor  # (n,) smallest |score + E - current score|


def walk(
    queries: Tensor,
    keys: Tensor,
    state: MHState,
    *,
    temperature: float | Tensor,
    seed: int,
    step: int,
    chain_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_labels: Tensor | None = None,
    proposal: str | Tensor = "sweep",
    num_proposals: int | None = None,
    log_proposal: Tensor | None = None,
    burn_in: int = 0,
    num_samples: int = 1,
) -> Walked:
    n, m = queries.shape[0], keys.shape[0]
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(n)
    scores = (queries.double() @ keys.double().T) / temperatures[:, None]
    if chain_ids is None:
        chain_ids = torch.arange(n) if query_ids is None else query_ids
    if isinstance(proposal, Tensor):
        positions = proposal
    elif proposal == "uniform":
        positions = rng.proposal_positions(chain_ids, range(num_proposals), m, seed=seed, step=step)
    else:
        positions = torch.arange(m).expand(n, m)
    count = positions.shape[1]
    e = rng.acceptance(chain_ids, range(count), seed=seed, step=step, dtype=torch.float64)
    marks = [burn_in + math.ceil((r + 1) * (count - burn_in) / num_samples) - 1 for r in range(num_samples)]
    labels = key_labels if key_labels is not None else key_ids if key_ids is not None else torch.arange(m)
    out = Walked(
        torch.full((n, num_samples), -1),
        state.key.clone(),
        state.score.double().clone(),
        torch.zeros(n, dtype=torch.int64),
        torch.full((n,), -math.inf, dtype=torch.float64),
        torch.full((n,), math.inf, dtype=torch.float64),
    )
    for i in range(n):
        current = float(state.score[i])
        current = -math.inf if math.isnan(current) else current
        position = -1
        for p in range(count):
            j = int(positions[i, p])
            excluded = query_ids is not None and int(query_ids[i]) == int(key_ids[j])
            score = float(scores[i, j])
            if not excluded and math.isfinite(score):
                score -= 0.0 if log_proposal is None else float(log_proposal[j])
                level = score + float(e[i, p])
                out.threshold[i] = max(float(out.threshold[i]), level)
                out.closest_tie[i] = min(float(out.closest_tie[i]), abs(level - current))
                if level > current:
                    current, position = score, j
                    out.accepted[i] += 1
                    out.key[i] = labels[j]
            if p in marks:
                out.samples[i, marks.index(p)] = position
        out.score[i] = current
    return out


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype)
