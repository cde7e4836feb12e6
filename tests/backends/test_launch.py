"""Launching through the real Triton, compiler included, with a driver that has no GPU and writes down what it is told.

In a process of its own, in which nothing is interpreted. What the interpreter cannot show: that a launch past Triton's
own bookkeeping says the same as the launch through it, to the last byte that the driver is given, and when a binary is
shared.
"""

import json
import os
import subprocess
import sys

import pytest

from bench.harness import CHECKOUT

pytest.importorskip("triton")

DRIVER = """
import json

import torch
import triton
from triton.backends.compiler import GPUTarget

launched = []


class Utils:
    def load_binary(self, name, binary, shared, device):
        return object(), name, 200, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def unload_module(self, *anything):
        pass


class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, exit, *arguments):
        shown = [
            [list(value.shape), str(value.dtype), value.data_ptr()] if isinstance(value, torch.Tensor) else value
            for value in arguments
        ]
        launched.append([self.name, [x, y, z], stream, shown])
        exit(launch_metadata) if exit else None


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Driver())
"""

STEPS = (
    DRIVER
    + """
import importlib
import pkgutil
from bench.harness import CHECKOUT
from emc2_kernels.backends import triton as package
from emc2_kernels.backends.triton import launch, mh, sweep, tuning
from emc2_kernels.backends.params import WalkParams

tuning.device = lambda index: (9, 132)


def step(n, m, offset=0, seed=0, burn_in=0):
    queries, keys = torch.zeros(n, 32), torch.zeros(m + 1, 32).flatten()[offset : offset + m * 32].view(m, 32)
    walk = WalkParams(queries, keys, 0.5, seed, 3, None, None, None, None, None, None, burn_in, 2, 0, m)
    key, score = torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    mh.step(walk, key, score, None, False, False)
    return len(sweep.SWEEP_KERNEL.compiled)


tuning.splits = lambda *sizes: 1
told, launch_it = [], launch.Kernel.__call__
launch.Kernel.__call__ = lambda kernel, *call: told.append(call) or launch_it(kernel, *call)
step(48, 64)
launch.Kernel.__call__ = launch_it
sweep.SWEEP_KERNEL(*told[0])  # on the same tensors
seen = []
triton.knobs.runtime.launch_exit_hook.add(seen.append)
sweep.SWEEP_KERNEL(*told[0])
triton.knobs.runtime.launch_exit_hook.remove(seen.append)
binaries = [step(48, 64), step(37, 33, seed=2**64 - 1, burn_in=1), step(1, 16), step(48, 64, offset=1)]
names = sweep.SWEEP_KERNEL.names
whole = len(launched)
tuning.splits = lambda *sizes: 2  # whose second launch is told of no chain ids here
step(48, 300)
step(48, 300)
split = [each[0] for each in launched[whole:]]

submodules = [each.name for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
members = [each for name in submodules for each in vars(importlib.import_module(name)).values()]
kernels = {id(each): each for each in members if isinstance(each, launch.Kernel)}
wide = torch.zeros(64)


def variants(kernel, name):
    "Values of an argument, the first of them its usual one."
    if name in kernel.constants:
        return [64, 1, True, False, "ieee"]
    if name in kernel.strides:
        return [128, 1, 2, 16, 17, 0, 2**31, 2**31 + 1]
    if name in kernel.pointers:
        given = [wide, wide[1:], wide[2:], wide[4:], wide.bfloat16(), wide.bfloat16()[8:], wide.long(), wide.long()[1:]]
        return [*given, None]
    return [48, 0, 1, 16, 17, 2**31, 2**40, 0.5]


def differences(kernel, key):
    "Arguments that Triton compiles for apart, though the key takes them for one: two names, or the same twice."
    binder, found, seen = kernel.function.device_caches[0][-1], [], {}
    usual = {name: variants(kernel, name)[0] for name in kernel.names}
    for name in kernel.names:
        for value in variants(kernel, name):
            arguments = usual | {name: value}
            specialized = tuple(binder(*arguments.values(), debug=True)[1])  # by which Triton looks binaries up
            other = seen.setdefault(key(kernel, arguments), (name, specialized))
            if other[1] != specialized:
                found.append([other[0], name])
    return found


def coarser(part):
    "A key without some of ours."
    return lambda kernel, arguments: tuple(
        each
        for place, each in enumerate(kernel.bind([arguments[name] for name in kernel.names], {"num_warps": 4})[0])
        if place != part
    )


fine = {each.function.__name__: differences(each, coarser(None)) for each in kernels.values()}
kernel = sweep.SWEEP_KERNEL
coarse = [len(differences(kernel, coarser(part))) for part in range(len(kernel.pointers) + len(kernel.strides))]
said = {"binaries": binaries, "names": names, "launched": launched, "split": split, "fine": fine, "coarse": coarse}
said["hooked"] = len(seen)
print(json.dumps(said))
"""
)


def compiling(script):
    """What a script prints in a process in which nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def seen():
    return compiling(STEPS)


def test_a_launch_past_triton_says_what_one_through_it_does(seen):
    (*through, arguments), (*past, addresses) = seen["launched"][:2]
    assert past == through
    assert addresses == [value[2] if isinstance(value, list) else value for value in arguments]
    assert any(isinstance(value, list) for value in arguments)
    name, grid, stream = past
    assert name == "sweep_kernel" and grid == [2, 1, 1] and stream == 77
    assert len(arguments) == len(seen["names"])
    said = dict(zip(seen["names"], arguments, strict=True))
    assert (
        said["n"] == 48
        and said["m"] == 64
        and said["stride_key_row"] == 32
        and said["d_over_align"] * said["ALIGN_D"] == 32
    )
    assert said["samples_ptr"][:2] == [[48, 2], "torch.int32"] and said["labels_ptr"] is None


def test_a_launch_that_somebody_listens_to_goes_through_triton(seen):
    """Which tells a profiler's hooks."""
    assert seen["hooked"] == 1
    assert seen["launched"][2] == seen["launched"][0]


