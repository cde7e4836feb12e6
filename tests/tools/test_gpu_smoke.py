"""bench/gpu/smoke.py as far as it can be tested without a GPU: rehearsals pass, what is broken fails.

A kernel is broken by its result: whatever it has done wrong, that is how it shows.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

import emc2_kernels as emc2
from bench.gpu import families, loss_trials, smoke
from bench.gpu import oracle as gpu_oracle
from bench.gpu.trial import Context, Trial
from bench.harness import CHECKOUT
from emc2_kernels import ops
from emc2_kernels.losses import EMC2Loss, emc2_isir_fused
from emc2_kernels.losses import anchors as pairs
from emc2_kernels.losses import emc2_fused as fused

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
CPU = torch.device("cpu")
INTERPRETED = emc2.backends()["triton"] == "available" and not torch.cuda.is_available()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
ROW = 3  # that is broken: clear of ties in every toy problem


@pytest.fixture
def rehearsal():
    return smoke.make_context(smoke.parse_arguments(["--rehearse", "--family", "log2"]))


def wrong_cases(record):
    """Names of the cases with mismatches, and how many."""
    return {case["case"]: case["mismatches"] for case in record["cases"] if case["mismatches"]}


# What is right passes.


@pytest.mark.parametrize("name", smoke.FAMILIES)
def test_a_rehearsal_passes(name, rehearsal):
    record = json.loads(json.dumps(smoke.run_family(name, rehearsal), allow_nan=False))
    assert record["status"] == "PASS", record["why"]
    assert record["family"] == name and record["why"] == "" and 0 < record["seconds"] < 60
    assert record["cases"] and all(case["compared"] >= 0.9 * case["rows"] > 0 for case in record["cases"])
    assert all(0 <= case["largest_error"] <= case["bound"] for case in record["cases"])
    names = [case["case"] for case in record["cases"]]
    assert len(set(names)) == len(names)
    assert record["largest_error"] in [case["largest_error"] for case in record["cases"]]


@interpreted
@pytest.mark.parametrize(
    "name",
    ["sweep-128", "sweep-counts", "gumbel-1", "isir-128", "isir-options", "lse-128", "loss-32", "isir-loss-32", "log2"],
)
def test_tritons_kernels_pass_in_the_interpreter(name):
    record = smoke.run_family(name, Context(CPU, "triton", "reference"))
    assert record["status"] == "PASS", record["why"]


# What is wrong fails, and by as much as it is wrong.


def perturb(field, amount, row=ROW, name="mh_step"):
    """An mh_step, or another such function, with one number of one row off."""

    def broken(original):
        def call(*arguments, **options):
            result = original(*arguments, **options)
            target = getattr(result, field) if hasattr(result, field) else getattr(result.state, field)
            target[row] += amount
            return result

        return call

    return emc2, name, broken


def changed(owner, name, change):
    """A function whose result goes through ``change``."""
    return owner, name, lambda original: lambda *a, **o: change(original(*a, **o))


def nudge(result, place, amount):
    """A tensor, the first in a tuple or list, with one element off; no others changed."""
    tensor = result if isinstance(result, torch.Tensor) else result[0]
    tensor[place] += amount
    return result


def one_hot(values, amount):
    return torch.nn.functional.one_hot(torch.tensor(ROW), len(values)).to(values.dtype) * amount


def steeper(lse):
    """The same value, with one row's gradient 5 % too long."""
    return lse + one_hot(lse, 0.05) * (lse - lse.detach())


def with_lse(result, more):
    return result._replace(lse=result.lse + more)


def steeper_step(result):
    return result._replace(lse=steeper(result.lse))


def steepest_step(result):
    """In all rows: the broken one of the others has no state."""
    return with_lse(result, 0.05 * (result.lse - result.lse.detach()))


def ignored_tensor(original):
    """A step in a tensor is taken for 0, as by a graph that has kept the number it was captured with."""
    return lambda *a, step, **o: original(*a, step=0 if isinstance(step, torch.Tensor) else step, **o)


def swapped(original):
    """The carried chains' states are written in reverse order."""
    return lambda self, slots, state, **o: original(self, slots, emc2.MHState(state.key.flip(0), state.score), **o)


def late(original):
    return lambda self, slots, embeddings, step, **o: original(self, slots, embeddings, step + 1, **o)


def dull(original):
    return lambda self, slots, embeddings, step, **o: original(self, slots, embeddings * 1.02, step, **o)


