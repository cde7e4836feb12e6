"""What the GPU tests share: problems laid out in memory in awkward ways, a fast float64 oracle, the comparison.

Problems are made on the CPU, so that they and the oracle's answers are the same on every machine. All functions take
the device and the backend: ``EMC2_GPU_REHEARSAL=reference,cpu pytest tests/gpu -m gpu`` runs all that a CPU can.
"""

import contextlib
import os
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Walked, unit

import emc2_kernels as emc2
from emc2_kernels import rng

CHECKOUT = Path(__file__).resolve().parents[2]
REHEARSAL = tuple(filter(None, os.environ.get("EMC2_GPU_REHEARSAL", "").split(",")))  # CPU backends; none: no rehearsal
GPU_BACKENDS = ("triton", "cuda")
BACKENDS = REHEARSAL or (*GPU_BACKENDS, "auto")
ON_GPU = torch.cuda.is_available() and not REHEARSAL
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")

# lg2.approx is off by at most 2^-22, absolutely inside (0.5, 2) and relatively elsewhere, and E = -ln 2 * lg2(u) is at
# most 16.7; what remains is the rounding of E and of score + E.
DRAW_ERROR = 5e-6

COUNTER = {"temperature": 0.2, "seed": 7, "step": 3}


def share_of(nodeid, count):
    """Which of ``count`` shares a test is in: by a hash, as every k-th test would be of one backend."""
    return zlib.crc32(nodeid.encode()) % count


def similarity_error(d):
    """Of a float32 sum of d products of unit vectors; matrix units truncate what they add, so errors add up in d."""
    return 3e-6 + 4e-9 * d


def score_error(temperature, d, dots=None):
    """Bound of |s + E - s'| in float32, (n,) or (): where a tie is closer, backends may walk on differently."""
    dots = similarity_error(d) if dots is None else dots
    return dots / torch.as_tensor(temperature, dtype=torch.float64) + DRAW_ERROR


def dims_and_dtypes(dims):
    """float16 takes bfloat16's way, so a few sizes of it do."""
    few = [d for d in dims if d in (1, 17, 64, 128, 768)]
    return [(d, dtype) for dtype in (torch.float32, torch.bfloat16) for d in dims] + [(d, torch.float16) for d in few]


def unsupported(error, backend):
    """Whether an error says, naming the backend, that it does not take such operands or has no such operation: it may
    leave some to others."""
    if not isinstance(error, ValueError):
        return isinstance(error, NotImplementedError)
    said = str(error)
    return said.startswith(f"backend {backend!r} takes") or said.endswith(f"for this operation, got {backend!r}")


def run(operator, *arguments, backend, **options):
    """Calls it; a test of something that the backend declines by name is skipped, with its reason."""
    try:
        return operator(*arguments, backend=backend, **options)
    except (ValueError, NotImplementedError) as error:
        if unsupported(error, backend):
            pytest.skip(str(error))
        raise


def generator(seed):
    return torch.Generator().manual_seed(seed)


def integers(*shape, seed, dtype=torch.float32):
    """Vectors of -1, 0 and 1: their products are exact in every dtype and order of addition, also in tf32."""
    return torch.randint(-1, 2, shape, generator=generator(seed)).to(dtype)


def problem(n, m, d, dtype=torch.float32, seed=1, **options):
    """Operands, state and options of one call, on the CPU."""
    return {"queries": unit(n, d, seed=seed, dtype=dtype), "keys": unit(m, d, seed=seed + 1, dtype=dtype)} | {
        "state": emc2.init_state(n),
        **COUNTER,
        **options,
    }


LAYOUTS = {  # columns before the operand in memory, columns after it: the row stride is the sum with d
    "contiguous": (0, 0),
    "aligned rows": (0, 64),
    "8-byte rows": (4, 0),
    "odd": (1, 2),
}


def lay_out(matrix, layout, device):
    """The matrix on the device, as a window of a wider one whose other elements are NaN."""
    before, after = LAYOUTS[layout]
    rows, d = matrix.shape
    wide = torch.full((rows, before + d + after), torch.nan, dtype=matrix.dtype, device=device)
    window = wide[:, before : before + d]
    window.copy_(matrix)
    return window


