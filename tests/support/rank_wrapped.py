"""Run by every rank (see ranks.py): training under DistributedDataParallel or FSDP2's fully_shard, beside one process
with the whole batch."""

import copy
from functools import partial

import torch
from helpers import differences, snapshot
from rank_losses import ITEMS, relative, state_error
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from emc2_kernels import losses

DIM = 16
LOSSES = {  # name, options, gather
    "ntxent all": ("ntxent", {"learn_temperature": True}, "all"),
    "clip ring": ("clip", {"learn_temperature": True}, "ring"),
    "emc2 all": ("emc2", {"bank_dtype": torch.float32}, "all"),
    "emc2 ring": ("emc2", {"bank_dtype": torch.float32}, "ring"),
    "emc2 sharded": ("emc2", {"bank_dtype": torch.float32}, "all"),
    "isir all": ("isir", {"bank_dtype": torch.float32, "views": "one", "queue": 5}, "all"),
    "isir ring": ("isir", {"bank_dtype": torch.float32}, "ring"),
    "isir sharded": ("isir", {"bank_dtype": torch.float32}, "all"),
    "isogclr all": ("isogclr", {}, "all"),
    "cached all": ("cached", {"bank_dtype": torch.float32}, "all"),
}
ALONE = (
    "emc2 all",
    "emc2 ring",
    "emc2 sharded",
    "isir all",
    "isir ring",
    "isir sharded",
    "cached all",
)  # without parameters of their own, which would not be averaged
WRAPPED = [f"encoder: {name}" for name in ALONE] + [f"encoder and loss: {name}" for name in LOSSES]
SHARDED = [f"fully sharded: {name}" for name in ("ntxent all", "clip ring", "emc2 all", "isir all")]
KEEPING = [*ALONE, "isogclr all"]
LOCAL = ["emc2", "isir", "isogclr", "cached"]  # those that keep something


class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, DIM))
        self.loss = loss
        self.seen = None  # by the loss

    def forward(self, views, index):
        self.seen = self.encoder(views.flatten(0, 1)).chunk(2)
        return self.loss(*self.seen, index)


def make(name, options, **gather):
    """A loss by its name; "emc2" is the walk, unless an option says otherwise, and "isir" is EMC2 with that sampler."""
    if name in ("emc2", "isir"):
        name, options = "emc2", {"sampler": "mh" if name == "emc2" else name} | options
    takes = losses.TABLE[name].options()
    sizes = {size: value for size, value in {"num_items": ITEMS, "dim": DIM}.items() if size in takes}
    return losses.get(name, **sizes, temperature=0.25, **options, **gather)


def batches(rank, size):
    """(2, B, 8) views and (B,) items of the whole batch, and this rank's rows."""
    draw = torch.Generator().manual_seed(3)
    for sizes in ([4, 2, 5, 3][:size], [2, 3, 1, 4][:size]):
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        total = sum(sizes)
        yield torch.randn(2, total, 8, generator=draw), torch.randint(ITEMS, (total,), generator=draw), own


def whole_of(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(rank, size, kind, name):
    """The worst relative errors of gradients and of what the loss keeps, over two steps of SGD."""
    loss, options, gather = LOSSES[name]
    over = {"gather": gather} | ({"sharded": True} if name.endswith("sharded") else {})
    whole, model = Model(make(loss, options)), Model(make(loss, options, **over))
    if kind == "encoder":
        encoder = DistributedDataParallel(model.encoder)

        def forward(views, index):
            return model.loss(*encoder(views.flatten(0, 1)).chunk(2), index)
    elif kind == "fully sharded":
        forward = fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        if "log_scale" in dict(model.loss.named_parameters()):  # from a checkpoint where it has shape ()
            with torch.no_grad():
                whole.loss.log_scale.mul_(0.5)
            state = whole.state_dict()
            state["loss.log_scale"] = state["loss.log_scale"].view(())
            set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        forward = DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(some.parameters(), lr=0.1) for some in (whole, model)]
    worst = {"gradient": 0.0, "state": 0.0}
    for views, items, own in batches(rank, size):
        whole(views, items).backward()
        forward(views[:, own], items[own]).backward()
        gradients = [torch.cat([whole_of(p.grad).flatten() for p in some.parameters()]) for some in (model, whole)]
        worst["gradient"] = max(worst["gradient"], relative(*gradients))
        worst["state"] = max(worst["state"], state_error(model.loss, whole.loss)[0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return worst


def keep_to_oneself(rank, size, name):
    """What of a loss with gather="none", inside the wrapped model, is other than the loss alone would have kept."""
    model = Model(make(name, {}))
    alone, wrapped = copy.deepcopy(model.loss), DistributedDataParallel(model)
    changed = set()
    for views, items, own in batches(rank, size):
        wrapped(views[:, own], items[own]).backward()
        alone(*(z.detach() for z in model.seen), items[own])
        changed |= set(state_error(model.loss, alone)[1])
    return sorted(changed)


class Opaque(torch.Tensor):
    """A tensor whose values are not looked at, as on a GPU."""


def forget(rank, size, name):
    """What a batch that is not finite on the last rank alone has changed on this one."""
    loss, options, gather = LOSSES[name]
    loss = make(loss, options, gather=gather, **({"sharded": True} if name.endswith("sharded") else {}))
    (views, items, own), (others, other_items, other_own) = batches(rank, size)

    def call(views, items):
        z = torch.cat([views, views], 2).as_subclass(Opaque)
        return loss(z[0], z[1], items)

    call(views[:, own], items[own])
    before, bad = snapshot(loss), others[:, other_own].clone()
    if rank == size - 1:
        bad[1, 0, 0] = torch.nan
    call(bad, other_items[other_own])
    return differences(before, snapshot(loss))


def checks(rank, size):
    trained = {case: partial(train, rank, size, *case.split(": ")) for case in WRAPPED + SHARDED}
    trained |= {f"not finite: {name}": partial(forget, rank, size, name) for name in KEEPING}
    return trained | {f"local: {name}": partial(keep_to_oneself, rank, size, name) for name in LOCAL}
