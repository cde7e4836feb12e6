"""What Triton's kernels compile to for three generations of GPUs, none of which need be here, is bounded.

A bound is what was seen when it was written, and a little: more means that something got worse. Stack is a thread's
memory for what did not fit into registers. Where one product takes whole rows (d = 128 on sm_90), the loads of the
next tile are among the counted instructions.
"""

import functools
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import compiled as tool

COMBINE = {"gumbel_combine_kernel": (64, 0, 4096, None)}

# (case, generations): kernel -> (registers, stack in bytes, shared memory in bytes, instructions per (row, key)).
BOUNDS = {
    ("sweep d=128", (80, 90, 100)): {
        "sweep_kernel": (255, {80: 32, 90: 48, 100: 128}, 90_000, 30.0),
        "close_kernel": (168, 16, 2048, None),
    },
    ("sweep d=512", (90,)): {"sweep_kernel": (255, 48, 110_000, 25.0)},
    ("sweep float32", (90,)): {"sweep_kernel": (255, 32, 30_000, 29.0), "close_kernel": (168, 16, 2048, None)},
    ("split, lse", (90,)): {"sweep_kernel": (255, 48, 90_000, 47.0), "close_kernel": (168, 16, 2048, None)},
    ("sweep, nothing given", (90,)): {"sweep_kernel": (255, 32, 90_000, 27.0), "close_kernel": (168, 16, 2048, None)},
    ("sweep, all given", (90,)): {"sweep_kernel": (255, 64, 90_000, 49.0), "close_kernel": (168, 16, 2048, None)},
    ("transition", (90,)): {"sweep_kernel": (255, 32, 90_000, 29.0), "close_kernel": (168, 16, 2048, None)},
    ("drawn, nothing given", (90,)): {
        "gathered_kernel": (128, 0, 1024, None),
        "close_kernel": (168, 16, 2048, None),
    },
    ("drawn", (80, 90, 100)): {"gathered_kernel": (128, 0, 1024, None)},
    ("given", (90,)): {"gathered_kernel": (128, 0, 1024, None)},
    **{
        (case, generations): {
            "lse_kernel": (255, 128, 140_000, None),
            "lse_gradient_kernel": (255, {80: 128, 90: 128, 100: 256}, 60_000, None),
        }
        for generations, cases in {
            (80, 90, 100): ("lse d=128", "lse, symmetric"),
            (90,): ("lse d=1024", "lse float32", "lse, split", "lse, symmetric d=512"),
        }.items()
        for case in cases
    },
    **{
        (case, (90,)): {
            f"{name}_kernel": (64, 0, 9000, None) for name in ("prepare", "negatives", "remember", "gradient")
        }
        for case in ("loss d=128", "loss d=768")
    },
    ("gumbel d=128", (80, 90, 100)): {"gumbel_kernel": (255, {80: 16, 90: 48, 100: 264}, 90_000, 33.5), **COMBINE},
    ("gumbel d=512", (90,)): {"gumbel_kernel": (255, 16, 110_000, 35.5)},
    ("gumbel float32", (90,)): {"gumbel_kernel": (255, 16, 30_000, 32.5), **COMBINE},
    ("gumbel, nothing given", (90,)): {"gumbel_kernel": (255, 16, 90_000, 38.0), **COMBINE},
    ("gumbel, split", (90,)): {"gumbel_kernel": (255, 48, 90_000, 33.5), **COMBINE},
}


# What nobody has looked at on the host, by the first word of the message that the device stops with.
ASSERTED = {
    ("sweep d=128", "sweep_kernel"): {"chain_ids"},
    ("sweep, all given", "sweep_kernel"): {"chain_ids", "temperature"},
    ("sweep, nothing given", "sweep_kernel"): set(),
    ("drawn", "gathered_kernel"): {"chain_ids"},
    ("given", "gathered_kernel"): {"chain_ids", "proposal"},
    ("loss d=128", "prepare_kernel"): {"index", "chains.key"},
    ("gumbel d=128", "gumbel_kernel"): {"chain_ids"},
    ("gumbel, split", "gumbel_kernel"): {"chain_ids", "temperature"},
    ("gumbel, nothing given", "gumbel_kernel"): set(),
}


@pytest.fixture(scope="session")
def compiled(request):
    """compiled(case, generation): its rows of bench/compiled.py, from a process beside this one, in which kernels are
    interpreted. A worker of xdist has one such process, and cases are compiled side by side by the workers; without
    xdist there is one for each core, and all cases are begun at once."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() if alone else 1, spawn, tool.interpret_nothing) as pool:
        begin = functools.cache(functools.partial(pool.submit, tool.measure))
        for item in request.session.items if alone else ():
            if item.path == Path(__file__) and hasattr(item, "callspec"):
                for generation in item.callspec.params["generations"]:
                    begin(item.callspec.params["case"], generation)
        yield lambda case, generation: begin(case, generation).result(timeout=900)


@pytest.mark.parametrize(("case", "generations"), BOUNDS, ids=[case for case, _ in BOUNDS])
def test_registers_memory_instructions_and_assertions(case, generations, compiled):
    rows = [row for generation in generations for row in compiled(case, generation)]
    assert {row.generation for row in rows} == set(generations)
    for row in rows:
        print(row)
        registers, stack, shared, per_element = BOUNDS[case, generations][row.kernel]
        assert 0 < row.registers <= registers
        assert row.stack <= (stack if isinstance(stack, int) else stack[row.generation])
        assert row.shared <= shared
        if per_element is not None:
            assert 10 < row.per_element <= per_element
        if (case, row.kernel) in ASSERTED:
            assert {message.split()[0] for message in row.assertions} == ASSERTED[case, row.kernel]
    assert {row.kernel for row in rows} == set(BOUNDS[case, generations])


def test_assertions_are_those_of_compiled_kernels():
    """Or a name that has changed would leave an entry that is compared with nothing."""
    compiled = {(case, kernel) for (case, _), kernels in BOUNDS.items() for kernel in kernels}
    assert set(ASSERTED) <= compiled


def test_the_table_has_a_row_for_each_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, tool.__file__, "--cases", "loss d=128", "--generations", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    header, *rows = done.stdout.splitlines()
    assert header.split()[:4] == ["case", "sm", "kernel", "registers"]
    kernels = {kernel for (case, _), kernels in BOUNDS.items() if case == "loss d=128" for kernel in kernels}
    assert {row.split()[3] for row in rows} == kernels


def test_the_counter_counts():
    """A walk of two logarithms in ten instructions, beside a longer block that stores."""
    line = "        /*{:04x}*/                   {} R1, R2 ;  /* 0x0 */"
    walk = ["FFMA"] * 8 + ["@!P0 MUFU.LG2"] * 2
    other = ["MUFU.LG2"] * 3 + ["STG.E"] + ["IMAD"] * 20
    code = [".L_1:"] + [line.format(16 * i, op) for i, op in enumerate(walk)]
    code += [".L_2:"] + [line.format(16 * i, op) for i, op in enumerate(other)]
    assert tool.instructions_per_logarithm("\n".join(code)) == 5.0
