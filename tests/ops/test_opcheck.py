"""Every operator under torch's own checks, also with one tensor for several of its arguments: what they mean must not
depend on it, since a compiler may hand one over where it finds that they hold the same."""

import pytest
import torch
from helpers import RUNNABLE, normal
from torch._subclasses.fake_utils import CrossRefFakeMode
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.testing._internal.optests import aot_autograd_check

from emc2_kernels.dispatch import LIBRARY

N, M, D = 6, 5, 4
IDS = torch.arange(N) % 4
# What an operator is given where a case does not say. What is not here is None.
USUAL = {
    "queries": normal(0, N, D),
    "keys": normal(1, M, D),
    "temperature": 0.2,
    "items": IDS,
    "seed": 1,
    "step": 2,
    "burn_in": 0,
    "num_samples": 1,
    "first_proposal": 0,
    "state_key": torch.arange(N) - 1,
    "state_score": normal(2, N).where(torch.arange(N) > 0, -torch.inf),
    "key": torch.arange(N)[:, None] + 20,
    "score": normal(8, N, 1).where(torch.arange(N)[:, None] > 0, torch.nan),
    "first_key": 0,
    "return_accepts": False,
    "keys_wanted": True,
    "return_lse": False,
    "symmetric": False,
    "name": "value",
    "lowest": 0,
    "end": 5,
    "before": [],
    "grad": normal(3, N),
    "lse": normal(4, N).exp(),
}
PER_ROW = {"temperature": 1.0, "temperature_tensor": torch.full((N,), 0.2)}
ALL_IDS = {"chain_ids": torch.arange(N) + 2**33, "query_ids": IDS, "key_ids": torch.arange(M) % 4}
COUNTERS = {"seed_tensor": torch.tensor(-5), "step_tensor": torch.tensor(3)}
# What walks have no use for: a second id of each row, and weights of keys.
SCORED = {"carried_ids": torch.arange(N) % 3 + 1, "key_ids": torch.arange(M) % 4, "log_proposal": normal(7, M)}
OF_ROWS = ("queries", "items", "state_key", "state_score", "grad", "lse", "key", "score")
NO_ROWS = {name: USUAL[name][:0] for name in OF_ROWS}
POSITIVE = normal(6, N).exp()
ONE = {
    **dict.fromkeys(("queries", "keys"), normal(5, N, D)),
    **dict.fromkeys(("chain_ids", "query_ids", "carried_ids", "key_ids", "key_labels", "state_key"), IDS),
    **dict.fromkeys(("temperature_tensor", "log_proposal", "state_score", "grad", "lse"), POSITIVE),
    **{"key": IDS[:, None], "score": POSITIVE[:, None]},
    **dict.fromkeys(("seed_tensor", "step_tensor"), torch.tensor(3)),
}

