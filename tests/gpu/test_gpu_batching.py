"""The similarity graph of embeddings on a GPU is that of the CPU, up to ties."""

import pytest
import torch

from emc2_kernels.batching import GlobalContrastiveBatchSampler, global_train_gap, similarity_graph

pytest.importorskip("scipy")
pytestmark = pytest.mark.gpu


def clusters(n, d=64):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n // 50, d, generator=generator)
    return centres[torch.randint(len(centres), (n,), generator=generator)] + torch.randn(n, d, generator=generator)


@pytest.mark.parametrize("scope", ["global", "row"])
@pytest.mark.parametrize("towers", [1, 2])
def test_graph_is_that_of_the_cpu(scope, towers):
    x, y = clusters(7000), clusters(7000) + 0.1  # more than the threshold's sample has rows
    arguments = (x, y)[:towers]
    expected, actual = (
        similarity_graph(*(rows.to(device) for rows in arguments), quantile=0.99, scope=scope)
        for device in ("cpu", "cuda")
    )
    different = (expected.matrix != actual.matrix).nnz
    assert different <= 1e-3 * expected.facts.entries
    assert abs(expected.facts.level - actual.facts.level) < 1e-5
    assert expected.facts.capped_rows == actual.facts.capped_rows


def test_sampler_and_gap_take_embeddings_on_the_gpu():
    x = clusters(3000).cuda()
    y = x + 0.1 * torch.randn_like(x)
    sampler = GlobalContrastiveBatchSampler(3000, 32, quantile=0.99, drop_last=True)
    before = global_train_gap(x, y, sampler, 0.1)
    sampler.update(x, y)
    batches = list(sampler)
    assert len({item for batch in batches for item in batch}) == 3000 // 32 * 32
    after = global_train_gap(x, y, batches, 0.1)
    assert after.gap < before.gap - 0.5
    on_cpu = global_train_gap(x.cpu(), y.cpu(), batches, 0.1)
    assert abs(after.gap - on_cpu.gap) < 1e-3
