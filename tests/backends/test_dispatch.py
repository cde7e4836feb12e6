"""Which backend "auto" takes for which walk: the table's order, and what each backend prefers."""

import sys

import pytest
import torch

from emc2_kernels import backends, losses
from emc2_kernels.backends import OPERATIONS, TABLE, resolve
from emc2_kernels.backends.params import WalkParams

MODULE = "emc2_kernels.backends."


def walk(n, m, d, draws=None, positions=None, dtype=torch.bfloat16, device="meta"):
    queries, keys = (torch.empty(rows, d, dtype=dtype, device=device) for rows in (n, m))
    return WalkParams(
        queries, keys, 0.1, 0, 0, None, None, None, positions, draws, None, 0, 1, 0, m if draws is None else draws
    )


@pytest.fixture
def on_gpu(monkeypatch):
    """The table as on a machine with a GPU, where all kernels can be had; "meta" tensors stand for the GPU's."""
    package = sys.modules["emc2_kernels.backends"]  # emc2_kernels.backends itself is the function of that name
    gpu_table = {
        name: backend._replace(
            devices=("meta",) if backend.devices == ("cuda",) else backend.devices, why_unavailable=lambda: None
        )
        for name, backend in TABLE.items()
    }
    monkeypatch.setattr(package, "TABLE", gpu_table)
    monkeypatch.setattr(package, "_BUILDS", {})
    found = (package._able, package._named, package._module)
    for cached in found:
        cached.cache_clear()
    yield gpu_table
    for cached in found:
        cached.cache_clear()


def chosen(a_walk):
    name, op = resolve("auto", a_walk.queries, a_walk).__name__.removeprefix(MODULE).split(".")
    assert op == "mh"
    return name


def test_small_sweeps_and_gathered_walks_go_to_cuda_large_sweeps_to_triton(on_gpu):
    assert chosen(walk(64, 32, 128)) == "cuda"
    assert chosen(walk(64, 64, 128)) == "cuda"
    assert chosen(walk(32768, 32768, 512)) == "triton"
    assert chosen(walk(64, 1_000_000, 128)) == "triton"
    assert chosen(walk(1024, 1024, 4096)) == "triton"
    assert chosen(walk(32768, 10_000_000, 128, draws=256)) == "cuda"
    assert chosen(walk(64, 10_000, 128, draws=65_536)) == "triton"  # a warp a chain would leave the GPU idle


def test_float64_goes_to_the_reference(on_gpu):
    assert chosen(walk(64, 64, 8, dtype=torch.float64)) == "reference"


def test_item_ids_go_to_the_first(on_gpu):
    assert resolve("auto", torch.empty(3, dtype=torch.int64, device="meta")).__name__ == MODULE + "cuda.mh"


def test_without_the_cuda_kernels_triton_does_their_work(on_gpu, monkeypatch, recwarn):
    monkeypatch.setitem(on_gpu, "cuda", on_gpu["cuda"]._replace(why_unavailable=lambda: "no nvcc"))
    assert chosen(walk(64, 32, 128)) == "triton"
    assert not recwarn.list, "another fast backend is there: nothing to report"


def test_a_failed_build_is_reported_although_triton_does_the_work(on_gpu, monkeypatch):
    def fails():
        raise RuntimeError("nvcc: catastrophic error")

    package = sys.modules["emc2_kernels.backends"]
    monkeypatch.setattr(package, "_BUILDS", {"cuda": fails})
    package._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="'triton' does its work. cuda: nvcc: catastrophic error"):
        assert chosen(walk(64, 32, 128)) == "triton"


def broken():
    raise ZeroDivisionError("planted")


def test_a_backend_whose_state_cannot_be_told_is_told_as_such_and_done_without(on_gpu, monkeypatch):
    """The table answers, "auto" goes on, and the backend's name is an error with the reason."""
    package = sys.modules["emc2_kernels.backends"]
    for name in ("cuda", "triton"):
        monkeypatch.setitem(on_gpu, name, on_gpu[name]._replace(why_unavailable=broken))
    package._warn_once.cache_clear()
    assert backends()["cuda"] == backends()["triton"] == "ZeroDivisionError: planted"
    reason = "the much slower 'reference' does its work. cuda: ZeroDivisionError: planted; triton: ZeroDivisionError"
    with pytest.warns(RuntimeWarning, match=reason):
        assert chosen(walk(64, 32, 128)) == "reference"
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: ZeroDivisionError: planted"):
        resolve("cuda", torch.empty(2, 3, device="meta"))


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_backend_that_does_not_import_is_reported_and_done_without(op, on_gpu, monkeypatch):
    package = sys.modules["emc2_kernels.backends"]
    monkeypatch.setitem(sys.modules, f"{MODULE}triton.{op}", None)
    monkeypatch.setitem(on_gpu, "cuda", on_gpu["cuda"]._replace(why_unavailable=lambda: "no nvcc"))
    package._module.cache_clear()
    package._warn_once.cache_clear()
    keys = torch.empty(2, 3, device="meta")
    with pytest.warns(RuntimeWarning, match=f"triton: ModuleNotFoundError: .*triton.{op}"):
        assert resolve("auto", keys, op=op).__name__.startswith(MODULE + "reference")
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run here: ModuleNotFoundError: .*triton.{op}"):
        resolve("triton", keys, op=op)


def test_a_failed_build_is_an_error_of_the_backend_that_was_named(on_gpu, monkeypatch):
    monkeypatch.setattr(sys.modules["emc2_kernels.backends"], "_BUILDS", {"cuda": broken})
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: ZeroDivisionError: planted"):
        resolve("cuda", torch.empty(2, 3, device="meta"))


def test_operations_that_a_backend_lacks_are_named():
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*'triton'.* got 'cuda'"):
        resolve("cuda", torch.empty(2, 3), op="lse")


def test_here_cpu_tensors_never_go_to_the_interpreter():
    small = walk(4, 4, 8, dtype=torch.float32, device="cpu")
    assert chosen(small) == "cpu"
    assert "triton" in backends()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_backend_says_why_it_cannot_run():
    small = walk(4, 4, 8, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="backend 'cuda' takes cuda tensors of .*, got tensors on cpu:"):
        resolve("cuda", small.queries, small)
    assert "CUDA" in backends()["cuda"]


def test_draws_from_the_softmax_go_to_triton_on_a_gpu_and_to_the_core_on_a_cpu(on_gpu):
    def chosen_for(dtype, device):
        return resolve("auto", torch.empty(2, 3, dtype=dtype, device=device), op="gumbel").__name__.removeprefix(MODULE)

    assert chosen_for(torch.bfloat16, "meta") == "triton.gumbel"
    assert chosen_for(torch.float64, "meta") == "reference.gumbel"
    assert chosen_for(torch.float16, "cpu") == "cpu.gumbel"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_backend_of_another_device_says_nothing_of_dtypes_that_nobody_has_passed(dtype):
    """The first call of EMC2's walk is for the coin of the items, which are int64."""
    z0, z1 = torch.randn(2, 3, 4).to(dtype)
    with pytest.raises(ValueError, match="^backend 'cuda' takes cuda tensors of [^:]*, got tensors on cpu:"):
        losses.EMC2Loss(5, 4, sampler="mh", backend="cuda")(z0, z1, torch.arange(3))


def test_a_dtype_that_a_backend_does_not_take_is_named():
    with pytest.raises(ValueError, match="^backend 'cpu' takes cpu tensors of [^:]*, got operands of float64:"):
        resolve("cpu", torch.empty(2, 3, dtype=torch.float64))