OPERANDS = {
    "usual": {},
    "ids": ALL_IDS,
    "key ids alone": {"key_ids": torch.arange(M)},
    "a temperature for each row": PER_ROW,
    "no rows": NO_ROWS,
    "no rows, no temperatures": NO_ROWS | {"temperature_tensor": torch.ones(0)},
    "no keys": {"keys": USUAL["keys"][:0]},
    "bfloat16": {name: USUAL[name].bfloat16() for name in ("queries", "keys")},
    "rows apart": {"queries": normal(4, N, 2 * D)[:, :D], "keys": normal(5, 2 * M, D)[::2]},
    "one row": {"queries": normal(0, 1, D).expand(N, D)},
    "differentiable": {name: USUAL[name].clone().requires_grad_() for name in ("queries", "keys")},
    "one tensor": ONE,
    "one tensor, one temperature": ONE | {"temperature_tensor": None},
}
WALKS = OPERANDS | {
    "everything": ALL_IDS
    | PER_ROW
    | COUNTERS
    | {"log_proposal": normal(7, M), "key_labels": torch.arange(M), "burn_in": 1, "num_samples": 3}
    | {"return_accepts": True, "return_lse": True},
    "drawn": {"num_draws": 7, "num_samples": 2},
    "drawn, ids": ALL_IDS | COUNTERS | {"num_draws": 5, "temperature_tensor": torch.tensor(0.2).expand(N)},
    "positions": {"positions": torch.arange(N * 7).view(N, 7) % M},
    "positions, ids": ALL_IDS | {"positions": torch.arange(N * 7).view(N, 7) % M, "burn_in": 3},
    "a shard": {"first_proposal": 3, "num_samples": 2},
}
LABELS = torch.arange(5)
SCORES = OPERANDS | {
    "carried ids alone": {name: SCORED[name] for name in ("carried_ids", "key_ids")},
    "log_proposal alone": {"log_proposal": SCORED["log_proposal"]},
    "all of a score": ALL_IDS | PER_ROW | SCORED,
    "all of a score, rows apart": OPERANDS["rows apart"]
    | {"carried_ids": torch.arange(2 * N)[::2] % 4, "key_ids": torch.arange(3 * M)[::3] % 4}
    | {"log_proposal": normal(7, 2 * M)[::2]},
}
SUMS = {
    **SCORES,
    **{
        f"{name}, symmetric": OPERANDS[name]
        | {"symmetric": True}
        | {key: (USUAL | OPERANDS[name]).get(query) for key, query in (("keys", "queries"), ("key_ids", "query_ids"))}
        for name in OPERANDS
        if name not in ("no keys", "key ids alone")
    },
    "one operand, other ids": {"keys": USUAL["queries"], "query_ids": IDS, "key_ids": IDS.flip(0)},
    "all of a score, symmetric": PER_ROW
    | {"keys": USUAL["queries"], "query_ids": IDS, "key_ids": IDS, "symmetric": True}
    | {"carried_ids": (IDS + 1) % 4, "log_proposal": normal(7, N)},
}
RESAMPLED = SCORES | {
    "everything": ALL_IDS | PER_ROW | COUNTERS | SCORED | {"key_labels": torch.arange(M) - 9, "first_key": 2**32 + 3},
    "four of its own": {"key": torch.arange(N * 4).view(N, 4), "score": normal(8, N, 4)},
    "none of its own": {"key": torch.arange(0).view(N, 0), "score": torch.ones(N, 0)},
    "its own alone": {"keys": USUAL["keys"][:0], "key": torch.arange(N * 2).view(N, 2), "score": normal(8, N, 2)},
    "its own apart": {"key": torch.arange(N * 6).view(N, 6)[:, ::2], "score": normal(8, 3, 2 * N).T[::2]},
    "differentiable, all of it": SCORED
    | OPERANDS["differentiable"]
    | {"score": normal(8, N, 2).requires_grad_(), "key": torch.arange(N * 2).view(N, 2)}
    | {"temperature_tensor": torch.full((N,), 0.2, requires_grad=True)},
}
TABLE = {
    "label_at": {
        "usual": {"position": torch.arange(N) % M - 1, "key_labels": torch.arange(M)},
        "apart": {"position": (torch.arange(N * 2) % M)[::2], "key_labels": torch.arange(M * 3)[::3]},
        "no keys": {"position": torch.full((N,), -1), "key_labels": torch.arange(0)},
        "one tensor": {"position": LABELS, "key_labels": LABELS},
    },
    "look_within": {
        "usual": {"value": IDS, "before": [torch.zeros(()), normal(7, 3)]},
        "counters of one tensor": {"value": LABELS, "before": [LABELS, LABELS]},
        "positions": {"value": torch.arange(N * 2).view(N, 2) % 5},
        "rows apart": {"value": (torch.arange(N * 2) % 5)[::2]},
        "no rows": {"value": IDS[:0]},
    },
    "read_rows": {
        "vectors": {"table": normal(8, N, D), "slots": IDS},
        "numbers, rows apart": {"table": torch.arange(2 * N)[::2], "slots": (torch.arange(N * 2) % 5)[::2]},
        "no rows": {"table": normal(8, N, D), "slots": IDS[:0]},
        "one tensor": {"table": LABELS, "slots": LABELS},
    },
    "contrastive_lse": SUMS,
    "contrastive_lse_backward": SUMS
    | {f"{name}, keys not wanted": SUMS[name] | {"keys_wanted": False} for name in ("ids", "one tensor, symmetric")},
    "gumbel_sample": SCORES | {"everything": ALL_IDS | PER_ROW | COUNTERS | SCORED | {"num_samples": 3}},
    "isir_step": RESAMPLED,
    "mh_step": WALKS,
    "mh_transition": WALKS,
    "view_coin": {
        "usual": {},
        "counters": COUNTERS,
        "no rows": NO_ROWS,
        "rows apart": {"items": torch.arange(2 * N)[::2]},
        "one tensor": ONE,
    },
}
CASES = [(name, case) for name, cases in TABLE.items() for case in cases]
every_case = pytest.mark.parametrize(("name", "case"), CASES, ids=[", ".join(case) for case in CASES])


def operator(name):
    return getattr(torch.ops.emc2_kernels, name).default


def arguments(name, case, backend="auto"):
    given = USUAL | {"backend": backend} | TABLE[name][case]
    if "positions" in given or "num_draws" in given:
        count = given["positions"].shape[1] if "positions" in given else given["num_draws"]
    else:
        count = 0 if given["keys"] is None else len(given["keys"])
    given["total_proposals"] = given["first_proposal"] + count
    return [given.get(argument.name) for argument in operator(name)._schema.arguments]


def test_every_operator_has_cases():
    names = [name.removeprefix("emc2_kernels::") for name in torch._C._dispatch_get_all_op_names()]
    registered = {name for name in names if hasattr(torch.ops.emc2_kernels, name)}
    assert registered == set(TABLE)
    assert len(registered) == len(LIBRARY._op_defs)


UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@every_case
def test_opcheck(name, case):
    """Schema, autograd, fake tensors, and symbolic shapes; of copies, so that no two arguments are one tensor here."""
    given = tuple(arguments(name, case))
    # The last adds all results to the first, which cannot be where that is of integers: here they come the other way.
    differentiable = any(isinstance(value, torch.Tensor) and value.requires_grad for value in given)
    backwards = name == "isir_step" and differentiable
    torch.library.opcheck(operator(name), given, test_utils=UTILS[: -1 if backwards else None])
    if backwards:
        aot_autograd_check(lambda *args: operator(name)(*args)[::-1], given, {}, dynamic=True)


# In Triton's interpreter, where a call takes half a second, a transition is asked less: its kernels are the step's.
ON_TRITON = ("rows apart", "one tensor", "everything", "drawn, ids", "positions, ids", "a shard")


@pytest.mark.parametrize(
    ("backend", "name", "case"),
    [
        (backend, name, case)
        for backend in RUNNABLE
        for name, case in CASES
        if ((backend, name) != ("triton", "mh_transition") or case in ON_TRITON)
    ],
)
def test_arguments_as_they_lie_in_memory(backend, name, case):
    """What opcheck's copies lose, strides and all that is one tensor: nothing is written to nor handed back, the fake
    results are like the real ones, and these are those of copies."""
    given = arguments(name, case, backend)
    with SchemaCheckMode(), CrossRefFakeMode():
        found = operator(name)(*given)
    copies = [value.detach().clone() if isinstance(value, torch.Tensor) else value for value in given]
    expected = operator(name)(*copies)
    torch.testing.assert_close(found, expected, equal_nan=True)