def steeper_loss(original):
    def forward(self, *arguments, **options):
        value = original(self, *arguments, **options)
        return value + 0.05 * (value - value.detach())

    return forward


def i_sir(change):
    """Of a loss on any but the reference's backend, by which it is judged: its value, or what it has kept."""

    def wrap(original):
        def forward(self, *arguments, **options):
            value = original(self, *arguments, **options)
            return value if self.backend == "reference" else change(self, value)

        return forward

    return EMC2Loss, "forward", wrap


def spoils(part, name, change):
    """Changes the last row of what a part of the loss keeps."""

    def spoil(loss, value):
        table = getattr(getattr(loss, part), name)
        table[-1] = change(table[-1])
        return value

    return i_sir(spoil)


def steeper_keys(original):
    """The gradient of the keys 5 % too long."""

    def call(queries, keys, **options):
        return original(queries, keys if keys is queries else keys + 0.05 * (keys - keys.detach()), **options)

    return call


def slightly_longer(found):
    lengths, divisors, shrink = found
    return lengths, divisors * 1.00001, shrink


def another_chain(original):
    """Keys of the chains that other rows have."""

    def rescore(self, *arguments):
        state, embeddings = original(self, *arguments)
        return state._replace(key=state.key.roll(1)), embeddings

    return rescore


def stale_scores(original):
    """Incoming chains are not rescored."""

    def rescore(self, slots, *arguments):
        state, embeddings = original(self, slots, *arguments)
        return state._replace(score=self.score[slots]), embeddings

    return rescore


CHAINS, THRESHOLD, LSE = ("chains", 1), ("threshold", 1), ("lse", 1)
BROKEN = {
    "a sample": ("sweep-128", perturb("samples", torch.tensor([0] * 5 + [1] + [0] * 10, dtype=torch.int32)), CHAINS),
    "a key": ("sweep-512", perturb("key", 1), CHAINS),
    "a score": ("sweep-float32", perturb("score", 1e-3), CHAINS),
    "a NaN": ("sweep-split", perturb("score", torch.nan), CHAINS),
    "a count": ("sweep-counts", perturb("num_accepted", 1), CHAINS),
    "a count, cuda": ("cuda-gathered", perturb("num_accepted", -1), CHAINS),
    "a threshold": ("gathered", perturb("threshold", 1e-3), THRESHOLD),
    "a lse": ("sweep-split-counts", perturb("lse", 1e-2), LSE),
    "a lse, cuda": ("cuda-sweep", perturb("lse", -1e-2), LSE),
    "a sample of given proposals": ("gathered-options", perturb("samples", 1), CHAINS),
    "a sample with options": ("sweep-options", perturb("samples", 1), CHAINS),
    "a draw": ("gumbel-1", changed(emc2, "gumbel_sample", lambda p: nudge(p, ROW, 1)), ("draws", 1)),
    "no draw": ("gumbel-5", changed(emc2, "gumbel_sample", lambda p: nudge(p, (ROW, 2), -1000)), ("draws", 1)),
    "a step's position": ("isir-128", perturb("position", 1, name="isir_step"), ("steps", 1)),
    "a step's key": ("isir-options", perturb("key", 1, name="isir_step"), ("steps", 1)),
    "a step's score": ("isir-float32", perturb("score", 1e-2, name="isir_step"), ("steps", 1)),
    "a step's weight": ("isir-128", perturb("carried_weight", 1e-2, name="isir_step"), ("weight", 1)),
    "a step's lse": ("isir-128", changed(emc2, "isir_step", lambda x: with_lse(x, one_hot(x.lse, 1e-2))), ("lse", 1)),
    "a step's gradient": ("isir-options", changed(emc2, "isir_step", steeper_step), ("d_queries", 1)),
    "its temperature's": ("isir-float32", changed(emc2, "isir_step", steeper_step), ("d_temperature", 1)),
    "its state's": ("isir-float32", changed(emc2, "isir_step", steepest_step), ("d_score", None)),
    "the lse": ("lse-128", changed(emc2, "contrastive_lse", lambda x: x + one_hot(x, 1e-2)), ("lse", 1)),
    "its gradient": ("lse-512", changed(emc2, "contrastive_lse", steeper), ("d_queries", 1)),
    "its other gradient": ("lse-128", (emc2, "contrastive_lse", steeper_keys), ("d_keys", None)),
    "its temperature": ("lse-float32", changed(emc2, "contrastive_lse", steeper), ("d_temperature", 1)),
    "a loss's walk": ("loss-32", changed(ops, "mh_step", lambda x: nudge(x, (ROW, 0), 1)), ("walk chains", 4)),
    "a loss's value": ("loss-32", changed(EMC2Loss, "forward", lambda x: x + 1e-2), ("value", 4)),
    "a loss's gradient": ("loss-2500", (EMC2Loss, "forward", steeper_loss), ("gradients", None)),
    "a loss's view coin": ("loss-32", changed(ops, "view_coin", lambda x: 1 - x), ("keys", None)),
    "a loss's labels": ("loss-32", changed(ops, "view_coin", lambda x: 1 - x), ("ids and states", None)),
    "a loss's lengths": ("loss-2500", changed(pairs, "_lengths", slightly_longer), ("queries", None)),
    "a loss's incoming keys": ("loss-32", (emc2.ChainStore, "rescore", another_chain), ("ids and states", None)),
    "a loss's chains": ("loss-32", (emc2.ChainStore, "put_state", swapped), ("stores", None)),
    "a loss's incoming scores": ("loss-2500", (emc2.ChainStore, "rescore", stale_scores), ("incoming scores", None)),
    "a loss's bank": ("loss-2500", (emc2.EmbeddingBank, "put_embeddings", dull), ("bank", None)),
    "a loss's clock": ("loss-32", (emc2.EmbeddingBank, "put_embeddings", late), ("stores", None)),
    "i-SIR's value": ("isir-loss-32", i_sir(lambda _, value: value + 1e-2), ("value", 4)),
    "i-SIR's gradient": (
        "isir-loss-500", i_sir(lambda _, value: value + 1e-3 * (value - value.detach())), ("gradients", None)
    ),
    "i-SIR's queue": ("isir-loss-32", spoils("recent", "items", lambda x: x * 0 - 1), ("stores", 4)),
    "i-SIR's drift": ("isir-loss-500", spoils("drift", "sums", lambda x: x + 1e-2), ("drift", 4)),
    "i-SIR's chains": ("isir-loss-500", spoils("chains", "key", lambda x: (x + 2) % 80), ("chains", 4)),
    "i-SIR's scores": ("isir-loss-500", spoils("chains", "score", lambda x: x + 1), ("scores", None)),
    "i-SIR's start": ("isir-loss-32", spoils("chains", "key", lambda x: torch.where(x < 0, 2, -1)), ("started", None)),
    "i-SIR's bank": ("isir-loss-32", spoils("bank", "embeddings", lambda x: x + 0.1), ("bank", None)),
    "a graph's step": ("graph", (emc2, "mh_step", ignored_tensor), ("replays", None)),
    "a cuda graph's step": ("cuda-graph", (emc2, "mh_step", ignored_tensor), ("replays", None)),
    "E in a walk": ("cuda-log2", changed(emc2, "mh_transition", lambda x: nudge(x, (ROW, 0), 1e-3)), ("in a walk", 4)),
    "E below 0": ("cuda-log2", changed(emc2, "mh_transition", lambda x: nudge(x, (ROW, 0), -17.0)), ("at least 0", 4)),
}  # fmt: skip


