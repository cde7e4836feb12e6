"""Run by every rank (see ranks.py): stores that lie over the ranks by item, beside one process's."""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import assert_identical, snapshot

from emc2_kernels import ChainStore, EmbeddingBank, checkpoint
from emc2_kernels.transition import MHState

DIM = 4
ITEMS = (25, 5, 2)  # with four ranks the last one has four of 25 items, none of 5, and of 2 only the first two have any


def stores(items, **sharded):
    return torch.nn.ModuleList((ChainStore(items, **sharded), EmbeddingBank(items, DIM, **sharded)))


def filled(items, size, group=None, sharded=False):
    """Stores with what so many ranks write at random, repeated slots among them: each its part, or one all of it."""
    found = stores(items, **({"process_group": group, "sharded": True} if sharded else {}))
    draw = torch.Generator().manual_seed(0)
    own = slice(4 * dist.get_rank(group), 4 * dist.get_rank(group) + 4) if sharded else slice(None)
    for step in range(3):
        n = 4 * size
        index, view = torch.randint(items, (n,), generator=draw), torch.randint(2, (n,), generator=draw)
        key, score = torch.randint(-1, 2 * items, (n,), generator=draw), torch.randn(n, generator=draw)
        embeddings = torch.randn(n, DIM, generator=draw)
        found[0].write(index[own], view[own], MHState(key[own], score[own]))
        found[1].update(index[own], view[own], embeddings[own], step)
    return found


def reads(items, rank, size):
    """Each rank asks for something else, and for another number of rows: the first for none."""
    draw = torch.Generator().manual_seed(rank)
    n = 3 * rank
    index, view = torch.randint(items, (n,), generator=draw), torch.randint(2, (n,), generator=draw)
    labels, queries = torch.randint(-1, 2 * items, (n,), generator=draw), torch.randn(n, DIM, generator=draw)
    found = []
    for chains, bank in (filled(items, size), filled(items, size, sharded=True)):
        states = chains.read(index, view), chains.read(index, view, queries, bank, 0.5)
        found.append([*states[0], *states[1], bank.lookup(labels), bank.age(labels)])
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)]


def loads(items, size):
    """States of one process and of ranks, each into stores of both kinds; those of more items must refuse it."""
    whole, part = filled(items, size), filled(items, size, sharded=True)
    found = []
    for source in (whole, part):
        for kind in ({}, {"sharded": True}):
            fitting, other = stores(items, **kind), stores(items + 1, **kind)
            before = snapshot(other)
            fitting.load_state_dict(source.state_dict())
            try:
                other.load_state_dict(source.state_dict())
                message = ""
            except RuntimeError as error:
                message = str(error)
            del before["1.last_step"]  # which fits
            kept = {name: table for name, table in snapshot(other).items() if name in before}
            assert_identical(kept, before)
            found.append([same(fitting, whole), "size mismatch for 0.key" in message])
    return found


def same(some, others):
    mine, theirs = snapshot(some), snapshot(others)
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def another_number_of_ranks(rank, size):
    """Saved by half of the ranks, loaded and saved by all, loaded by half again."""
    folders = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folders)
    half = max(1, size // 2)
    group, saved = dist.new_group(list(range(half))), Path(folders[0])
    whole, found = filled(25, half), []
    if rank < half:
        dcp.save(filled(25, half, group, sharded=True).state_dict(), checkpoint_id=saved / "half", process_group=group)
    dist.barrier()
    everyone = loaded(saved / "half", None)
    found.append(same(everyone, whole))
    dcp.save(everyone.state_dict(), checkpoint_id=saved / "all")
    if rank < half:
        found.append(same(loaded(saved / "all", group), whole))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(saved)
    return found


def loaded(folder, group):
    fresh = stores(25, process_group=group, sharded=True)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=folder, process_group=group)
    fresh.load_state_dict(state)
    return fresh


def of_other_ranks(rank):
    """The errors of ranks that are given what the first two have of a store; it must be left alone."""
    pair = dist.new_group([0, 1])
    found = []
    if rank < 2:
        state, other = filled(25, 2, pair, sharded=True).state_dict(), stores(25, sharded=True)
        before = [table.clone() for table in (other[0].key, other[1].embeddings)]
        try:
            other.load_state_dict(state)
        except RuntimeError as error:
            found.append("0.key must lie over the ranks of this module, got a DTensor" in str(error))
        found.append(torch.equal(other[0].key, before[0]) and torch.equal(other[1].embeddings, before[1]))
    dist.barrier()
    return found


def single_file(size):
    """[error, whether there is a file] where what writes whole files is given a rank's part of a store."""
    state = filled(5, size, sharded=True).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        try:
            checkpoint.save(path, {"loss": [state]})
        except TypeError as error:
            return [str(error), path.exists()]


def checks(rank, size):
    found = {f"sharded reads: {items}": partial(reads, items, rank, size) for items in ITEMS}
    found |= {f"sharded loads: {items}": partial(loads, items, size) for items in ITEMS}
    found["sharded: another number of ranks"] = partial(another_number_of_ranks, rank, size)
    if size > 2:
        found["sharded: of other ranks"] = partial(of_other_ranks, rank)
    return found | {"sharded: single file": partial(single_file, size)}
