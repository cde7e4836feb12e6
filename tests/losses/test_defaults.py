"""torch's default dtype, default device and determinism are the user's: nothing here may depend on them."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import RUNNABLE, assert_identical, int64, normal
from test_losses_common import NAMES, make, towers

import emc2_kernels as emc2
from emc2_kernels import batching

# Tensors out of nothing, whose dtype and device are the defaults unless they are said.
CONSTRUCTORS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros"}
CONSTRUCTORS |= {"as_tensor", "asarray", "empty_strided", "logspace", "scalar_tensor", "tensor"}
ITEMS, DIM, B = 10, 8, 4
Z0, Z1, INDEX = normal(0, B, DIM), normal(1, B, DIM), int64(1, 4, 6, 9)
QUERIES, KEYS, IDS = normal(2, 6, DIM), normal(3, 40, DIM), torch.arange(40)
TABLE, IDS_OF_TABLE = normal(4, 60, DIM), torch.arange(60)
# Beside each loss as it comes: what takes other paths through it.
OPTIONS = {
    "emc2": [{"proposals": "bank"}, {"views": "both"}],
    "emc2 isir": [{"views": "one", "queue": 5}, {"decoupled": False}],
    "isogclr": [{"gamma_schedule": "cosine", "gamma_steps": 5}],
    "clip": [{"learn_temperature": True}],
}


@contextmanager
def other_default(name):
    """No operation joins a tensor of the meta device with one of another: it stands for a GPU."""
    try:
        if name == "device":
            torch.set_default_device("meta")
        elif name == "deterministic":  # what is allocated is then filled with NaN, too
            torch.use_deterministic_algorithms(True)
        else:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.fixture(params=["bfloat16", "float64", "device", "deterministic"])
def default(request):
    return request.param


def constructors(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            module, _, name = ast.unparse(node.func).rpartition(".")
            if module == "torch" and name in CONSTRUCTORS:
                yield node


def test_every_tensor_constructor_says_dtype_and_device():
    package, unsaid, seen = Path(emc2.__file__).parent, [], 0
    for path in sorted(package.rglob("*.py")):
        for node in constructors(path):
            seen += 1
            said = {keyword.arg for keyword in node.keywords}
            needed = {"device"} if ast.unparse(node.func) == "torch.as_tensor" else {"dtype", "device"}
            if not needed <= said:
                unsaid.append(f"{path.relative_to(package)}:{node.lineno}: {ast.unparse(node)}")
    assert seen > 30 and not unsaid


def primitives(backend):
    options = {"temperature": 0.2, "seed": 5, "step": 3, "backend": backend}
    ids = {"query_ids": IDS[:6], "key_ids": IDS}
    state = emc2.init_state(6, device="cpu")
    swept = emc2.mh_step(QUERIES, KEYS, state, **ids, return_accepts=True, return_lse=True, **options)
    # A temperature for each row, as a tensor of another dtype.
    options["temperature"] = torch.full((6,), 0.3, dtype=torch.float64, device="cpu")
    uniform = emc2.mh_step(QUERIES, KEYS, swept.state, proposal="uniform", num_proposals=9, num_samples=3, **options)
    walked = emc2.mh_transition(QUERIES, KEYS, **ids, num_samples=4, **options)
    applied = emc2.apply(emc2.compose(walked, walked), state, key_labels=IDS)
    drawn = emc2.gumbel_sample(QUERIES, KEYS, **ids, num_samples=2, **options)
    del options["backend"]
    naive = emc2.softmax_sample(QUERIES, KEYS, **ids, num_samples=2, **options)
    return [swept, uniform, walked, applied, drawn, naive]


def resampled(backend):
    """Twice, from nowhere and carried on; with ids and without, and temperatures as above."""
    options, ids = {"seed": 5, "step": 3, "backend": backend}, {"query_ids": IDS[:6], "key_ids": IDS}
    first = emc2.isir_step(QUERIES, KEYS, emc2.init_state(6, device="cpu"), temperature=0.2, **options)
    temperature = torch.full((6,), 0.3, dtype=torch.float64, device="cpu")
    carried = {"carried_ids": first.state.key, "log_proposal": KEYS[:, 0]}
    return [first, emc2.isir_step(QUERIES, KEYS, first.state, temperature=temperature, **ids, **carried, **options)]


@pytest.mark.parametrize("backend", RUNNABLE)
def test_primitives(backend, default):
    plain = primitives(backend)
    with other_default(default):
        found = primitives(backend)
    assert_identical(found, plain)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_steps_over_all_keys(backend, default):
    plain = resampled(backend)
    with other_default(default):
        found = resampled(backend)
    assert_identical(found, plain)


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "cuda"])
def test_log_sum_exp_and_its_gradient(backend, default):
    """Of other keys, and of queries that are the keys; with ids and without."""

    def values():
        found = []
        for queries, keys, ids in ((QUERIES, KEYS, IDS), (TABLE, TABLE, None), (TABLE, TABLE, IDS_OF_TABLE)):
            queries, temperature = queries.clone().requires_grad_(), queries.new_tensor(0.2).requires_grad_()
            options = {} if ids is None else {"query_ids": ids[: len(queries)], "key_ids": ids}
            lse = emc2.contrastive_lse(queries, keys, temperature=temperature, backend=backend, **options)
            found += [lse.detach(), *torch.autograd.grad(lse.sum(), (queries, temperature))]
        return found

    plain = values()
    with other_default(default):
        found = values()
    assert_identical(found, plain)


@NAMES
def test_losses(name, default):
    """Two steps and one in evaluation mode: value, gradients, statistics, and what is kept. Losses are made on the
    default device, as every module is; what they do then must not ask for it again."""

    def steps(options):
        with torch.device("cpu"):
            loss = make(name, **options)
            if "proposals" in options:  # so that there is something to propose
                loss.bank.update(torch.arange(ITEMS), 0, TABLE[:ITEMS], 0)
            leaves = [z.clone().requires_grad_() for z in (Z0, Z1)]
        found = []
        for training in (True, True, False):
            value, stats = loss.train(training)(*leaves, INDEX, return_stats=True)
            found += [value.detach(), stats, *torch.autograd.grad(value, leaves)]
        return found, loss.state_dict()

    for options in [*towers(name), *OPTIONS.get(name, [])]:
        plain = steps(options)
        with other_default(default):
            found = steps(options)
        assert_identical(found, plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes_of_what_is_made(dtype):
    with other_default(dtype):
        assert emc2.init_state(3).score.dtype == torch.float32
        assert emc2.losses.ClipLoss(learn_temperature=True).log_scale.dtype == torch.float32
        assert emc2.EmbeddingBank(5, 3).embeddings.dtype == torch.bfloat16


def test_modules_are_made_on_the_default_device():
    with other_default("device"):
        made = [*make("emc2", proposals="bank").state_dict().values(), *emc2.init_state(3)]
        assert {value.device.type for value in made} == {"meta"}


def test_batching(default):
    def orders():
        sampler = batching.GlobalContrastiveBatchSampler(60, 6, quantile=0.9, progress=False)
        before = list(sampler)
        sampler.update(TABLE, TABLE.flip(0))
        batches = list(sampler)
        gap = batching.global_train_gap(TABLE, TABLE.flip(0), [*batches, [0, 1]], temperature=0.2)
        again = batching.GlobalContrastiveBatchSampler(60, 6, quantile=0.9, progress=False)
        again.load_state_dict(sampler.state_dict())
        return before, batches, list(again), list(gap)

    plain = orders()
    with other_default(default):
        found = orders()
    assert found == plain


def test_checkpoint(default, tmp_path):
    state = make("emc2").state_dict()
    with other_default(default):
        emc2.checkpoint.save(tmp_path / "state", state)
        assert_identical(emc2.checkpoint.load(tmp_path / "state"), dict(state))
