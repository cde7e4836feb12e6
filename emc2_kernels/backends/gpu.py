"""What a machine needs for the GPU backends. Nothing here imports Triton or starts CUDA before it is asked."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch

from .params import WalkParams

# Where the CUDA kernels and Triton's meet. Not measured yet (`bench.gpu.benchmark` prints both sides).
SMALL_SWEEP = 1024  # rows, keys
SMALL_SWEEP_MULTIPLIES = 1 << 24  # n * m * d
FEW_CHAINS = 1024
FEW_CHAINS_PROPOSALS = 4096

# What Hopper's sweep on matrix units takes.
MATRIX_SWEEP_ARCHITECTURE = 90
MATRIX_SWEEP_KEYS = 128  # or a multiple
MATRIX_SWEEP_LARGEST_D = 512


class Won(NamedTuple):
    """From which number of rows on it walks faster than Triton's kernel, by a results file in bench/results."""

    card: str
    d: int  # of the measurement; it stands for those above the card's next smaller one
    least_n: int  # NEVER: for none


NEVER = 1 << 62

# "auto" takes it for these alone (`python -m bench.gpu.matrix_sweep --won FILE` prints rows, and a test holds them
# against the files). There is no results file of a GPU yet.
MATRIX_SWEEP_WON: tuple[Won, ...] = ()

OLDEST = (8, 0)  # compute capability: bfloat16 in the matrix unit, asynchronous copies


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors (for tests; it is slow)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreted_devices() -> tuple[str, ...]:
    return ("cpu",) if interpreting() else ()


def asserts() -> bool:
    """Whether kernels look at values that the host does not: ids, temperatures and positions in a GPU's memory.

    ``EMC2_DEVICE_ASSERTIONS=0`` leaves that out, from the start of the process on. A value out of range then reads
    memory that is not the caller's, or draws from another chain's stream.
    """
    return os.environ.get("EMC2_DEVICE_ASSERTIONS", "1") != "0"


def why_no_gpu() -> str | None:
    if torch.version.hip is not None:
        return "the GPU kernels are written for NVIDIA GPUs, and this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        have, need = ".".join(map(str, capability)), ".".join(map(str, OLDEST))
        return f"compute capability {need} or newer is needed, and {torch.cuda.get_device_name()} has {have}"
    return None


def architecture(device_index: int | None = None) -> int:
    """As nvcc counts: 90 for compute capability 9.0. None: of the current device."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def is_small_sweep(walk: WalkParams) -> bool:
    """Whether a warp for each chain is the fast way, beside matrix units."""
    (n, d), m = walk.queries.shape, walk.keys.shape[0]
    return n <= SMALL_SWEEP and m <= SMALL_SWEEP and n * m * d <= SMALL_SWEEP_MULTIPLIES


def takes_matrix_sweep(walk: WalkParams, more_results: bool) -> bool:
    """Whether the CUDA kernel for Hopper's matrix units (csrc/cuda/sweep_sm90.cu) can walk this.

    Args:
        walk: of any kind.
        more_results: whether accepted proposals are counted, or the log-sum-exp is wanted, too.
    """
    queries, keys = walk.queries, walk.keys
    if not walk.is_sweep or more_results or walk.log_proposal is not None or queries.dtype == torch.float32:
        return False
    whole_tiles = keys.shape[0] > 0 and keys.shape[0] % MATRIX_SWEEP_KEYS == 0 and walk.first_proposal % 4 == 0
    if not whole_tiles or not 0 < queries.shape[1] <= MATRIX_SWEEP_LARGEST_D:
        return False
    # Rows that share memory, as of `expand`, are none that a tensor map is documented for.
    plain = all(rows.stride(0) % 8 == 0 and rows.stride(0) >= rows.shape[1] for rows in (queries, keys))
    aligned = all(rows.data_ptr() % 16 == 0 for rows in (queries, keys))
    return plain and aligned and architecture(queries.get_device()) == MATRIX_SWEEP_ARCHITECTURE


def prefers_cuda_kernels(walk: WalkParams, more_results: bool = False) -> bool:
    """Whether the CUDA kernels are the fast way, beside Triton's sweep on matrix units and its splits.

    A warp walks a whole chain there, so few chains of many proposals would leave the GPU idle. Hopper's kernel has to
    have won on a card of this name.
    """
    if not walk.is_sweep:
        return walk.queries.shape[0] >= FEW_CHAINS or walk.num_proposals <= FEW_CHAINS_PROPOSALS
    if is_small_sweep(walk):
        return True
    if not MATRIX_SWEEP_WON or not takes_matrix_sweep(walk, more_results):
        return False
    (n, d), card = walk.queries.shape, torch.cuda.get_device_name(walk.queries.get_device())
    measured = min((won for won in MATRIX_SWEEP_WON if won.card == card and d <= won.d), default=None)
    return measured is not None and n >= measured.least_n


def why_no_triton() -> str | None:
    reason = None if interpreting() else why_no_gpu()
    return _why_triton_does_not_import() if reason is None else reason


@cache
def _why_triton_does_not_import() -> str | None:
    """Tried only where there is something to run it on. A broken installation raises anything."""
    try:
        import_module(".triton.mh", __package__)
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "Triton is not installed: pip install triton"
        return f"Triton does not import ({error}): pip install --force-reinstall triton"
    except Exception as error:
        return f"Triton does not import ({type(error).__name__}: {error}): pip install --force-reinstall triton"
    return None
