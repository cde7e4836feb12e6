"""What the GPU benchmark times beside the library: limits of the machine, what one would write otherwise, and graphs.

Like those in bench/peers.py, each is an object that makes one step when it is called and owns its buffers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import emc2_kernels as emc2
from bench.peers import NaiveSoftmax


class Replay:
    """A call captured as a CUDA graph; on a CPU, where a rehearsal runs, the call itself."""

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        """Warms the call up on a stream of its own, as torch asks, and captures it once."""
        self.run = call
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = call()  # kept: their memory is the graph's
        self.run = self.graph.replay

    def __call__(self) -> None:
        self.run()


class DeviceStep:
    """`mh_step` as a captured training step calls it: step and chains on the device.

    With `carry`, the chains walk on and the step advances inside, by two copies and an addition; without, each call
    makes the same step again.
    """

    def __init__(
        self, queries: Tensor, keys: Tensor, *, carry: bool, temperature: float, num_samples: int, backend: str
    ) -> None:
        """`queries` (n, d), `keys` (m, d); half of the m proposals are burn-in."""
        self.operands = (queries, keys)
        self.carry = carry
        m = keys.shape[0]
        self.options = {
            "temperature": temperature,
            "burn_in": m // 2,
            "num_samples": min(num_samples, m - m // 2),
            "backend": backend,
            "seed": torch.zeros((), dtype=torch.int64, device=queries.device),
        }
        self.state = emc2.init_state(queries.shape[0], queries.device)
        self.step = torch.zeros((), dtype=torch.int64, device=queries.device)

    def __call__(self) -> emc2.MHResult:
        result = emc2.mh_step(*self.operands, self.state, step=self.step, **self.options)
        if self.carry:
            self.state.key.copy_(result.state.key)
            self.state.score.copy_(result.state.score)
            self.step.add_(1)
        return result


class UniformStep:
    """`mh_step` with proposals drawn inside the kernel; another step, hence other draws, at each call."""

    def __init__(self, queries: Tensor, keys: Tensor, num_proposals: int, temperature: float, backend: str) -> None:
        """`queries` (n, d), `keys` (N, d)."""
        self.operands = (queries, keys)
        self.options = {"temperature": temperature, "num_samples": 16, "backend": backend, "seed": 0}
        self.options |= {"proposal": "uniform", "num_proposals": num_proposals}
        self.state = emc2.init_state(queries.shape[0], queries.device)
        self.step = 0

    def __call__(self) -> Tensor:
        self.step += 1
        return emc2.mh_step(*self.operands, self.state, step=self.step, **self.options).samples


class IndexSelect:
    """The limit of a gathered walk that keeps nothing: the proposed rows, each read and written once."""

    def __init__(self, keys: Tensor, count: int) -> None:
        """`keys` (N, d); `count` uniform rows."""
        draw = torch.Generator(keys.device).manual_seed(0)
        self.keys = keys
        self.rows = torch.randint(0, keys.shape[0], (count,), generator=draw, device=keys.device)
        self.out = keys.new_empty(count, keys.shape[1])

    def __call__(self) -> Tensor:
        return torch.index_select(self.keys, 0, self.rows, out=self.out)


class Copy:
    """The memory's limit: a copy much larger than any cache. `bytes_moved` counts bytes read and bytes written."""

    def __init__(self, megabytes: int, device: torch.device) -> None:
        self.source = torch.randint(0, 255, (megabytes << 20,), dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)
        self.bytes_moved = 2 * self.source.numel()

    def __call__(self) -> Tensor:
        return self.target.copy_(self.source)


class BlockedNaive:
    """ScoreParams, softmax and `torch.multinomial`, by blocks of rows that fit into memory."""

    def __init__(self, queries: Tensor, keys: Tensor, temperature: float, samples_per_row: int, block: int) -> None:
        """`queries` (n, d), n a multiple of `block`; `keys` (m, d)."""
        if queries.shape[0] % block:
            raise ValueError(f"block must divide the {queries.shape[0]} rows, got {block}")
        self.blocks = queries.split(block)
        self.naive = NaiveSoftmax(self.blocks[0], keys, temperature, samples_per_row)

    def __call__(self) -> Tensor:
        """Key positions (n, samples_per_row), int64."""
        drawn = []
        for block in self.blocks:
            self.naive.product.queries = block
            drawn.append(self.naive())
        return torch.cat(drawn)


class StreamingNTXent(nn.Module):
    """NT-Xent in plain torch without the (2b, 2b) scores: row blocks, computed again in the backward pass."""

    def __init__(self, temperature: float, block: int) -> None:
        """`block` rows of scores exist at a time."""
        super().__init__()
        self.temperature, self.block = temperature, block

    def forward(self, z0: Tensor, z1: Tensor, index: Tensor | None = None) -> Tensor:
        """Mean over the 2b anchors; `z0`, `z1` (b, d), products in their dtype. `index` is taken and means nothing."""
        anchors = nn.functional.normalize(torch.cat((z0, z1)).float(), dim=1).to(z0.dtype)
        positives = (anchors.float() * anchors.roll(z0.shape[0], 0).float()).sum(1) / self.temperature
        rows = range(0, len(anchors), self.block)
        parts = [checkpoint(self._lse, anchors, first, use_reentrant=False) for first in rows]
        return (torch.cat(parts) - positives).mean()

    def _lse(self, anchors: Tensor, first: int) -> Tensor:
        """(block,) log-sum-exp of the rows' scores over all other anchors."""
        block = anchors[first : first + self.block]
        scores = (block @ anchors.T).float() / self.temperature
        rows = torch.arange(len(block), device=anchors.device)
        own = torch.zeros_like(scores).index_put_((rows, rows + first), scores.new_full((), -torch.inf))
        return torch.logsumexp(scores + own, 1)


class LseStep:
    """`contrastive_lse`, or its gradient in queries and keys, which are two matrices: a kernel for each."""

    def __init__(self, queries: Tensor, keys: Tensor, temperature: float, backend: str, *, backward: bool) -> None:
        """`queries` (n, d), `keys` (m, d)."""
        self.operands = [matrix.detach().requires_grad_(backward) for matrix in (queries, keys)]
        self.options = {"temperature": temperature, "backend": backend}
        self.backward = backward
        self.lse = self.forward()
        self.grad = torch.ones_like(self.lse)

    def forward(self) -> Tensor:
        """(n,) float32."""
        return emc2.contrastive_lse(*self.operands, **self.options)

    def __call__(self) -> Tensor | tuple[Tensor, ...]:
        if not self.backward:
            return self.forward()
        return torch.autograd.grad(self.lse, self.operands, self.grad, retain_graph=True)


class IsirStep:
    """`isir_step`, forward; another step at each call, of chains that walk on."""

    def __init__(self, queries: Tensor, keys: Tensor, temperature: float, backend: str) -> None:
        """`queries` (n, d), `keys` (m, d)."""
        self.operands = queries, keys
        self.options = {"temperature": temperature, "backend": backend, "seed": 0}
        self.state = emc2.init_state(queries.shape[0], queries.device)
        self.step = 0

    def __call__(self) -> Tensor:
        """(n,) float32."""
        self.step += 1
        result = emc2.isir_step(*self.operands, self.state, step=self.step, **self.options)
        self.state = result.state
        return result.lse


def count_kernels(call: Callable[[], object], calls: int = 5) -> dict[str, float]:
    """Device activities (kernels, copies, fills) per call, by name, as torch's profiler sees them."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    counts: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name] = counts.get(event.name, 0) + 1 / calls
    return counts
