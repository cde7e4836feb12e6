"""Run by every rank (see ranks.py): what must be refused, by all ranks alike, and what must stay on its own rank."""

import re
from functools import partial

import torch
import torch.distributed as dist
from helpers import assert_unchanged, normal, snapshot
from rank_wrapped import make

DIM, B = 16, 3
COLLECTIVES = re.findall(
    r"\w+",
    """all_gather all_gather_into_tensor all_gather_single all_gather_object all_reduce all_to_all all_to_all_single
    barrier batch_isend_irecv broadcast gather irecv isend recv reduce reduce_scatter reduce_scatter_tensor scatter
    send""",
)
GATHERING = ["ntxent all", "clip ring", "emc2 all", "emc2 ring", "isir all", "isir ring", "isogclr all", "cached all"]


def call(loss, rank, *, dim=DIM, dtype=torch.float32, index=True, scale=1.0, **options):
    z0, z1 = ((normal(10 * rank + view, B, dim) * scale).to(dtype) for view in (0, 1))
    return loss(z0, z1, torch.arange(B) + B * rank if index else None, **options)


def refused(loss, rank, **options):
    """[error's class, its message] of a call that changes nothing; after it, a right one must find all ranks ready."""
    before = snapshot(loss)
    try:
        call(loss, rank, **options)
        error = None
    except Exception as raised:
        error = [type(raised).__name__, str(raised)]
    assert_unchanged(loss, before)
    loss.train()
    assert call(loss, rank).isfinite()
    return error


def prepared(case, rank, **options):
    name, gather = case.split()
    if name == "ntxent":
        options["learn_temperature"] = True
    loss = make(name, options, gather=gather)
    call(loss, rank)
    return loss


def disagreement(what, case, rank, last):
    """The last rank's call has another form than the others'."""
    loss = prepared(case, rank)
    if what == "training":
        return refused(loss.train(not last), rank)
    if what == "log_scale":
        with torch.no_grad():
            loss.log_scale += 0.1 * last
        try:
            return refused(loss, rank)
        except ValueError as error:  # and again at the next call
            return [type(error).__name__, str(error)]
    if what == "step":
        other = make(case.split()[0], {}, gather="none")
        call(other, rank)
        if last:
            call(other, rank)
        loss.load_state_dict(other.state_dict())
        before = snapshot(loss)
        try:
            call(loss, rank)
        except ValueError as error:
            assert_unchanged(loss, before)
            return [type(error).__name__, str(error)]
    forms = {
        "dim": {"dim": 8},
        "dtype": {"dtype": torch.float64},
        "index": {"index": False},
        "return_stats": {"return_stats": True},
    }
    return refused(loss, rank, **(forms[what] if last else {}))


# What differs, the losses where it is tried, and what the error begins with.
DISAGREEMENTS = {
    "dim": (["ntxent all", "clip ring", "isogclr all"], r"z0\.shape\[1\]"),
    "dtype": (GATHERING, r"z0\.dtype"),
    "index": (["ntxent all", "clip ring"], "index is None"),
    "training": (GATHERING, "training"),
    "return_stats": (["ntxent ring", "isir ring"], "return_stats"),
    "log_scale": (["ntxent all"], "log_scale"),
    "step": (["emc2 all", "emc2 ring", "isir all", "isir ring", "isogclr all", "cached all"], "step"),
}
SILENT = ["ntxent", "emc2", "isir", "isogclr", "cached"]
TWICE = {"ntxent all": "gathering", "clip ring": "ring", "emc2 ring": "ring", "isir ring": "isir"}
DISAGREE = [f"{what}: {case}" for what, (cases, _) in DISAGREEMENTS.items() for case in cases]


def bad_everywhere(case, rank):
    """Errors that every rank finds by itself: a NaN, and similarities that overflow after ranks have exchanged them."""
    errors = [refused(prepared(case, rank), rank, scale=torch.nan)]
    return [*errors, refused(prepared(case, rank, normalize=False), rank, scale=1e25)]


def not_a_member(rank, size):
    group = dist.new_group([size - 1])
    loss = make("ntxent", {}, gather="all", process_group=group)
    try:
        return ["", call(loss, rank).item()]
    except RuntimeError as error:
        return [type(error).__name__, str(error)]


class Communicated(Exception):
    pass


def silent(case, rank):
    """Values of three steps and what was kept, while every collective is an error."""

    def refuse(*_, **__):
        raise Communicated

    kept = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    try:
        for name in kept:
            setattr(dist, name, refuse)
        return local(case, rank)
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def local(case, rank):
    loss = make(case, {}, gather="none")
    values = [call(loss, rank + step, return_stats=True)[0].item() for step in range(3)]
    sums = {name: torch.where(x.isfinite(), x, 0).double().sum().item() for name, x in loss.state_dict().items()}
    return [values, sums]


def twice(case, rank):
    """The error of a gradient's gradient; of both ways to ask for one, where they differ."""
    name, gather = case.split()
    loss = make(name, {}, gather=gather)
    z = normal(rank, B, DIM).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, z * 2, torch.arange(B)), z, create_graph=True)
    said = {_refusal(lambda: torch.autograd.grad(gradient.sum(), z, retain_graph=True))}
    said.add(_refusal(lambda: gradient.sum().backward()))
    return "; ".join(sorted(map(str, said)))


def _refusal(call):
    try:
        call()
    except NotImplementedError as error:
        return str(error)


def checks(rank, size):
    found = {}
    for case in DISAGREE if size > 1 else ():
        what, loss = case.split(": ")
        found[f"disagree on {case}"] = partial(disagreement, what, loss, rank, rank == size - 1)
    found |= {f"bad everywhere: {case}": partial(bad_everywhere, case, rank) for case in GATHERING}
    found |= {f"silent: {case}": partial(silent, case, rank) for case in SILENT}
    found |= {f"twice: {case}": partial(twice, case, rank) for case in TWICE}
    return found | {"not a member": partial(not_a_member, rank, size)}