def moved(values, device):
    """The same dictionary with every tensor on the device."""
    out = {}
    for name, value in values.items():
        if isinstance(value, emc2.MHState):
            value = emc2.MHState(*(field.to(device) for field in value))
        out[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    return out


def step_of(values, device, backend, layout="contiguous", **options):
    """mh_step of a problem on the device; the result comes back to the CPU."""
    values = moved(values, device) | options
    for name in ("queries", "keys"):
        values[name] = lay_out(values[name], layout, device)
    result = run(emc2.mh_step, *(values.pop(name) for name in ("queries", "keys", "state")), backend=backend, **values)
    return on_cpu(result)


def on_cpu(result):
    fields = [field.cpu() if isinstance(field, torch.Tensor) else field for field in result]
    if isinstance(result, emc2.MHResult):
        fields[1] = emc2.MHState(*(field.cpu() for field in result.state))
    return type(result)(*fields)


def _scores_and_positions(values):
    """(n, M) float64 scores of the proposals, without their weights, and the (n, M) positions in keys."""
    queries, keys = values["queries"].double(), values["keys"].double()
    n, m = len(queries), len(keys)
    temperature = torch.as_tensor(values["temperature"], dtype=torch.float64).expand(n)[:, None]
    proposal, chains = values.get("proposal", "sweep"), chain_ids(values)
    if isinstance(proposal, str) and proposal == "sweep":
        return queries @ keys.T / temperature, torch.arange(m).expand(n, m)
    if isinstance(proposal, str):
        numbers = range(values["num_proposals"] if m else 0)
        proposal = rng.proposal_positions(chains, numbers, m, seed=values["seed"], step=values["step"])
    dots = [query @ keys[positions].mT for query, positions in zip(queries, proposal, strict=True)]
    return (torch.stack(dots) if n else torch.empty(proposal.shape).double()) / temperature, proposal


def chain_ids(values):
    named = values.get("chain_ids") if values.get("chain_ids") is not None else values.get("query_ids")
    return torch.arange(len(values["queries"])) if named is None else named


def column_walk(values):
    """``oracle.walk``, one column of all rows at a time, and each row's log-sum-exp over its proposals.

    Still a literal walk in float64 that shares nothing with the package but the draws.
    """
    scores, positions = _scores_and_positions(values)
    (n, count), m = scores.shape, len(values["keys"])
    possible = scores.isfinite()
    if values.get("query_ids") is not None:
        possible &= values["key_ids"][positions] != values["query_ids"][:, None]
    lse = torch.logsumexp(scores.masked_fill(~possible, -torch.inf), 1) if count else torch.full((n,), -torch.inf)
    weighted = scores - values["log_proposal"].double()[positions] if "log_proposal" in values else scores
    counter = {name: values[name] for name in ("seed", "step")}
    e = rng.acceptance(chain_ids(values), range(count), **counter, dtype=torch.float64)
    columns = [np.ascontiguousarray(array.T.numpy()) for array in (weighted, weighted + e, positions, possible)]

    burn_in, num_samples = values.get("burn_in", 0), values.get("num_samples", 1)
    labels = values.get("key_labels", values.get("key_ids", torch.arange(m))).numpy()
    current = values["state"].score.double().numpy().copy()
    current[np.isnan(current)] = -np.inf
    at, key = np.full(n, -1), np.where(current > -np.inf, values["state"].key.numpy(), -1)
    accepted, threshold, tie = np.zeros(n, dtype=np.int64), np.full(n, -np.inf), np.full(n, np.inf)
    states = np.full((count + 1, n), -1)
    for p, (score, level, position, legal) in enumerate(zip(*columns, strict=True)):
        with np.errstate(invalid="ignore"):
            distance = np.abs(level - current)
        np.minimum(tie, distance, out=tie, where=legal)
        np.maximum(threshold, level, out=threshold, where=legal)
        moves = legal & (level > current)
        current[moves], at[moves], key[moves] = score[moves], position[moves], labels[position[moves]]
        accepted += moves
        states[p + 1] = at
    marks = [burn_in + -(-(r + 1) * (count - burn_in) // num_samples) for r in range(num_samples)]
    samples = torch.from_numpy(states[marks if count else [0] * num_samples].T.copy())
    walked = Walked(samples, *map(torch.from_numpy, (key, current, accepted, threshold, tie)))
    return walked, lse


def assert_matches(result, expected, error, min_rows=0.9):
    """Index-exact in every row whose closest tie exceeds the error; thresholds are close in all rows."""
    walked, lse = expected
    clear = walked.closest_tie > error
    assert not len(clear) or clear.double().mean() >= min_rows, "the problem has too many ties to test anything"
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(result.samples[clear].long(), walked.samples[clear], **exact)
    torch.testing.assert_close(result.state.key[clear], walked.key[clear], **exact)
    if result.num_accepted is not None:
        torch.testing.assert_close(result.num_accepted[clear].long(), walked.accepted[clear], **exact)
    worst = float(torch.as_tensor(error).max()) if len(clear) else 0.0
    torch.testing.assert_close(result.state.score[clear].double(), walked.score[clear], rtol=1e-6, atol=worst)
    torch.testing.assert_close(result.threshold.double(), walked.threshold, rtol=1e-6, atol=worst)
    if result.lse is not None:
        torch.testing.assert_close(result.lse.double(), lse.double(), rtol=1e-6, atol=worst)


def check_walk(device, backend, values, *, layout="contiguous", dots=None, min_rows=0.9, expected=None, more=True):
    """One call against the oracle. ``more``: accepts counted, and the log-sum-exp of sweeps asked for."""
    is_sweep = isinstance(values.get("proposal", "sweep"), str) and values.get("proposal", "sweep") == "sweep"
    result = step_of(values, device, backend, layout, return_accepts=more, return_lse=more and is_sweep)
    error = score_error(values["temperature"], values["queries"].shape[1], dots)
    assert_matches(result, column_walk(values) if expected is None else expected, error, min_rows)
    return result


def assert_equal_bits(actual, expected):
    """Equal structure, dtypes and values; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def captured(function):
    """A graph of the function, warmed up on a stream of its own, and what the captured call returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


@contextlib.contextmanager
def loud_synchronisation():
    """Inside, any torch call that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def needs_memory(gigabytes):
    """Skips where the GPU has less than that free."""
    if not ON_GPU:
        pytest.skip("needs a GPU's memory")
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, there are {free:.1f}")


# What a test of (n, R) samples with n = R needs: Triton's walk keeps a transition of 16 bytes for each sample. Besides,
# an int32 for each.
MANY_SAMPLES = 33_000
MANY_SAMPLES_GB = 24


@contextlib.contextmanager
def running(commands, at_a_time=4):
    """name -> future of the completed process, so many at a time: more would wait for each other's compilers."""

    def run_one(command):
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)

    with ThreadPoolExecutor(at_a_time) as pool:
        yield {name: pool.submit(run_one, command) for name, command in commands.items()}
        pool.shutdown(cancel_futures=True)


def rehearsed(on_gpu, on_cpu_instead):
    """A size: the real one on a GPU, a small one in a rehearsal."""
    return on_gpu if ON_GPU else on_cpu_instead
