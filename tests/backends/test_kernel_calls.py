"""The structs of csrc/params.h, as Python fills them in."""

import re

import pytest
import torch

from emc2_kernels.backends import kernel_calls
from emc2_kernels.backends.cpu.build import library
from emc2_kernels.backends.params import ScoreParams, WalkParams


def keywords(struct) -> list[str]:
    with pytest.raises(TypeError) as raised:
        struct()
    return re.search(r"takes exactly these keywords: (.*)", str(raised.value))[1].split(", ")


class Names:
    """In the place of a compiled module: the keywords of each struct, in the order of the call."""

    def __getattr__(self, struct):
        return lambda **fields: list(fields)


WALK = WalkParams(torch.ones(2, 3), torch.ones(4, 3), 1.0, 0, 0, *[None] * 6, 0, 1, 0, 4)


def test_fields_have_the_names_of_the_python_parameters():
    core = library()
    tensors = {"queries", "keys"}  # Operands has them
    assert set(WalkParams._fields) - tensors - {"num_draws"} <= set(keywords(core.WalkParams))
    assert set(ScoreParams._fields) - tensors - {"symmetric"} <= set(keywords(core.GumbelParams))
    assert tensors <= set(keywords(core.Operands))


def test_fields_are_given_in_their_order():
    """Which is the fast way; another one is right too."""
    core, names = library(), Names()
    assert kernel_calls.walk_params(names, WALK, (0, 0), (0, 0)) == keywords(core.WalkParams)
    assert kernel_calls.operands(names, WALK.queries, WALK.keys) == keywords(core.Operands)
    assert kernel_calls.stream_params(names, (0, 0), (0, 0), torch.arange(2)) == keywords(core.StreamParams)
    given = []
    kernel_calls.step(names, lambda *call: given.extend(call), WALK, *[torch.ones(2)] * 2, None, True, True)
    kernel_calls.transition(names, lambda *call: given.extend(call), WALK)
    found = [value for value in given if isinstance(value, list)]
    assert found == [keywords(struct) for struct in (core.StepInput, core.StepOutput, core.TransitionOutput)]


def test_the_order_of_keywords_makes_no_difference():
    core, items, results = library(), torch.arange(300), []
    fields = {"seed": 7, "seed_address": 0, "step": 3, "step_address": 0, "chain_ids": items.data_ptr()}
    for given in (fields, dict(reversed(fields.items()))):
        views = torch.empty_like(items)
        core.view_coins(core.StreamParams(**given), len(items), views.data_ptr())
        results.append(views)
    assert torch.equal(*results) and 0 < results[0].sum() < len(items)


@pytest.mark.parametrize(
    "changes",
    [{"lse": None}, {"seed": 1}, {"key": "x"}, {"key": 1.5}],
    ids=["too few", "too many", "text", "a fraction"],
)
def test_what_is_no_field_or_no_value_of_one_is_refused(changes):
    struct = library().StepOutput
    fields = {name: 0 for name in keywords(struct)} | changes
    with pytest.raises(TypeError):
        struct(**{name: value for name, value in fields.items() if value is not None})
    with pytest.raises(TypeError):
        struct(*[0] * len(keywords(struct)))


def test_numbers_out_of_range_are_refused():
    fields = {name: 0 for name in keywords(library().StreamParams)}
    for changes in ({"seed": -1}, {"seed": 1 << 64}, {"chain_ids": 1 << 64}, {"step": 1 << 32}):
        with pytest.raises(OverflowError):
            library().StreamParams(**fields | changes)
