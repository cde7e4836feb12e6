"""Checkpoints: whole or refused, through killed processes and damaged files, and resumed to the same bits."""

import errno
import hashlib
import io
import itertools
import multiprocessing
import random
import resource
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from helpers import differences
from torch import nn

from emc2_kernels import checkpoint, files
from emc2_kernels.batching import GlobalContrastiveBatchSampler
from emc2_kernels.checkpoint import CheckpointError
from emc2_kernels.losses import CachedSoftmaxLoss, EMC2Loss, SogCLRLoss

STATE = {"weights": {"w": torch.arange(2000.0).view(40, 50)}, "steps": [1, 2.5, "three", None], "done": True}


def saved(tmp_path, state=STATE):
    path = tmp_path / "state.pt"
    checkpoint.save(path, state)
    return path


def test_what_is_saved_is_loaded(tmp_path):
    path = saved(tmp_path)
    assert differences(checkpoint.load(path), STATE) == []
    assert differences(checkpoint.load(str(path)), STATE) == []
    assert differences(torch.load(path), STATE) == []
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_every_flipped_bit_is_found(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    draws = random.Random(0)
    end = 8 * len(whole)
    flips = draws.sample(range(end), 250) + draws.sample(range(end - 8 * checkpoint.SEAL_BYTES, end), 50)
    silent = 0  # in torch.load, without the seal
    for flip in flips:
        damaged = bytearray(whole)
        damaged[flip // 8] ^= 1 << flip % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="expected a whole checkpoint, found a"):
            checkpoint.load(path)
        try:
            torch.load(io.BytesIO(damaged), weights_only=True)
            silent += 1
        except Exception:
            pass
    assert silent > 200  # or the seal would be for nothing
    path.write_bytes(whole)
    assert differences(checkpoint.load(path), STATE) == []


def test_every_truncation_is_found(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    lengths = [*range(0, len(whole), len(whole) // 150), *range(len(whole) - 60, len(whole))]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            checkpoint.load(path)
    for longer in (b"\0", b"more" * 100):
        path.write_bytes(whole + longer)
        with pytest.raises(CheckpointError, match="expected a whole checkpoint"):
            checkpoint.load(path)


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(CheckpointError, match="state.pt: expected a checkpoint, found no such file"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="expected a checkpoint, found what cannot be read: Is a directory"):
        checkpoint.load(tmp_path)
    torch.save(STATE, path)
    with pytest.raises(CheckpointError, match="found a file without a checkpoint's end"):
        checkpoint.load(path)
    # Sealed, but no data: unpickling it would run code.
    with open(path, "wb") as file:
        digested = checkpoint._Digested(file)
        torch.save({"directory": tmp_path}, digested)
        file.write(files.seal(digested.sha256))
    with pytest.raises(CheckpointError, match="that this PyTorch reads, found another: UnpicklingError"):
        checkpoint.load(path)


def unreadable_bodies():
    """What torch.load stops at with an error of its own, of many kinds."""
    whole = io.BytesIO()
    torch.save(STATE, whole)
    yield from (b"", b"rubbish", b"\x80\x02.", b"\x80\x02(.", b"\x80\x02K\x01\x86.", b"\x80\x02h\x05.", b"PK\x03\x04")
    yield b"\x80\x02" + b"(" * 2000 + b"t" * 2000 + b"."
    yield whole.getvalue()[: len(whole.getvalue()) // 2]
    yield whole.getvalue()[:-1]
    draws = random.Random(1)
    for flip in draws.sample(range(len(whole.getvalue())), 200):
        damaged = bytearray(whole.getvalue())
        damaged[flip] ^= 1 << draws.randrange(8)
        yield bytes(damaged)


def test_a_sealed_file_that_torch_cannot_read_is_refused_by_name(tmp_path):
    path, kinds = tmp_path / "state.pt", set()
    for body in unreadable_bodies():
        path.write_bytes(body + files.seal(hashlib.sha256(body)))
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            kinds.add(type(error).__name__)
            with pytest.raises(CheckpointError, match="state.pt: expected a checkpoint that this PyTorch reads, found"):
                checkpoint.load(path)
        else:
            checkpoint.load(path)
    assert {"IndexError", "RuntimeError", "UnpicklingError"} <= kinds


def test_a_device_that_is_not_there_is_no_fault_of_the_file(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(RuntimeError, match="flagship") as raised:
        checkpoint.load(path, map_location="flagship")
    assert not isinstance(raised.value, CheckpointError)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(TypeError, match=r"state must be tensors, .*, got pathlib"):
        checkpoint.save(path, STATE | {"directory": tmp_path})
    endless = deep = []
    for _ in range(100_000):
        deep = [deep]
    endless.append(endless)
    for other in (lambda: 0, threading.Lock(), deep, endless):
        with pytest.raises(TypeError, match=r"state must be tensors, numbers, .*, got "):
            checkpoint.save(path, STATE | {"other": other})
    assert differences(checkpoint.load(path), STATE) == []
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = saved(tmp_path)

    def half_written(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"other": 2})
    assert differences(checkpoint.load(path), STATE) == []
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


@contextmanager
def no_file_longer_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_is_an_oserror_wherever_it_ends(tmp_path):
    """In what torch.save writes it is torch's own writer that meets it, which tells of it as a RuntimeError."""
    path = saved(tmp_path)
    other = {"weights": torch.arange(500_000.0)}
    checkpoint.save(tmp_path / "other.pt", other)
    whole = (tmp_path / "other.pt").stat().st_size
    for size in (0, 100, 5000, 100_000, whole - 1000, whole - checkpoint.SEAL_BYTES, whole - 1):
        with no_file_longer_than(size), pytest.raises(OSError) as raised:
            checkpoint.save(path, other)
        assert raised.value.errno == errno.EFBIG  # exact
        assert differences(checkpoint.load(path), STATE) == []
        assert sorted(file.name for file in tmp_path.iterdir()) == ["other.pt", "state.pt"]
    with no_file_longer_than(whole):
        checkpoint.save(path, other)
    assert differences(checkpoint.load(path), other) == []


def save_for_ever(path, first):
    torch.set_num_threads(1)  # threads do not survive the fork
    for step in itertools.count(first):
        checkpoint.save(path, {"step": step, "tensors": [torch.full((size,), step) for size in (7, 10_000)]})


def kill_while_saving(path, kills, seed, until_amid=False):
    """Kills a process that saves as fast as it can; each time there must be a whole checkpoint, and no older one than
    before. Returns the last step and how many kills left a half-written file behind. until_amid: goes on, up to ten
    times as long, until there is one, which on busy cores can take a while."""
    draws, halves, step = random.Random(seed), 0, 0
    checkpoint.save(path, {"step": 0, "tensors": []})
    for kill in range(10 * kills if until_amid else kills):
        if kill >= kills and halves > 0:
            break
        before = path.stat().st_mtime_ns
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path, step + 1))
        process.start()
        while path.stat().st_mtime_ns == before:
            time.sleep(0.001)
            assert process.is_alive()
        time.sleep(draws.uniform(0, 0.05))
        process.kill()
        process.join()
        state = checkpoint.load(path)
        assert state["step"] > step  # exact
        step = state["step"]
        assert all((tensor == step).all() for tensor in state["tensors"])
        drafts = [file for file in path.parent.iterdir() if file.name.endswith(".partial")]
        assert len(drafts) <= 1  # of the kills before, nothing is left
        halves += len(drafts)
    return step, halves


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path):
    _, halves = kill_while_saving(tmp_path / "state.pt", kills=10, seed=0, until_amid=True)
    assert halves > 0  # exact


@pytest.mark.slow
def test_200_killed_processes_leave_whole_checkpoints(tmp_path):
    step, halves = kill_while_saving(tmp_path / "state.pt", kills=200, seed=1)
    print(f"200 kills, {step} saves, {halves} kills amid a write")
    assert halves > 50


ITEMS, DIM, STEPS, BATCH = 44, 6, 12, 8  # an epoch is 5 batches, and 4 items that it leaves out
LOSSES = {
    "emc2": lambda encode: EMC2Loss(ITEMS, DIM, temperature=0.2, burn_in=0.0),
    "emc2 from the bank, corrected": lambda encode: EMC2Loss(ITEMS, DIM, temperature=0.2, proposals="bank"),
    "emc2 by i-SIR": lambda encode: EMC2Loss(ITEMS, DIM, temperature=0.2, sampler="isir"),
    "emc2 by i-SIR, one view": lambda encode: EMC2Loss(
        ITEMS, DIM, temperature=0.2, sampler="isir", views="one", queue=3, bank_dtype=torch.float32
    ),
    "emc2 by i-SIR, recomputed": lambda encode: EMC2Loss(
        ITEMS, DIM, temperature=0.2, sampler="isir", bimodal=True, carry="recompute", encode=encode
    ),
    "sogclr": lambda encode: SogCLRLoss(ITEMS, temperature=0.2),
    "isogclr": lambda encode: SogCLRLoss(ITEMS, temperature=0.2, individual_temperature=True),
    "cached": lambda encode: CachedSoftmaxLoss(ITEMS, DIM, temperature=0.2, encode=encode, refresh=0.1),
}


class Loop:
    """A training loop in small: what changes in it is in its state."""

    def __init__(self, name):
        self.data = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(0))
        self.noise = torch.Generator().manual_seed(1)
        self.encoder = nn.Linear(DIM, DIM)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.eye(DIM))
            self.encoder.bias.zero_()
        self.loss = LOSSES[name](self.encode)
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=0.01)
        self.sampler = GlobalContrastiveBatchSampler(ITEMS, BATCH, quantile=0.8, drop_last=True, progress=False)
        self.batches = self.endless_batches()
        # Chains whose proposals are the batch need uniform ones, as the sampler's are before its first update.
        self.chooses = getattr(self.loss, "proposals", "bank") != "batch"

    def encode(self, items, views):
        return self.encoder(self.data[items] + 0.1 * torch.randn(len(items), DIM, generator=self.noise))

    def endless_batches(self):
        while True:
            if self.chooses and self.sampler.epoch > 0 and self.sampler.state_dict()["batches_done"] == 0:
                self.sampler.update(self.encoder(self.data).detach())
            yield from self.sampler

    def run(self, steps):
        for batch in itertools.islice(self.batches, steps):
            items = torch.tensor(batch)
            z0, z1 = self.encode(items, 0), self.encode(items, 1)
            self.optimizer.zero_grad()
            self.loss(z0, z1, items).backward()
            self.optimizer.step()

    def parts(self):
        return {name: getattr(self, name) for name in ("encoder", "loss", "optimizer", "sampler")}

    def state(self):
        return {name: part.state_dict() for name, part in self.parts().items()} | {"noise": self.noise.get_state()}

    def load(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.noise.set_state(state["noise"])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loop_resumed_after_any_step_ends_at_the_same_bits(name, tmp_path):
    whole = Loop(name)
    for step in range(STEPS):
        checkpoint.save(tmp_path / f"{step}.pt", whole.state())
        whole.run(1)
    for step in range(STEPS):
        resumed = Loop(name)
        resumed.load(checkpoint.load(tmp_path / f"{step}.pt"))
        resumed.run(STEPS - step)
        assert differences(resumed.state(), whole.state()) == []
