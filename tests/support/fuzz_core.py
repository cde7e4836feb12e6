"""Random calls of the operators that read by what they are given, half of them with something wrong in it: what is
legal gives a legal result, all else an error that says what came. ``python tests/support/fuzz_core.py CALLS [SEED]``
exits with 1 where a call does anything else; tests/ops/test_values.py runs it, once under the sanitizers too, where a
read of foreign memory ends the process.

The operators are called by themselves, as a compiled graph calls them: nobody has looked at a value before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import emc2_kernels  # noqa: F401  registers the operators

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 70)
WILD = (-(2**63), -(2**40), -1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)  # no position; most of them no chain
WILD_COUNTS = (-(2**63), -1, 2**40, 2**62, 2**63 - 1)  # of proposals and samples
COUNTS = ("num_samples", "first_proposal", "first_key")


class Source:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self.generator))

    def one_of(self, choices: tuple) -> object:
        return choices[self.below(len(choices))]

    def chance(self, share: float) -> bool:
        return self.below(1000) < 1000 * share

    def laid_out(self, values: Tensor) -> Tensor:
        """The same values elsewhere in memory: exactly as much of it, rows apart, or every other element."""
        layout = self.below(3)
        if layout == 0 or values.dim() == 0:
            return values.clone()
        if values.dim() == 2:
            wide = values.new_zeros(values.shape[0], values.shape[1] + self.below(3))
            wide[:, : values.shape[1]] = values
            return wide[:, : values.shape[1]]
        wide = values.new_zeros(2 * values.shape[0])
        wide[::2] = values
        return wide[::2]

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=self.generator)
        if values.numel() and self.chance(0.2):
            values.view(-1)[self.below(values.numel())] = self.one_of((torch.nan, torch.inf, -torch.inf, 3e38, 1e-45))
        return self.laid_out(values.to(dtype))

    def integers(self, low: int, end: int, *shape: int) -> Tensor:
        values = torch.randint(low, end, shape, generator=self.generator)
        return values.t().contiguous().t() if values.dim() == 2 and self.chance(0.3) else self.laid_out(values)


def arguments_of_scores(source: Source) -> dict:
    n, m, d = (source.one_of(EDGES) for _ in range(3))
    dtype = source.one_of(DTYPES)
    given = {"queries": source.floats(n, d, dtype=dtype), "keys": source.floats(m, d, dtype=dtype)}
    given |= {"temperature": 0.3, "backend": "cpu"}
    if source.chance(0.4):
        given["temperature_tensor"] = source.laid_out(torch.rand(n, generator=source.generator) + 0.1)
    if source.chance(0.5):
        given |= {"query_ids": source.integers(0, 9, n), "key_ids": source.integers(0, 9, m)}
    if source.chance(0.5):
        given["chain_ids"] = source.integers(0, 2**40, n)
    given |= {"seed": source.below(2**40), "step": source.below(2**32)}
    if source.chance(0.3):
        given["step_tensor"] = torch.tensor(source.below(2**32))
    return given


def with_all_of_scores(source: Source, given: dict) -> dict:
    """With what walks have otherwise, or not at all."""
    if "key_ids" in given and source.chance(0.5):
        given["carried_ids"] = source.integers(0, 9, given["queries"].shape[0])
        if source.chance(0.3) and not given.get("symmetric"):
            del given["query_ids"]
    if source.chance(0.3):
        law = torch.randn(given["keys"].shape[0], generator=source.generator)
        if source.chance(0.5):
            law[torch.rand(law.shape, generator=source.generator) < 0.3] = torch.inf
        given["log_proposal"] = source.laid_out(law)
    return given


def arguments_of_walk(source: Source) -> dict:
    given = arguments_of_scores(source)
    n, m = given["queries"].shape[0], given["keys"].shape[0]
    count = m
    kind = source.below(3)
    if kind == 1:
        given["num_draws"] = count = source.below(70) if m else 0
    elif kind == 2:
        count = source.below(70) if m else 0
        given["positions"] = source.integers(0, max(m, 1), n, count)
    if source.chance(0.3):
        given["log_proposal"] = source.laid_out(torch.randn(m, generator=source.generator))
    burn_in = source.below(count) if count else source.below(5)
    given |= {"burn_in": burn_in, "num_samples": 1 + source.below(max(1, count - burn_in))}
    return given | {"first_proposal": 0, "total_proposals": count}


def arguments_of_step(source: Source) -> dict:
    given = arguments_of_walk(source)
    n, m = given["queries"].shape[0], given["keys"].shape[0]
    given |= {"state_key": source.integers(-1, 99, n), "state_score": source.floats(n)}
    if source.chance(0.4):
        given["key_labels"] = source.integers(-9, 2**62, m)
    sweep = "num_draws" not in given and "positions" not in given
    return given | {"return_accepts": source.chance(0.5), "return_lse": sweep and source.chance(0.5)}


def arguments_of_transition(source: Source) -> dict:
    given = arguments_of_walk(source)
    if source.chance(0.5):  # of a longer walk
        first = source.one_of((1, 5, 2**32 + 3))
        given |= {"first_proposal": first, "total_proposals": given["total_proposals"] + first + source.below(9)}
        given["burn_in"] = min(given["burn_in"], given["total_proposals"] - 1)
        given["num_samples"] = min(given["num_samples"], given["total_proposals"] - given["burn_in"])
    return given


def arguments_of_draws(source: Source) -> dict:
    given = with_all_of_scores(source, arguments_of_scores(source))
    return given | {"num_samples": source.one_of((1, 2, 3, 16, 17, 40))}


def arguments_of_isir(source: Source) -> dict:
    given = with_all_of_scores(source, arguments_of_scores(source))
    n, m, own = given["queries"].shape[0], given["keys"].shape[0], source.below(5)
    given |= {"key": source.integers(-1, 99, n, own), "score": source.floats(n, own)}
    if source.chance(0.4):
        given["key_labels"] = source.integers(-9, 2**62, m)
    return given | {"first_key": source.one_of((0, 1, 6, 2**32 + 3))}


def arguments_of_lse(source: Source) -> dict:
    given = arguments_of_scores(source)
    for name in ("chain_ids", "seed", "step", "step_tensor"):
        given.pop(name, None)
    given["symmetric"] = source.chance(0.3)
    if given["symmetric"]:
        given["keys"] = given["queries"]
        given |= {"key_ids": given["query_ids"]} if "query_ids" in given else {}
    return with_all_of_scores(source, given)


def arguments_of_lse_backward(source: Source) -> dict:
    given = arguments_of_lse(source)
    n = given["queries"].shape[0]
    return given | {"grad": source.floats(n), "lse": source.floats(n), "keys_wanted": source.chance(0.7)}


def arguments_of_coin(source: Source) -> dict:
    return {"items": source.integers(0, 2**40, source.one_of(EDGES)), "seed": 1, "step": 2, "backend": "cpu"}


def arguments_of_labels(source: Source) -> dict:
    n, m = source.one_of(EDGES), source.one_of(EDGES)
    return {"position": source.integers(-1, m, n), "key_labels": source.integers(-9, 2**62, m)}


def arguments_of_look(source: Source) -> dict:
    lowest, end = source.one_of((-1, 0)), source.one_of((1, 9, 2**40))
    values = source.integers(lowest, end, source.one_of(EDGES))
    return {"value": values, "name": "value", "lowest": lowest, "end": end, "before": [torch.zeros(())]}


OPERATORS: dict[str, Callable[[Source], dict]] = {
    "mh_step": arguments_of_step,
    "mh_transition": arguments_of_transition,
    "gumbel_sample": arguments_of_draws,
    "isir_step": arguments_of_isir,
    "contrastive_lse": arguments_of_lse,
    "contrastive_lse_backward": arguments_of_lse_backward,
    "view_coin": arguments_of_coin,
    "label_at": arguments_of_labels,
    "look_within": arguments_of_look,
}


def faults(source: Source, given: dict) -> list[tuple[str, object]]:
    """(argument, what to put there): each makes the call a wrong one."""
    found: list[tuple[str, object]] = []
    for name, value in given.items():
        if not isinstance(value, Tensor) or name in ("step_tensor", "queries", "keys"):
            continue
        if "queries" in given:  # another number of rows
            found.append((name, value.new_zeros((value.shape[0] + 1, *value.shape[1:]))))
            found += [(name, value[:-1])] * (value.shape[0] > 0)
        found.append((name, value.to(torch.int32 if value.dtype == torch.int64 else torch.float64)))
        wrong: list[float] = []
        if name == "positions":
            wrong = [*WILD, given["keys"].shape[0]]
        if name == "position":
            wrong = [value for value in (*WILD, -2, given["key_labels"].shape[0]) if value != -1]
        if name == "value":
            wrong = [value for value in WILD if not given["lowest"] <= value < given["end"]]
        if name in ("chain_ids", "items"):
            wrong = [value for value in WILD if not 0 <= value < 2**40]
        if name == "temperature_tensor":
            wrong = [torch.nan, torch.inf, 0.0, -1.0]
        if name == "log_proposal":
            wrong = [torch.nan, -torch.inf] + [torch.inf] * ("burn_in" in given)
        if wrong and value.numel():
            changed = value.clone(memory_format=torch.contiguous_format)
            changed.view(-1)[source.below(changed.numel())] = source.one_of(tuple(wrong))
            found.append((name, changed))
    if "queries" in given:
        keys = given["keys"]
        found += [("keys", keys.new_zeros(keys.shape[0], keys.shape[1] + 1)), ("keys", keys.double())]
    if "step" in given:
        found.append(("step_tensor", torch.tensor(source.one_of((-1, 2**32, 2**62)))))
    found += [(name, source.one_of(WILD_COUNTS)) for name in COUNTS if name in given]
    if given.get("total_proposals"):
        found.append(("burn_in", source.one_of(WILD_COUNTS)))
    return found


def call(source: Source) -> str | None:
    """One random call; what is wrong with what came of it."""
    name = source.one_of(tuple(OPERATORS))
    given = OPERATORS[name](source)
    broken = None
    if source.chance(0.5):
        broken, given_instead = source.one_of(tuple(faults(source, given)))
        given[broken] = given_instead
    operator = getattr(torch.ops.emc2_kernels, name).default
    positional = [given.get(argument.name) for argument in operator._schema.arguments]
    try:
        result = operator(*positional)
    except (ValueError, TypeError) as error:
        if broken is None or "got" not in str(error):
            return f"{name}, wrong: {broken}: {type(error).__name__}: {error}"
        return None
    if broken is not None:
        return f"{name}: {broken} = {given[broken]} was taken"
    return illegal(name, given, result)


def illegal(name: str, given: dict, result: object) -> str | None:
    """Why a result cannot be right."""
    if name == "view_coin":
        return None if bool(((result == 0) | (result == 1)).all()) else f"{name}: {result}"
    if name == "look_within":
        return None if torch.equal(result, given["value"]) else f"{name}: {result} of {given['value']}"
    if name == "label_at":
        asked = given["position"] >= 0  # the label of none means nothing
        right = torch.equal(result[asked], given["key_labels"][given["position"][asked]])
        return None if right else f"{name}: {result} at {given['position']}"
    if name == "contrastive_lse":
        return None if bool((result < torch.inf).all()) else f"{name}: {result}"
    if name == "contrastive_lse_backward":
        keys = given["keys"].shape if given["keys_wanted"] and not given["symmetric"] else (0,)
        rows = given["queries"].shape[0] if "temperature_tensor" in given else 0
        right = [given["queries"].shape, torch.Size(keys), torch.Size((rows,))]
        return None if [gradient.shape for gradient in result] == right else f"{name}: {result}"
    m, first = given["keys"].shape[0], given.get("first_proposal", 0)
    if name == "isir_step":
        position, first, own = result[0], given["first_key"], given["key"].shape[1]
        legal = ((position >= -max(own, 1)) & (position < 0)) | ((position >= first) & (position < first + m))
        return None if bool(legal.all()) else f"{name}: a position outside the candidates: {position}"
    positions = result[0] if name == "mh_step" else result[2] if name == "mh_transition" else result
    offset = first if name == "mh_transition" and "num_draws" not in given and "positions" not in given else 0
    inside = (positions == -1) | ((positions >= offset) & (positions < offset + m))
    return None if bool(inside.all()) else f"{name}: a position outside the keys: {positions}"


def main(calls: int, seed: int) -> int:
    torch.set_num_threads(2)
    for number in range(calls):
        problem = call(Source(seed + number))
        if problem is not None:
            print(f"call {seed + number}: {problem}")
            return 1
    print(f"{calls} calls, none of them wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
