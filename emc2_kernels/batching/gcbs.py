"""Global contrastive batch sampling: batches of items that the present encoder finds alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from .. import checks
from ..agreement import Call, header_device
from ..distributed import meet
from .graph import MAX_PER_ROW, SCOPES, GraphFacts, similarity_graph
from .order import consecutive_order


class GlobalContrastiveBatchSampler(Sampler[list[int]]):
    """Batches of consecutive items in an order that keeps alike items together, so that a batch has the hard negatives
    of the whole data set in it (GCBS, arXiv 2210.12874). A ``batch_sampler`` for ``torch.utils.data.DataLoader``.

    Embed the data set and ``update`` between epochs; before the first update this is a plain shuffled sampler. In each
    epoch the order is cut from another place on, batches come in shuffled order and are shuffled within, all named by
    (seed, epoch). Cutting closes the order to a ring: one batch joins its ends. Every item comes once an epoch, except:

    - ``drop_last=True`` leaves out the num_items % (batch_size * world_size) items that fill no batch of all ranks,
      other ones in each epoch;
    - ``drop_last=False`` makes a last, smaller batch, of the same size on all ranks, and repeats fewer than world_size
      items in it where the numbers do not go up.

    Batches of all ranks together are one run of the order, cut over the ranks, so that a rank's own batch is a run too.
    Without ``set_epoch`` the epoch counts itself at the end of each whole pass.

    Not for ``EMC2Loss(proposals="batch")``, whose chains need batches that are uniform draws: see ``check_loss``.

    Args:
        num_items: of the data set, at least 1.
        batch_size: of a rank.
        quantile, scope, max_per_row, normalize, progress: of the similarity graph, see ``similarity_graph``.
        drop_last: see above. With it, a data set that fills no batch is an error.
        seed: the same on all ranks.
        rank, world_size: both, or neither: those of ``torch.distributed``'s default group, or 0 and 1.

    Attributes:
        epoch: the one that comes, or is under way.
        facts: GraphFacts of the last update; None before it.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        quantile: float = 0.999,
        scope: str = "global",
        drop_last: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        max_per_row: int = MAX_PER_ROW,
        normalize: bool = True,
        progress: bool | None = None,
    ) -> None:
        self.num_items = checks.at_least("num_items", num_items, 1)
        self.batch_size = checks.at_least("batch_size", batch_size, 1)
        checks.number_in("quantile", quantile, 0, 1, open_high=True)
        checks.one_of("scope", scope, SCOPES)
        checks.boolean("drop_last", drop_last)
        checks.boolean("normalize", normalize)
        if progress is not None:
            checks.boolean("progress", progress)
        self.drop_last = drop_last
        self.seed = checks.counter("seed", checks.integer("seed", seed), 64, torch.device("cpu"))
        checks.at_least("max_per_row", max_per_row, 1)
        self._graph_options = {
            "quantile": quantile,
            "scope": scope,
            "max_per_row": max_per_row,
            "normalize": normalize,
            "progress": progress,
        }
        self.rank, self.world_size = _place(rank, world_size)
        if drop_last and num_items < self._run:
            least = f"batch_size * world_size = {self._run} with drop_last=True, or there is no batch"
            raise ValueError(f"num_items must be at least {least}, got {num_items}")
        self.epoch = 0
        self.facts: GraphFacts | None = None
        self._order: np.ndarray | None = None  # of the epoch under way, or the next
        self._next_order: np.ndarray | None = None  # came while an epoch was under way
        self._taken = 0  # batches of the epoch under way
        self._resume_at = 0
        # The last epoch that was taken whole, and its order: a DataLoader does so some steps before it is trained on.
        self._ended: tuple[int, np.ndarray | None] | None = None

    @property
    def _run(self) -> int:
        """Items of a batch of all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on all ranks; an epoch that is resumed yields what is left of them."""
        whole, rest = divmod(self.num_items, self._run)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        first, self._resume_at = self._resume_at, 0
        if first == 0:
            self._adopt()
        epoch, self._taken = self.epoch, first
        for batch in self._batches(epoch)[first:]:
            self._taken += 1  # before it is trained on: a state saved then counts it
            yield batch.tolist()
        self.epoch, self._taken, self._ended = epoch + 1, 0, (epoch, self._order)
        self._adopt()

    def _adopt(self) -> None:
        if self._next_order is not None:
            self._order, self._next_order = self._next_order, None

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """Of this rank, in the order in which they come."""
        draws, order, runs = self._runs(epoch)
        batches = list(runs[:, self.rank])
        rest = len(order) - runs.size
        if rest and not self.drop_last:
            size = -(-rest // self.world_size)
            # What is missing is taken from the items before: neighbours, and none of them twice in the run.
            places = np.arange(size) + self.num_items + size * (self.rank - self.world_size)
            batches.append(draws.permutation(order.take(places, mode="wrap")))
        return batches

    def _runs(self, epoch: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
        """The epoch's draws, its (num_items,) order, and the (runs, world_size, batch_size) whole runs of that order as
        they come. What is left of the order fills no run."""
        draws = np.random.default_rng([self.seed, epoch])
        order = draws.permutation(self.num_items) if self._order is None else self._order
        order = np.roll(order, -int(draws.integers(self.num_items)))
        whole = self.num_items // self._run
        runs = order[: whole * self._run].reshape(whole, self.world_size, self.batch_size)
        # Cut over ranks before shuffling within: a rank's share of a run is the run's consecutive items.
        return draws, order, draws.permuted(runs[draws.permutation(whole)], axis=2)

    def update(self, x: Tensor | None, y: Tensor | None = None) -> None:
        """Orders the items anew; an epoch under way ends as it began, and the next has the new order.

        In a process group all ranks call it, the first rank computes, from its embeddings, and the others get what it
        found: were each to compute its own, rounding could make the orders differ, and items be lost or come twice.
        They wait for it no longer than the group's timeout. Ranks whose samplers are not of one kind are told so.

        Args:
            x: (num_items, d) embeddings in the order of the data set, on any device. Not read on other ranks than the
                first, where it may be None. y: of the other tower; None: x.

        Raises:
            ValueError, TypeError: as ``similarity_graph``, on all ranks, or num_items, batch_size, world_size,
                drop_last or seed differs between ranks; the order is as it was.
            ImportError: SciPy is missing.
        """
        order, self.facts = self._from_first_rank(x, y) if self._grouped() else self._new_order(x, y)
        if self._taken or self._resume_at:
            self._next_order = order
        else:
            self._order = order

    def _new_order(self, x: Tensor | None, y: Tensor | None) -> tuple[np.ndarray, GraphFacts]:
        checks.matrix("x", x)
        if x.shape[0] != self.num_items:
            raise ValueError(f"x must have num_items = {self.num_items} rows, got {checks.describe(x)}")
        graph = similarity_graph(x, y, seed=self.seed, **self._graph_options)
        return consecutive_order(graph.matrix, seed=self.seed), graph.facts

    def _grouped(self) -> bool:
        return self.world_size > 1 and dist.is_available() and dist.is_initialized()

    def _from_first_rank(self, x: Tensor | None, y: Tensor | None) -> tuple[np.ndarray, GraphFacts]:
        names = ("num_items", "batch_size", "world_size", "drop_last", "seed")
        call = Call.of(f"{type(self).__name__}'s update", {name: getattr(self, name) for name in names})
        meet(call, header_device(None, None), None)
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                box = [self._new_order(x, y)]
            except Exception as error:  # the others wait for it
                box = [error]
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that comes. The one that a loaded state is in the middle of goes on from there."""
        number = checks.at_least("epoch", epoch, 0)
        if number != self.epoch:
            self.epoch, self._taken, self._resume_at, self._ended = number, 0, 0, None

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """Where the sampler stands: a loaded one yields the batches that are left of the epoch, then the same epochs.

        Args:
            batches_done: of this epoch, that were trained on. None: all that were taken; a DataLoader with workers
                takes them ahead of time, so there count them yourself. Where it has taken the epoch's last one, any
                number but 0 is still of that epoch, till the next begins.
        """
        taken = self._taken or self._resume_at
        done = taken if batches_done is None else checks.at_least("batches_done", batches_done, 0)
        if done > len(self):
            raise ValueError(f"batches_done must be at most {len(self)}, the batches of an epoch, got {done}")
        epoch, order, next_order = self.epoch, self._order, self._next_order
        if batches_done and not taken and self._ended is not None:
            (epoch, order), next_order = self._ended, self._order
        orders = {"order": order, "next_order": next_order}
        return {
            **self._same(),
            "epoch": epoch,
            "batches_done": done,
            **{name: None if order is None else torch.from_numpy(order.copy()) for name, order in orders.items()},
            "facts": None if self.facts is None else self.facts._asdict(),
        }

    def _same(self) -> dict[str, Any]:
        """What a sampler must have in common with the one whose state it takes."""
        return {"num_items": self.num_items, "run": self._run, "drop_last": self.drop_last, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError or TypeError for the state of a sampler with other settings, or none; this one is then as
        it was. The batches of all ranks together must be of one size; over how many ranks it is cut may change."""
        loaded = _checked_state(state, self._same(), len(self))
        self.epoch, self._resume_at, self._taken, self._ended = loaded["epoch"], loaded["batches_done"], 0, None
        self._order, self._next_order, self.facts = loaded["order"], loaded["next_order"], loaded["facts"]


def _checked_state(state: Any, same: dict[str, Any], most_batches: int) -> dict[str, Any]:
    needed = {*same, "epoch", "batches_done", "order", "next_order", "facts"}
    if not (isinstance(state, dict) and set(state) == needed):
        got = sorted(map(str, state)) if isinstance(state, dict) else checks.describe(state)
        raise ValueError(f"state must be a dict of {sorted(needed)}, got {got}")
    for name, value in same.items():
        if state[name] != value:
            what = "batch_size * world_size" if name == "run" else name
            raise ValueError(f"state must be of a sampler with {what} = {value}, got {state[name]!r}")
    epoch = checks.at_least("state['epoch']", state["epoch"], 0)
    done = checks.at_least("state['batches_done']", state["batches_done"], 0)
    if done > most_batches:
        raise ValueError(f"state['batches_done'] must be at most {most_batches}, got {done}")
    orders = {name: _permutation(name, state[name], same["num_items"]) for name in ("order", "next_order")}
    return {"epoch": epoch, "batches_done": done, **orders, "facts": _facts(state["facts"])}


def _facts(value: Any) -> GraphFacts | None:
    if value is None:
        return None
    if not (isinstance(value, dict) and set(value) == set(GraphFacts._fields)):
        raise ValueError(f"state['facts'] must be None or a dict of {list(GraphFacts._fields)}, got {value!r}")
    return GraphFacts(**value)


def _permutation(name: str, value: Any, num_items: int) -> np.ndarray | None:
    if value is None:
        return None
    checks.tensor(f"state[{name!r}]", value)
    checks.vector(f"state[{name!r}]", value, num_items, torch.int64, value.device)  # any: torch.load has map_location
    order = value.cpu().numpy().copy()
    if not np.array_equal(np.sort(order), np.arange(num_items)):
        expected = f"every item from 0 to {num_items - 1} once"
        raise ValueError(f"state[{name!r}] must have {expected}, got {order[:8].tolist()} ...")
    return order


def _place(rank: Any, world_size: Any) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given both or neither, got {rank!r} and {world_size!r}")
    if rank is None:
        grouped = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    # As Python's integers, which a state that holds them can be loaded with weights_only=True.
    rank, world_size = checks.at_least("rank", rank, 0), checks.at_least("world_size", world_size, 1)
    if rank >= world_size:
        raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
    return rank, world_size