@pytest.mark.one_seed  # the rows that it names must be clear of ties
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_fails(broken, rehearsal, monkeypatch):
    """In every case that looks at what is broken, in as many rows as are broken, and with the reason."""
    name, (owner, attribute, wrap), (ending, count) = BROKEN[broken]
    monkeypatch.setattr(owner, attribute, wrap(getattr(owner, attribute)))
    record = smoke.run_family(name, rehearsal)
    assert record["status"] == "FAIL"
    concerned = [case for case in record["cases"] if case["case"].endswith(ending)]
    assert concerned and all(case["mismatches"] > 0 for case in concerned), record["why"]
    assert count is None or all(case["mismatches"] == count for case in concerned), wrong_cases(record)
    assert concerned[0]["case"] in record["why"] and "differ" in record["why"]


@pytest.mark.one_seed  # the rows that it names must be clear of ties
@pytest.mark.parametrize(
    ("name", "field"), [("sweep-128", "threshold"), ("sweep-counts", "lse"), ("sweep-128", "score")]
)
def test_one_broken_number_is_the_only_one_that_is_reported(name, field, rehearsal, monkeypatch):
    owner, attribute, wrap = perturb(field, 1e-2)
    monkeypatch.setattr(owner, attribute, wrap(getattr(owner, attribute)))
    (case,) = wrong_cases(smoke.run_family(name, rehearsal))
    assert case.endswith({"score": "chains"}.get(field, field))


