"""The float64 oracle of the smoke stage and its comparisons: right where they must be, silent only near ties."""

import json

import oracle
import pytest
import torch

import emc2_kernels as emc2
from bench.gpu import families, smoke
from bench.gpu import oracle as gpu_oracle
from bench.gpu.trial import Case, compare, compare_exactly, compare_rows, merge_cases


def toy_problem(**changes):
    problem = families.walk_problem((30, 60), 16, torch.float32, 0.35, "sweep", False)
    return problem._replace(**changes)


def entering_at(problem, rows, distance):
    """Chains that enter so far above the threshold of their first proposal."""
    one = problem._replace(keys=problem.keys[:1], options={})
    state = emc2.MHState(problem.state.key.clone(), problem.state.score.clone())
    state.key[rows], state.score[rows] = 77, (gpu_oracle.walk(one).threshold[rows] + distance).float()
    return problem._replace(state=state)


@pytest.mark.one_seed  # the rows that it names must be clear of ties
@pytest.mark.parametrize(("distance", "compared", "mismatches"), [(0.0, 29, 0), (5e-6, 29, 0), (1e-3, 30, 1)])
def test_a_row_near_a_tie_is_not_compared(distance, compared, mismatches):
    """Row 0 enters just above or below its first threshold, and the kernel has decided otherwise."""
    for side in (-1, 1):
        problem = entering_at(toy_problem(), [0], side * distance)
        result = families.run_step(problem, "reference")
        # As if the decision at the first proposal had been the other one, and all later ones had followed it.
        result.state.key[0] += 1
        result.samples[0] += 1
        chains, threshold = gpu_oracle.judge_walk("x", problem, result)
        assert (chains.rows, chains.compared, chains.mismatches) == (30, compared, mismatches)
        assert threshold.mismatches == 0 and (chains.failure() is None) == (mismatches == 0)


@pytest.mark.one_seed  # the rows that it names must be clear of ties
@pytest.mark.parametrize(("ties", "status"), [(3, "PASS"), (4, "FAIL")])
def test_too_many_ties_are_a_failure(ties, status):
    problem = entering_at(toy_problem(), list(range(ties)), 0.0)
    record = smoke.verdict(gpu_oracle.judge_walk("x", problem, families.run_step(problem, "reference")))
    assert record["status"] == status
    assert record["why"] == ("x chains: only 26 of 30 rows are clear of ties" if status == "FAIL" else "")


@pytest.mark.parametrize(("lead", "mismatches", "compared"), [(1e-5, 0, 29), (1e-3, 1, 30)])
def test_a_race_that_rounding_decides_is_not_compared(lead, mismatches, compared):
    """Scores that undo the noise, but for two keys: row 4's second is drawn, and is so far behind the first."""
    n, m = 30, 8
    noise = gpu_oracle.rng.gumbel(torch.arange(n), range(m), seed=7, step=3, sample=0, dtype=torch.float64)
    sums = torch.zeros(n, m, dtype=torch.float64)
    sums[:, 0], sums[:, 1] = 2.0, 1.0
    sums[4, 1] = 2.0 - lead
    problem = gpu_oracle.Problem(sums - noise, torch.eye(m, dtype=torch.float64), 1.0, 7, 3)
    drawn = torch.zeros(n, 1, dtype=torch.int64)
    assert gpu_oracle.judge_gumbel("x", problem, 1, drawn)[0].mismatches == 0
    drawn[4] = 1
    (case,) = gpu_oracle.judge_gumbel("x", problem, 1, drawn)
    assert (case.mismatches, case.compared) == (mismatches, compared)
    assert case.largest_error == pytest.approx(lead, rel=1e-6) and (case.failure() is None) == (mismatches == 0)


# The oracle and the comparison.


@pytest.mark.parametrize("kind", ["sweep", "uniform", "given"])
def test_the_oracle_is_the_literal_walk(kind):
    shape = (23, 31) if kind == "sweep" else (23, 31, 40)
    problem = families.walk_problem(shape, 9, torch.bfloat16, 0.3, kind, True)
    problem.keys[4] = torch.nan
    walked = gpu_oracle.walk(problem)
    counter = {"seed": problem.seed, "step": problem.step, "temperature": problem.temperature}
    options = {**problem.options, "chain_ids": gpu_oracle.chain_ids(problem)}
    started = problem.state._replace(key=torch.where(problem.state.score > -torch.inf, problem.state.key, -1))
    literal = oracle.walk(problem.queries, problem.keys, started, **counter, **options)
    for name in ("samples", "key", "accepted"):
        assert torch.equal(getattr(walked, name), getattr(literal, name)), name
    for name in ("score", "threshold", "closest_tie"):
        torch.testing.assert_close(getattr(walked, name), getattr(literal, name), rtol=1e-12, atol=1e-12)
    if kind == "sweep":
        queries, keys = problem.queries.double(), problem.keys.double()
        ids = {name: problem.options[name] for name in ("query_ids", "key_ids")}
        lse = emc2.contrastive_lse(
            queries, keys, temperature=problem.temperature.double(), backend="reference", **ids
        )  # fmt: skip
        torch.testing.assert_close(walked.lse, lse, rtol=1e-12, atol=1e-12)


