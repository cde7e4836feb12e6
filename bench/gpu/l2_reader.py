"""A kernel that reads a small buffer again and again, past the L1: what the L2 can deliver."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # numbers that a program reads at a time: four 16-byte loads of each of its threads
WARPS = 8
PROGRAMS_PER_PROCESSOR = 4  # all run at once: at 44 registers five would fit; 64 KB are on their way to each processor
READS = 257  # odd: programs that run side by side begin everywhere in the buffer


@triton.jit
def read_kernel(buffer_ptr, sums_ptr, blocks, READS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201
    """Program p reads READS blocks of the buffer, (blocks * BLOCK,) float32, from p * READS on, round and round."""
    total = tl.zeros((BLOCK,), tl.float32)
    start = tl.program_id(0) * READS
    for i in range(READS):
        at = (start + i) % blocks * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(buffer_ptr + at, cache_modifier=".cg")  # cached in the L2 alone
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))  # so that no load is left out


class L2Read:
    """Reads a buffer of about `megabytes` with all multiprocessors. `bytes_read` counts every reading."""

    def __init__(self, megabytes: float, multiprocessors: int, device: torch.device) -> None:
        self.blocks = max(1, int(megabytes * (1 << 20)) // (4 * BLOCK))
        self.buffer = torch.ones(self.blocks * BLOCK, device=device)
        self.sums = torch.empty(PROGRAMS_PER_PROCESSOR * multiprocessors, device=device)
        self.bytes_read = 4 * BLOCK * READS * self.sums.numel()

    def __call__(self) -> Tensor:
        """(programs,) float32: what each has read, added up."""
        read_kernel[(self.sums.numel(),)](self.buffer, self.sums, self.blocks, READS, BLOCK, num_warps=WARPS)
        return self.sums