@pytest.mark.parametrize("name", ["loss-graph", "isir-loss-graph"])
def test_a_graph_of_a_loss_that_does_not_advance_fails(name, rehearsal, monkeypatch):
    def stale(function, context):
        first = function()
        return lambda: first

    monkeypatch.setattr(loss_trials, "capture", stale)
    record = smoke.run_family(name, rehearsal)
    assert record["status"] == "FAIL" and set(wrong_cases(record)) == {"loss replays", "loss stores"}


@interpreted
@pytest.mark.parametrize(("error", "wrong"), [(3e-7, {"log2 -> E"}), (2.2e-7, set())])
def test_a_logarithm_above_zero_is_counted_and_one_that_is_off_fails(error, wrong, monkeypatch):
    from bench.gpu import log2

    def fill_log2(raw, clamped, stride):
        u = families.uniforms(len(raw), stride, raw.device)
        raw.copy_(u.log2())
        raw[-1] = u[-1].log2() + error  # 2^-22 = 2.4e-7 is allowed
        raw[-3] -= 2e-7  # u's neighbours are 1.7e-7 apart
        clamped.copy_(raw.clamp_max(0))

    def near_one(count, stride, device):  # the last values of u
        return 1 - (torch.arange(count, 0, -1, device=device).double() - 0.5) * 2.0**-23

    monkeypatch.setattr(log2, "fill_log2", fill_log2)
    monkeypatch.setattr(families, "uniforms", near_one)
    record = smoke.run_family("log2", Context(CPU, "triton", "reference"))
    assert set(wrong_cases(record)) == wrong
    assert (record["status"] == "FAIL") == bool(wrong)
    notes = record["cases"][0]
    assert notes["below_zero"] == 1 and notes["least_u_below_zero"] == 1 - 2.0**-24 and notes["least"] < 0
    assert notes["rises"] == 1 and 0 < notes["largest_rise"] < 1e-7