def test_operands_make_walks_that_depend_on_their_scores():
    """A walk that accepted nearly all or nearly nothing would be right whatever the scores were."""
    for d, temperature in ((128, 0.35), (512, 0.5)):
        problem = families.walk_problem((100, 300), d, torch.bfloat16, temperature, "sweep", False)
        share = gpu_oracle.walk(problem).accepted[1::2].double().mean() / 300
        assert 0.3 < share < 0.75
        assert 0.6 < gpu_oracle.similarities(problem).std() < 1.2


def test_half_of_the_chains_have_states_of_all_kinds():
    state = families.incoming_state(64, 0.35)
    assert (state.key >= 0).sum() == 32 and state.score.isnan().any() and (state.score == 1000).any()
    assert (state.score[1::2] == -torch.inf).all()


def test_shapes_take_both_of_a_kernels_ways_on_an_h100():
    from emc2_kernels.backends.triton import tuning

    def splits(shape, block):
        return tuning.splits(-(-shape[0][0] // block), -(-shape[0][1] // 128), 132)

    for half, d in ((True, 128), (True, 512), (True, 100), (False, 128)):
        block = tuning.sweep(9, half, d, families.FILLS[0][0]).block_m
        assert splits(families.FILLS, block) == 1
        assert splits(families.SPLIT, tuning.sweep(9, half, d, 3000).block_m) in range(2, 12)
        assert splits(families.FILLS, tuning.lse(9, half).block_m) == 1
    assert tuning.splits(3001, -(-300 // tuning.gathered(9).block_k), 4 * 132) == 1
    assert tuning.splits(40, -(-1000 // tuning.gathered(9).block_k), 4 * 132) > 1


def test_comparisons():
    infinity, nan = torch.inf, torch.nan
    expected = torch.tensor([1.0, -infinity, 2.0, 3.0], dtype=torch.float64)
    assert compare("x", expected.float(), expected, 0.0).failure() is None
    one = compare("x", torch.tensor([1.0, -infinity, 2.0, 3.25]), expected, torch.tensor([1e-9, 1e-9, 1e-9, 0.2]))
    assert (one.mismatches, one.largest_error, one.bound) == (1, 0.25, pytest.approx(0.2))
    for wrong in (nan, infinity, -infinity):
        case = compare("x", torch.tensor([1.0, -infinity, wrong, 3.0]), expected, 10.0)
        assert case.mismatches == 1 and json.loads(json.dumps(case.record()))["largest_error"] is None
        assert compare(
            "x", torch.tensor([1.0, wrong if wrong != -infinity else 0.0, 2.0, 3.0]), expected, 10.0
        ).mismatches
    nothing_off = compare(
        "x", torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.5]]).double(), torch.tensor([[0.0, 1.0]])
    )
    assert (nothing_off.mismatches, nothing_off.largest_error) == (0, 0.5)
    with pytest.raises(ValueError, match="shape"):
        compare("x", expected[:3], expected, 1.0)
    matrix = torch.eye(3, dtype=torch.float64) * 2
    assert compare("x", matrix + 0.1, matrix, torch.tensor([1.0, 0.05, 1.0])).mismatches == 1
    assert compare_rows("x", matrix * 1.1, matrix, 0.11).mismatches == 0
    case = compare_rows("x", matrix * torch.tensor([[1.0], [1.2], [1.0]]), matrix, 0.11)
    assert case.mismatches == 1 and case.largest_error == pytest.approx(0.2)
    tiny = matrix * torch.tensor([[1.0], [1.0], [1e-9]])
    assert (
        compare_rows("x", tiny + 1e-6, tiny, 0.11).mismatches == 0
    )  # a row of nothing has no length to be measured by
    assert compare_exactly("x", torch.tensor([1, 2]), torch.tensor([1, 3])).mismatches == 1
    assert compare_exactly("x", torch.tensor(2), torch.tensor(2)).failure() is None
    with pytest.raises(ValueError, match="int32"):
        compare_exactly("x", torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2]))


def test_a_familys_largest_error_is_the_one_nearest_to_its_bound():
    cases = [Case("a", 1, 1, 0, 0.5, 1.0), Case("b", 1, 1, 0, 0.9, 1.0), Case("c", 1, 1, 0, 7.0, 100.0)]
    assert smoke.verdict(cases) == {"status": "PASS", "largest_error": 0.9, "why": ""}
    wrong = smoke.verdict([*cases, Case("d", 9, 9, 2, 0.1, 0.0), Case("e", 9, 1, 0, 0.0, 0.0)])
    assert wrong["largest_error"] == 0.1 and wrong["status"] == "FAIL"
    assert wrong["why"].startswith("d: 2 of 9 compared rows differ") and "; e: only 1 of 9 rows" in wrong["why"]


def test_cases_of_one_name_become_one():
    cases = [Case("a", 10, 9, 0, 0.1, 1.0), Case("a", 10, 10, 2, 0.5, 2.0, {"x": 1}), Case("b", 1, 1, 0, 0.0, 0.0)]
    assert merge_cases(cases) == [Case("a", 20, 19, 2, 0.5, 2.0, {"x": 1}), cases[2]]
    assert Case("a", 100, 89, 0, 0.0, 1.0).failure() and Case("a", 100, 90, 0, 0.0, 1.0).failure() is None
