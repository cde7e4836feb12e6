"""The two-modality example: what it measures, learns and refuses."""

from __future__ import annotations

import pytest
import torch

from examples.pretrain import data
from examples.two_towers import halves

SHORT = halves.Settings(epochs=6, quiet=True)


def test_retrieval_counts_ranks_and_ties_against_it():
    queries = torch.eye(3)
    keys = torch.tensor([[1.0, 0, 0], [0.9, 0.8, 0], [0, 1.0, 0.1]])
    # Ranks: 1 (1 against 0.75 and 0); 2 (0.66 behind 0.995); 1 (0.1 against 0 and 0).
    assert halves.retrieve(queries, keys) == pytest.approx((2 / 3, (1 + 0.5 + 1) / 3))
    collapsed = torch.ones(10, 4)
    assert halves.retrieve(collapsed, collapsed) == pytest.approx((0, 0.1))
    assert halves.retrieve(queries, 5 * queries) == (1, 1)


def test_halves_of_a_row_are_of_one_digit():
    train, test = halves.halves()
    assert [len(half) for half in (*train, *test)] == [1257, 1257, 540, 540]
    whole = torch.cat([half.view(-1, 8, 4) for half in train], dim=2)
    assert torch.equal(whole, data.digits().train_images[:, 0])


@pytest.mark.parametrize("method", halves.METHODS)
def test_training_finds_other_halves(method):
    cells = halves.row(method, SHORT, *halves.halves())
    assert len(cells) == len(halves.HEADER) and cells[0] == method
    left_recall, left_rank, right_recall, right_rank = map(float, cells[1:5])
    # chance is 0.2 % at rank 1 and 1.3 % of reciprocal rank
    assert min(left_recall, right_recall) > 2 and min(left_rank, right_rank) > 8


def test_a_run_is_a_function_of_its_seed():
    train, test = halves.halves()
    settings = halves.Settings(epochs=1, quiet=True)
    state = torch.get_rng_state()
    first, again = (halves.row("sogclr", settings, train, test)[:7] for _ in range(2))
    other = halves.row("sogclr", halves.Settings(epochs=1, quiet=True, seed=1), train, test)[:7]
    assert first == again and first != other
    assert torch.equal(state, torch.get_rng_state())


def test_encode_gives_each_row_its_side():
    run = halves.Run(SHORT, "sogclr", halves.halves()[0])
    run.noise_generator.manual_seed(0)
    items, views = torch.tensor([5, 9, 5, 700, 2]), torch.tensor([1, 0, 0, 1, 1])
    found = run.encode(items, views)
    assert found.shape == (5, SHORT.dim) and found.requires_grad
    run.noise_generator.manual_seed(0)
    left, right = run.tower(0, items[views == 0]), run.tower(1, items[views == 1])
    torch.testing.assert_close(found[views == 0], left)
    torch.testing.assert_close(found[views == 1], right)


def test_the_table(capsys: pytest.CaptureFixture[str]):
    assert halves.main(["--method=sogclr", "--epochs=1", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["untrained", "sogclr"] and "L>R @1" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method=simclr"], "--method: expected one of all, "),
        (["--batch-size=1"], "--batch-size: expected an integer of at least 2, got 1"),
        (["--batch-size=1258"], "--batch-size: expected at most 1257 (digits), got 1258"),
        (["--epochs=0"], "--epochs: expected an integer of at least 1, got 0"),
        (["--lr=nan"], "--lr: expected a finite number above 0, got nan"),
        (["--temperature=0"], "--temperature: expected a finite number above 0, got 0.0"),
        (["--dim=1"], "--dim: expected an integer of at least 2, got 1"),
        (["--seed=-1"], "--seed: expected an integer from 0 to below 2**63, got -1"),
        (["--batchsize=3"], "--batchsize=3"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    try:
        status = halves.main([*arguments, "--quiet"])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert expected in capsys.readouterr().err