@pytest.mark.parametrize(
    "name", ["sweep-128", "cuda-gathered", "gumbel-5", "isir-128", "lse-512", "loss-32", "graph", "cuda-log2"]
)
def test_an_exception_is_a_failure_with_its_type_and_message(name, rehearsal, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered" + "." * 5000)

    for owner, attribute in [(emc2, "mh_step"), (emc2, "mh_transition"), (emc2, "gumbel_sample"), (emc2, "isir_step"),
                             (emc2, "contrastive_lse"), (ops, "mh_step")]:  # fmt: skip
        monkeypatch.setattr(owner, attribute, broken)
    record = smoke.run_family(name, rehearsal)
    assert record["status"] == "FAIL" and record["cases"] == [] and record["largest_error"] is None
    assert "RuntimeError: CUDA error: an illegal memory access" in record["why"] and len(record["why"]) == 2000


def test_an_exception_in_a_later_trial_keeps_the_cases_before_it(rehearsal, monkeypatch):
    calls, original = [], emc2.mh_step

    def broken(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("no")
        return original(*arguments, **options)

    monkeypatch.setattr(emc2, "mh_step", broken)
    record = smoke.run_family("sweep-split", rehearsal)
    assert (
        record["status"] == "FAIL"
        and record["why"] == "sweep 32x128 d=128 bfloat16: ValueError: no"
        and len(record["cases"]) == 2
    )


@interpreted
@pytest.mark.parametrize("name", ["loss-32", "isir-loss-32"])
def test_the_plain_path_is_not_taken_for_the_fused_one(name, monkeypatch):
    for module in (fused, emc2_isir_fused):
        monkeypatch.setattr(module, "runs", lambda *arguments: False)
    record = smoke.run_family(name, Context(CPU, "triton", "reference"))
    assert record["status"] == "FAIL" and "fused path" in record["why"]


# Devices.


class NothingOnTheDefaultDevice(TorchFunctionMode):
    """Raises where a tensor is made that does not say where: on a GPU it would meet tensors of another device."""

    MAKERS = ("arange", "tensor", "as_tensor", "zeros", "ones", "full", "empty", "rand", "randn", "randint", "linspace")

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if getattr(function, "__name__", "") in self.MAKERS and "device" not in options:
            raise AssertionError(f"{function.__name__}{arguments} without a device")
        return function(*arguments, **options)


@pytest.mark.parametrize("name", smoke.FAMILIES)
def test_what_is_made_to_judge_is_made_on_the_device(name, rehearsal):
    family = smoke.FAMILIES[name]
    with pytest.raises(AssertionError), NothingOnTheDefaultDevice():
        torch.arange(3)
    with NothingOnTheDefaultDevice():
        families.find_draws(rehearsal)
    for trial in family.trials(rehearsal, rehearsal.backend(family.kind)):
        found = trial.call()
        with NothingOnTheDefaultDevice():
            assert trial.judge(found)


def test_a_second_call_that_differs_from_the_first_fails():
    first = families.call_twice(lambda: (torch.ones(3), [torch.zeros(2, 2), None, "no tensor"]))
    assert [len(tensors) for tensors in first] == [2, 2]
    (case,) = families.judge_again("walk", "a", first)
    assert (case.case, case.rows, case.mismatches, case.failure()) == ("walk a again", 5, 0, None)
    first[1][1][1, 0] = 2.0**-149
    (case,) = families.judge_again("walk", "a", first)
    assert case.mismatches == 1 and "1 of 5" in case.failure()


# Warming up, and what is not there.


def test_warming_calls_each_kernel_once_and_compares_nothing(rehearsal, monkeypatch):
    calls = []

    def judge(found):
        raise AssertionError("judged")

    def trials(context, backend):
        for name in "ab":
            yield Trial(name, lambda name=name: calls.append((name, backend)), judge)

    monkeypatch.setitem(smoke.FAMILIES, "fake", smoke.Family("cuda", trials))
    record = smoke.run_family("fake", rehearsal, warm=True)
    assert record["status"] == "WARM" and record["cases"] == [] and record["why"] == ""
    assert calls == [("a", "reference"), ("b", "reference")]
    assert smoke.run_family("fake", rehearsal)["why"] == "a: AssertionError: judged"


def test_products_are_full_ones(rehearsal):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        smoke.run_family("gumbel-1", rehearsal, warm=True)
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("name", ["sweep-counts", "loss-32", "lse-128"])
def test_warming_does_not_see_what_is_wrong(name, monkeypatch, capsys):
    owner, attribute, wrap = perturb("threshold", 1.0)
    monkeypatch.setattr(owner, attribute, wrap(getattr(owner, attribute)))
    monkeypatch.setattr(gpu_oracle, "similarities", None)
    assert smoke.main(["--family", name, "--warm", "--rehearse"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["status"] == "WARM" and record["cases"] == [] and record["largest_error"] is None


def test_a_backend_that_is_not_there_is_skipped_if_it_may_be_missing(monkeypatch):
    monkeypatch.setattr(emc2, "backends", lambda: {"triton": "no Triton", "cuda": "no nvcc"})
    context = Context(CPU)
    found = {name: smoke.run_family(name, context) for name in ("sweep-128", "cuda-sweep")}
    assert found["sweep-128"]["status"] == "FAIL" and found["sweep-128"]["why"] == "backend 'triton': no Triton"
    assert found["cuda-sweep"]["status"] == "SKIP" and found["cuda-sweep"]["why"] == "backend 'cuda': no nvcc"


# The command.


def run_here(*words):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    command = [sys.executable, "-m", "bench.gpu.smoke", *words]
    return subprocess.run(command, cwd=CHECKOUT, env=clean, capture_output=True, text=True)


def test_the_list(capsys):
    assert smoke.main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == list(smoke.FAMILIES) and len(names) > 15 and all(name == name.strip() for name in names)


@without_gpu
@pytest.mark.parametrize("words", [["--family", "sweep-128"], ["--family", "log2", "--warm"]])
def test_without_a_gpu_it_says_so(words, capsys):
    assert smoke.main(words) == 1
    assert capsys.readouterr().out == smoke.NO_GPU + "\n"


@pytest.mark.parametrize(
    "words", [[], ["--warm"], ["--family", "none"], ["--nonsense"], ["--list", "--backend", "cpu"]]
)
def test_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        smoke.main(words)
    assert stopped.value.code == 2


def test_one_family_prints_its_record_last():
    """In a process of its own, in a bare checkout, with nothing on the path."""
    done = run_here("--family", "sweep-512", "--rehearse", "--backend", "reference")
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and record["status"] == "PASS", done.stderr[-2000:]
    assert list(record) == ["family", "status", "cases", "largest_error", "seconds", "why"]
    assert set(record["cases"][0]) == {"case", "rows", "compared", "mismatches", "largest_error", "bound"}


def test_a_family_that_fails_is_the_exit_status(monkeypatch, capsys):
    owner, attribute, wrap = perturb("threshold", 1.0)
    monkeypatch.setattr(owner, attribute, wrap(getattr(owner, attribute)))
    assert smoke.main(["--family", "sweep-128", "--rehearse"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "FAIL"
