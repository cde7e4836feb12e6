"""The closed form of a chain's law beside the powers of its transition matrix."""

import pytest
import torch

from bench.mixing import UniformWalk
from examples.study.sampler import laws

PROPOSALS = [1, 2, 3, 10, 64, 400]


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_the_law_is_that_of_the_transition_matrix(spread) -> None:
    scores = spread * torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    scores[1] = scores[0]  # states of one weight
    walk, target = UniformWalk(scores), scores.softmax(0)
    order = target.argsort()
    for proposals, law in zip(PROPOSALS, laws(scores, PROPOSALS), strict=True):
        torch.testing.assert_close(walk.law(proposals), law[order], rtol=1e-9, atol=1e-13)
        assert walk.distance(proposals) == pytest.approx((law - target).abs().sum().item() / 2, abs=1e-13)


def test_the_fewest_proposals_are_found() -> None:
    walk = UniformWalk(3 * torch.randn(200, generator=torch.Generator().manual_seed(0)))
    for distance in (0.5, 0.1, 0.01):
        fewest = walk.proposals_to(distance)
        assert walk.distance(fewest) <= distance < walk.distance(fewest - 1)
    assert UniformWalk(torch.zeros(7)).proposals_to(1e-9) == 1  # where the target is what is proposed


def test_probabilities_that_are_zero_in_float64_do_no_harm() -> None:
    walk = UniformWalk(torch.tensor([0.0, -2000.0, -1.0, -3000.0]))
    kept = UniformWalk(torch.tensor([0.0, -600.0, -1.0, -600.0]))
    assert walk.distance(1) == pytest.approx(0.5) and walk.distance(20) == pytest.approx(kept.distance(20))