def test_a_binary_serves_all_sizes_and_numbers_but_not_other_alignments(seen):
    assert seen["binaries"] == [1, 1, 1, 2]
    other = dict(zip(seen["names"], seen["launched"][4][3], strict=True))
    assert (other["n"], other["m"], other["burn_in"], other["num_kept"]) == (37, 33, 1, 32)
    assert (other["seed_low"], other["seed_high"], other["step"]) == (-1, -1, 3)


def test_a_split_walk_is_launched_twice(seen):
    """Through Triton, and past it."""
    assert seen["split"] == ["sweep_kernel", "epilogue_kernel"] * 2


def test_the_launchers_key_is_as_fine_as_tritons(seen):
    """Of no two sets of arguments that share a key would Triton have made two binaries; a coarser key is found out."""
    assert len(seen["fine"]) >= 14
    assert {name: found for name, found in seen["fine"].items() if found} == {}
    assert all(found > 0 for found in seen["coarse"])


FAMILIES = (
    DRIVER
    + """
empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like
torch.empty = lambda *shape, **options: empty(*shape, **options).zero_()  # no kernel fills it, and no index is rubbish
torch.Tensor.new_empty = lambda self, *shape, **options: new_empty(self, *shape, **options).zero_()
torch.empty_like = lambda like, **options: empty_like(like, **options).zero_()

import importlib
import pkgutil
from bench.gpu import smoke, trial
from emc2_kernels.backends import gpu
from emc2_kernels.backends import triton as package
from emc2_kernels.backends.triton import launch, tuning

gpu.interpreting = lambda: True  # for tensors on the CPU, though nothing is interpreted
tuning.device = lambda index: (9, 132)
calls = {"through": {}, "past": {}}


class Compiled:
    "In the place of a kernel's function, and of its binary."

    packed_metadata = None

    def __init__(self, function):
        self.function = function

    def count(self, way):
        calls[way][self.function.__name__] = calls[way].get(self.function.__name__, 0) + 1

    def __getitem__(self, grid):
        def call(*values, **options):
            self.function.device_caches[0][-1](*values, **options)  # Triton looks at each
            self.count("through")
            return self

        return call

    def run(self, x, y, z, stream, function, packed, metadata, enter, exit, *addresses):
        assert len(addresses) == len(self.function.arg_names)
        assert not any(isinstance(value, torch.Tensor) for value in addresses)
        self.count("past")


submodules = [each.name for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
members = [each for name in submodules for each in vars(importlib.import_module(name)).values()]
kernels = {id(each): each for each in members if isinstance(each, launch.Kernel)}
for kernel in kernels.values():
    kernel.function = Compiled(kernel.function)


class AsOnAGpu(trial.Context):
    def choose(self, real, toy):
        return toy


context = AsOnAGpu(torch.device("cpu"), "triton", "reference")
for name, family in smoke.FAMILIES.items():
    if family.kind == "triton" and name != "log2" and "graph" not in name:
        for trial in family.trials(context, "triton"):
            trial.call()
            trial.call()
print(json.dumps(calls))
"""
)


def test_every_family_of_kernels_is_launched_as_on_a_gpu():
    """All that the host does, twice: through Triton, whose compiler is left out, and past it."""
    calls = compiling(FAMILIES)
    assert calls["through"].keys() == calls["past"].keys()
    families = {
        "sweep_kernel",
        "epilogue_kernel",
        "gathered_kernel",
        "gumbel_kernel",
        "isir_kernel",
        "lse_kernel",
        "lse_gradient_kernel",
    }
    losses = {"gather_batch_kernel", "mean_negatives_kernel", "update_stores_kernel", "embedding_gradient_kernel"}
    assert families | losses <= calls["past"].keys()


LAUNCHER = """
import json

from bench.gpu import host
from bench.gpu.no_cuda import pass_for_a_gpu
from emc2_kernels.backends.triton import launch

library, called, launch_it = pass_for_a_gpu(), [], launch.Kernel.__call__
launch.Kernel.__call__ = lambda kernel, *call: called.append((kernel, *call)) or launch_it(kernel, *call)
for name in ("mh_step", "mh_step, with ids", "EMC2Loss(sampler='mh')", "EMC2Loss"):
    host.CASES[name]()()
found = []
for kernel, grid, arguments, options in called:
    values = [arguments[name] for name in kernel.names]
    library.keep(kernel.compiled[kernel.bind(values, options)[0]])
    asked, launches = library.pointer_queries, library.launches
    kernel.function[grid](*values, **options, **launch.ALWAYS)
    through, asked_through = library.parameters(), library.pointer_queries - asked
    launch_it(kernel, grid, arguments, options)
    past, asked_past = library.parameters(), library.pointer_queries - asked - asked_through
    found.append([kernel.function.__name__, through, past, asked_through, asked_past, library.launches - launches])
print(json.dumps(found))
"""


def test_the_driver_is_given_the_same_by_address():
    """Triton's launcher in C reads each tensor's address, and asks the driver about it; of an address it does not."""
    found = compiling(LAUNCHER)
    for name, through, past, asked_through, asked_past, launches in found:
        assert past == through and launches == 2, name
        assert asked_through > 0 and asked_past == 0, name
    kernels = {name for name, *_ in found}
    assert {
        "sweep_kernel",
        "gather_batch_kernel",
        "gather_candidates_kernel",
        "isir_kernel",
        "isir_gradient_kernel",
        "update_stores_kernel",
    } <= kernels
