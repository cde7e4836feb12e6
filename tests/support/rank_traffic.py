"""Run by every rank (see ranks.py): bytes that a step sends, and the largest tensors that it makes."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from helpers import normal
from rank_wrapped import make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emc2_kernels import lse
from emc2_kernels.distributed import ring
from emc2_kernels.distributed.shards import Shards, gather_rows
from emc2_kernels.losses import EMC2Loss

B, DIM = 6, 16
CASES = [f"{loss} {gather}" for loss in ("ntxent", "clip", "emc2", "isir") for gather in ("all", "ring")]
SHARDED = ["emc2 all", "emc2 ring", "isir all", "isir ring"]
MANY, OF = 3000, 15000  # rows of a rank and items, of which a rank then asks the others for what can be told beforehand


def step(case, rank):
    """A loss, its forward pass and its backward pass."""
    name, gather = case.split()
    loss = make(name, {}, gather=gather)
    z0, z1 = (normal(10 * rank + view, B, DIM).requires_grad_() for view in (0, 1))
    index, values = torch.arange(B) + B * rank, []
    return loss, lambda: values.append(loss(z0, z1, index)), lambda: values.pop().backward()


@contextmanager
def counted(rank, size):
    """Bytes that this rank has to send, by collective; what goes to several receivers counts for each."""
    sent = {}

    def watch(name, bytes_of):
        function = getattr(dist, name)

        def watched(*arguments, **options):
            sent[name] = sent.get(name, 0) + bytes_of(*arguments)
            return function(*arguments, **options)

        return mock.patch.object(dist, name, watched)

    def to_others(_, mine, *__):
        return mine.nbytes * (size - 1)

    def split(_, mine, __=None, sizes=(1,) * size, *___):
        return mine.nbytes * (sum(sizes) - sizes[rank]) // max(sum(sizes), 1)

    def isends(calls):
        return sum(call.tensor.nbytes for call in calls if call.op is dist.isend)

    def broadcast(tensor, source, *_):
        return tensor.nbytes * (size - 1) if source == rank else 0

    all_gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    with (
        watch(all_gather, to_others),
        watch("all_to_all_single", split),
        watch("batch_isend_irecv", isends),
        watch("broadcast", broadcast),
    ):
        yield sent


def sharded(loss, gather, rank, size):
    """[forward, backward] bytes with chains and embeddings at their owners. All chains sit on items drawn uniformly,
    and what is outside the batch is left out, so that reads and writes are all that is asked of others."""
    draw = torch.Generator().manual_seed(0)
    walk = {"num_samples": 1, "burn_in": 0.0} if loss == "emc2" else {}
    options = {"num_items": OF, "dim": DIM} | walk
    whole, part = EMC2Loss(**options), EMC2Loss(**options, gather=gather, sharded=True)
    whole.chains.key.copy_(torch.randint(2 * OF, (2 * OF,), generator=draw))
    whole.chains.score.zero_()
    whole.bank.embeddings.normal_(generator=draw)
    whole.bank.written_at.zero_()
    part.load_state_dict(whole.state_dict())
    z0, z1 = (normal(10 * rank + view, MANY, DIM).requires_grad_() for view in (0, 1))
    index = torch.randperm(OF, generator=draw)[rank * MANY :][:MANY]
    totals = []
    with counted(rank, size) as sent:
        value = part(z0, z1, index)
        totals.append(sum(sent.values()))
        value.backward()
    return [totals[0], sum(sent.values()) - totals[0]]


def traffic(case, rank, size):
    """[forward, backward] bytes."""
    totals = []
    for half in step(case, rank)[1:]:
        with counted(rank, size) as sent:
            half()
        totals.append(sum(sent.values()))
    return totals


class Largest(TorchDispatchMode):
    """The most elements of any storage that operations give back, other than those of ``kept``."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.elements = {tensor.untyped_storage().data_ptr() for tensor in kept}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.kept:
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return made


def largest(case, rank):
    loss, forward, backward = step(case, rank)
    with Largest(loss.state_dict().values()) as seen:
        forward()
        backward()
    return seen.elements


def half_precision(rank, size):
    """Relative errors of the keys' gradients in bfloat16: sums of what ranks send, over a ring and gathered."""
    shards = Shards(None, rank, [B] * size)
    queries, keys = normal(rank, B, DIM), normal(100 + rank, B, DIM)
    ids = torch.arange(B) + B * rank, torch.arange(B) + 1000 + B * rank, None
    found = {}
    for name, dtype in (("exact", torch.float64), ("ring", torch.bfloat16), ("all", torch.bfloat16)):
        rounded = queries.bfloat16().to(dtype), keys.bfloat16().to(dtype).requires_grad_()
        if name == "ring":
            lse_of_rows = ring.ring_lse(*rounded, 1.0, ids, shards, "auto")
        else:
            whole = gather_rows(rounded[1], shards), gather_rows(ids[1], shards)
            options = {"temperature": 1.0, "query_ids": ids[0], "key_ids": whole[1]}
            lse_of_rows = lse.contrastive_lse(rounded[0], whole[0], **options)
        lse_of_rows.sum().backward()
        found[name] = rounded[1].grad.double()
    return [((found[name] - found["exact"]).norm() / found["exact"].norm()).item() for name in ("ring", "all")]


def checks(rank, size):
    found = {f"traffic: {case}": partial(traffic, case, rank, size) for case in CASES}
    found |= {f"largest: {case}": partial(largest, case, rank) for case in CASES}
    for case in SHARDED:
        found[f"traffic: sharded {case}"] = partial(sharded, *case.split(), rank, size)
    return found | {"half precision": partial(half_precision, rank, size)}
