"""What Triton's kernels compile to for three generations of GPUs, none of which need be here, is bounded.

The bounds are in compiled_bounds.py; how machine code is read is tried in test_sass.py.
"""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from compiled_bounds import Bound, bounds

pytest.importorskip("triton")

from bench.gpu import compiled as tool
from bench.harness import CHECKOUT

BOUNDS = bounds()
GENERATIONS: dict[str, list[int]] = {}  # of each case
for _case, _generation, _kernel in BOUNDS:
    if _generation not in GENERATIONS.setdefault(_case, []):
        GENERATIONS[_case].append(_generation)

# What nobody has looked at on the host, by the first word of the message that the device stops with.
ASSERTED = {
    ("sweep d=128", "sweep_kernel.walk"): set(),  # those of replay_kernel
    ("sweep d=128", "replay_kernel"): {"chain_ids"},
    ("sweep, all given", "sweep_kernel.record"): {"chain_ids", "temperature"},
    ("sweep, nothing given", "sweep_kernel.record"): set(),
    ("drawn", "gathered_kernel"): {"chain_ids"},
    ("given", "gathered_kernel"): {"chain_ids", "proposal"},
    ("loss d=128", "gather_batch_kernel"): {"index", "chains.key"},
    ("isir loss d=128", "gather_candidates_kernel"): {"index", "chains.key"},
    ("gumbel d=128", "gumbel_kernel"): {"chain_ids"},
    ("gumbel, split", "gumbel_kernel"): {"chain_ids", "temperature"},
    ("gumbel, nothing given", "gumbel_kernel"): set(),
    ("isir d=128", "isir_kernel"): {"chain_ids"},
    ("isir, split", "isir_kernel"): {"chain_ids", "temperature"},
    ("isir, split", "isir_combine_kernel"): {"chain_ids"},
    ("isir d=128, no ids", "isir_kernel"): set(),
}


@pytest.fixture(scope="session")
def compiled(request):
    """compiled(case, generation): its rows of bench.gpu.compiled, from a process beside this one, in which kernels are
    interpreted. A worker of xdist has one such process, and cases are compiled side by side by the workers; without
    xdist there is one for each core, and all cases are begun at once."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() if alone else 1, spawn, tool.disable_interpreter) as pool:
        begin = functools.cache(functools.partial(pool.submit, tool.measure))
        for item in request.session.items if alone else ():
            if item.path == Path(__file__) and hasattr(item, "callspec"):
                for generation in item.callspec.params.get("generations", ()):
                    begin(item.callspec.params["case"], generation)
        yield lambda case, generation: begin(case, generation).result(timeout=900)


# Hopper's code each time, that of the generations before and after it among the slow tests.
HOPPER = [(case, [90]) for case, generations in GENERATIONS.items() if 90 in generations]
OTHERS = [(case, others) for case, generations in GENERATIONS.items() if (others := sorted({*generations} - {90}))]


@pytest.mark.parametrize(
    ("case", "generations"),
    [*(pytest.param(*one, id=one[0]) for one in HOPPER)]
    + [pytest.param(*one, id=f"{one[0]} {one[1]}", marks=pytest.mark.slow) for one in OTHERS],
)
def test_registers_memory_instructions_and_assertions(case, generations, compiled):
    rows = [row for generation in generations for row in compiled(case, generation)]
    expected = {row for row in BOUNDS if row[0] == case and row[1] in generations}
    assert {(case, row.generation, row.kernel) for row in rows} == expected
    for row in rows:
        print(row)
        bound = BOUNDS[case, row.generation, row.kernel]
        assert 0 < row.registers <= bound.registers
        assert row.stack <= bound.stack
        assert row.shared <= bound.shared
        assert (row.pipes is None) == (bound.issue is None)
        if row.pipes is not None:
            assert 5 < row.pipes.issue <= bound.issue
            assert 5 < row.pipes.cycles <= bound.cycles
            assert row.pipes.generation == row.generation
            assert row.pipes.unknown == 0
        if (case, row.kernel) in ASSERTED:
            assert {message.split()[0] for message in row.assertions} == ASSERTED[case, row.kernel]


def test_assertions_are_those_of_compiled_kernels():
    """Or a name that has changed would leave an entry that is compared with nothing."""
    assert set(ASSERTED) <= {(case, kernel) for case, _generation, kernel in BOUNDS}


WITHOUT = """
from bench.gpu import compiled as tool
print([row.assertions for row in tool.measure("loss d=128", 90)])
"""


def output(*arguments, **changes):
    """Of a process in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_assertions_can_be_left_out():
    assert output("-c", WITHOUT, EMC2_DEVICE_ASSERTIONS="0") == "[[], [], [], []]\n"


ROUNDED = """
import json, re, torch
from bench.gpu import compiled as tool

found, case = {}, tool.Case(torch.bfloat16, 32768, 32768, 128, "sweep", accepts=True, all_tensors=True)
for launched in tool.launches(case, 90):
    ptx = tool.compile_launch(launched, 90).asm["ptx"]
    found[tool.kernel_name(launched)] = len(re.findall(r"\\bsub(\\.rn)?\\.f32\\b", ptx))
print(json.dumps(found))
"""


