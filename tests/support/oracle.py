"""A walk, and a step over all keys, done literally: candidate by candidate in float64, sharing nothing with the package
but the draws.

They also say how close each row came to a tie: there a backend's rounding may decide otherwise, and from there on its
chain differs.
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


@dataclass
class Resampled:
    position: Tensor  # (n,) first_key + that of the key drawn, -1 - c: the chain's own candidate c; -1: there was none
    key: Tensor  # (n,)
    score: Tensor  # (n,) float64
    value: Tensor  # (n,) float64 score and noise of what was drawn
    lse: Tensor  # (n,) float64
    margin: Tensor  # (n,) by how much the nearest other candidate lost


def resample(
    queries: Tensor,
    keys: Tensor,
    own: tuple[Tensor, Tensor],
    *,
    temperature: float | Tensor,
    seed: int,
    step: int,
    chain_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_labels: Tensor | None = None,
    carried_ids: Tensor | None = None,
    log_proposal: Tensor | None = None,
    first_key: int = 0,
) -> Resampled:
    """A step of i-SIR. own: labels and scores (n, C) that the chains bring along."""
    n, m = queries.shape[0], keys.shape[0]
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(n)
    scores = (queries.double() @ keys.double().T) / temperatures[:, None]
    if chain_ids is None:
        chain_ids = torch.arange(n) if query_ids is None else query_ids
    draw = {"seed": seed, "step": step, "dtype": torch.float64}
    noise = rng.gumbel(chain_ids, range(first_key, first_key + m), **draw)
    own_noise = rng.gumbel(chain_ids, range(own[0].shape[1]), stream=4, **draw)
    labels = key_labels if key_labels is not None else key_ids if key_ids is not None else first_key + torch.arange(m)
    rows = []
    for i in range(n):
        candidates = []  # (score, noise, position, label), in the order in which equal ones are preferred
        for c, (label, score) in enumerate(zip(own[0][i].tolist(), own[1][i].tolist(), strict=True)):
            if math.isfinite(score):
                candidates.append((score, float(own_noise[i, c]), -1 - c, label))
        for j in range(m):
            excluded = any(ids is not None and int(ids[i]) == int(key_ids[j]) for ids in (query_ids, carried_ids))
            score = float(scores[i, j]) - (0.0 if log_proposal is None else float(log_proposal[j]))
            if math.isfinite(score) and not excluded:
                candidates.append((score, float(noise[i, j]), first_key + j, int(labels[j])))
        rows.append(_winner(candidates))
    columns = list(zip(*rows, strict=True)) or [()] * 6
    dtypes = [torch.int64] * 2 + [torch.float64] * 4
    return Resampled(*(torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def _winner(candidates: list[tuple[float, float, int, int]]) -> tuple[int, int, float, float, float, float]:
    """Of candidates (score, noise, position, label): the fields of ``Resampled``."""
    if not candidates:
        return -1, -1, -math.inf, -math.inf, -math.inf, math.inf
    values = [score + noise for score, noise, _, _ in candidates]
    best = max(range(len(values)), key=lambda number: values[number])  # of equal ones the first
    margin = values[best] - max(values[:best] + values[best + 1 :], default=-math.inf)
    score, _, position, label = candidates[best]
    level = max(score for score, _, _, _ in candidates)
    lse = level + math.log(math.fsum(math.exp(score - level) for score, _, _, _ in candidates))
    return position, label, score, values[best], lse, margin


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype)