def test_a_tile_that_is_walked_again_has_the_scores_that_it_had():
    """Of a plain tile the compiler would make one fma of a product, its scale and log g, rounded once; not of one with
    masks, which sweep_kernel.record and replay_kernel walk. So neither has a subtraction for it to choose by."""
    assert json.loads(output("-c", ROUNDED)) == {"sweep_kernel.walk": 0, "replay_kernel": 0, "count_kernel": 0}


TIMES = """
import json, time
from bench.gpu import compiled as tool

seconds = {}
for case in "lse d=128", "sweep d=128":
    for launched in tool.launches(tool.CASES[case], 90):
        name, started = tool.kernel_name(launched), time.process_time()
        if name in ("lse_kernel", "sweep_kernel.walk", "replay_kernel"):
            tool.compile_launch(launched, 90)
            seconds.setdefault(name, time.process_time() - started)
print(json.dumps(seconds))
"""


def test_a_first_step_does_not_wait_for_the_compiler(tmp_path):
    """Processor time, in that of a kernel without a walk (0.8 s here). Both in one took 15 of it. The walk, of two
    loops, takes 4.5 of it in Triton 3.9 and 3.2 in 3.6."""
    seconds = json.loads(output("-c", TIMES, TRITON_CACHE_DIR=str(tmp_path)))
    print(seconds)
    assert seconds["sweep_kernel.walk"] < 6 * seconds["lse_kernel"]
    assert seconds["replay_kernel"] < 10 * seconds["lse_kernel"]


PRINTED = ["loss d=128", "lse d=1024"]


def test_the_table_has_a_row_for_each_kernel():
    header, *rows = output("-m", "bench.gpu.compiled", "--generations", "90", "--cases", *PRINTED).splitlines()
    assert header.split() == [
        "case", "sm", "kernel", "registers", "stack", "shared", "programs", "issue", "ALU", "MUFU", "wide", "cycles",
        "binds", "ms", "product", "L2",
    ]  # fmt: skip
    kernels = [row.split()[3] for row in rows]
    assert sorted(kernels) == sorted(
        ["gather_batch_kernel", "mean_negatives_kernel", "update_stores_kernel", "embedding_gradient_kernel"]
        + ["lse_kernel", "lse_gradient_kernel", "lse_gradient_kernel"]
    )
    for row in rows:
        assert len(row.split()) == (17 if "lse" in row else 8)


def test_bounds_are_printed_as_they_are_written(compiled, monkeypatch, capsys):
    """So that after a change of the kernels they can be measured again."""
    measured = [row for case in PRINTED for row in compiled(case, 90)]
    monkeypatch.setattr(tool, "measure_all", lambda names, generations, processes: measured)
    monkeypatch.setattr(sys, "argv", ["compiled", "--bounds"])
    tool.main()
    printed = eval("{" + capsys.readouterr().out + "}", {"Bound": Bound})
    assert {key[0] for key in printed} == set(PRINTED)
    for key, bound in printed.items():
        assert key in BOUNDS
        assert (bound.cycles is None) == ("lse" not in key[0])


@pytest.mark.parametrize(
    ("case", "kernel", "elements", "flops", "l2_bytes"),
    [
        ("sweep d=128, no ids", "sweep_kernel.walk", 2**30, 2**38, 2**30 // 64 * 128 * 2),
        ("sweep d=512, no ids", "sweep_kernel.walk", 2**30, 2**40, 2**30 * 512 * 2 * (1 / 128 + 1 / 128)),
        # Eight programs of two samples make the same products; the last tile of the keys is filled.
        ("gumbel d=128", "gumbel_kernel", 16 * 32768 * 100_000, 8 * 2**16 * 128 * 100_000, None),
        ("isir d=128", "isir_kernel", 2**30, 2**38, 2**30 // 64 * 128 * 2),
        # All columns at once: scores once, of whole rows that serve both products.
        ("lse d=512", "lse_gradient_kernel", 2**30, 2**31 * (512 + 512), 2**30 // 64 * 512 * 2),
        ("lse, symmetric d=512", "lse_gradient_kernel", 2 * 2**26, 2**27 * (512 + 512), 2**26 // 64 * 512 * 2),
        # Each of two chunks of columns makes the scores anew, and reads its part of the others once more.
        (
            "lse d=1024",
            "lse_gradient_kernel",
            2 * 2**26,
            2 * 2**27 * (1024 + 512),
            2 * 2**14 * 2 * 64 * (2 * 1024 + 512),
        ),
    ],
)
def test_work_of_a_launch(case, kernel, elements, flops, l2_bytes):
    launched = next(each for each in tool.launches(tool.CASES[case], 90) if tool.kernel_name(each) == kernel)
    work = tool.work(launched)
    assert elements <= work.elements <= 1.01 * elements
    assert flops <= work.flops <= 1.01 * flops
    assert l2_bytes in (None, work.l2_bytes)
