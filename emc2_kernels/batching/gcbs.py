"""Global contrastive batch sampling: batches of items that the present encoder finds alike."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from .. import checks
from ..distributed.agreement import Call, header_device
from ..distributed.shards import meet
from .graph import MAX_PER_ROW, SCOPES, GraphFacts, consecutive_order, similarity_graph


@dataclass
class _Pass:
    """Over the batches of one epoch."""

    epoch: int
    order: np.ndarray | None  # None: a plain shuffle
    taken: int = 0  # steps, of which each is a batch on each rank


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

    Every pass is another epoch, also where the one before was given up half-way; ``set_epoch`` names its number, and a
    loaded state's place is gone on with. So ranks have the same epoch while they begin the same passes: one that looks
    at a batch by itself needs ``set_epoch`` before the next pass.

    Not for ``EMC2Loss(proposals="batch")``, whose chains need batches that are uniform draws: see ``check_loss``.

    Args:
        num_items: of the data set, at least 1.
        batch_size: of a rank.
        quantile: share of the similarities that are no entries of the graph; see ``similarity_graph``.
        scope: "global" or "row"; see ``similarity_graph``.
        drop_last: see above. With it, a data set that fills no batch is an error.
        seed: the same on all ranks.
        rank: given with ``world_size``; None for both: those of ``torch.distributed``'s default group, or 0 and 1.
            "all", with or without a world_size, is for a framework that deals batches out to processes by itself, as
            accelerate does with a loader that it prepares: batches of all ranks, rank by rank, and as a last run what
            is left in batches of at most batch_size, no item twice.
        world_size: number of ranks; see ``rank``.
        max_per_row: entries of a row that are kept at most; see ``similarity_graph``.
        normalize: cosine similarities.
        progress: whether a bar is shown; None: above 50,000 items.

    Attributes:
        facts: ``GraphFacts`` of the last update; None before it.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came; where iteration begins, too, if
            accelerate deals out again what was cut over ranks, or if the default of ``rank`` was that of a process
            without a group and there is one now.
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
        rank: int | str | None = None,
        world_size: int | None = None,
        max_per_row: int = MAX_PER_ROW,
        normalize: bool = True,
        progress: bool | None = None,
    ) -> None:
        if isinstance(num_items, Sampler):  # Lightning builds batch samplers anew, around a sampler of its own
            expected = "an integer; of Lightning's Trainer or setup_dataloaders, use_distributed_sampler must be False"
            raise TypeError(f"num_items must be {expected}, got {type(num_items).__name__}")
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
        self._before_group = world_size is None and not _in_a_group()
        if drop_last and num_items < self._run:
            least = f"batch_size * world_size = {self._run} with drop_last=True, or there is no batch"
            raise ValueError(f"num_items must be at least {least}, got {num_items}")
        self.facts: GraphFacts | None = None
        self._order: np.ndarray | None = None  # of epochs that begin from now on
        self._next_epoch = 0  # the number of the first of them
        self._loaded: _Pass | None = None  # to go on with
        # The last one that was begun: a DataLoader may have taken it whole some steps before it is trained on.
        self._latest: _Pass | None = None

    @property
    def epoch(self) -> int:
        """The one that is under way, or else that comes."""
        place = self._loaded or self._latest
        return self._next_epoch if place is None or place.taken == self._steps else place.epoch

    @property
    def _run(self) -> int:
        """Items of a batch of all ranks."""
        return self.batch_size * self.world_size

    @property
    def _steps(self) -> int:
        """Of a whole epoch."""
        whole, rest = divmod(self.num_items, self._run)
        return whole + (rest > 0 and not self.drop_last)

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on all ranks; an epoch that is resumed yields what is left of them."""
        if self.rank != "all":
            return self._steps
        return self._steps * self.world_size if self.drop_last else -(-self.num_items // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        self._check_group()
        if self.rank != "all" and self.world_size > 1 and _dealt_by_accelerate():
            expected = "'all' in a loader that accelerate has prepared, as it deals batches out by itself"
            raise ValueError(f"rank must be {expected}, got {self.rank}, and world_size {self.world_size}")
        return self._pass()

    def _pass(self) -> Iterator[list[int]]:
        """Begins with its first batch: to make an iterator costs no epoch."""
        place = self._begin()
        dealt = self.world_size if self.rank == "all" else 1
        first = place.taken * dealt
        for number, batch in enumerate(self._batches(place)[first:], first + 1):
            place.taken = -(-number // dealt)  # before it is trained on: a state saved then counts it
            yield batch.tolist()

    def _begin(self) -> _Pass:
        place, before = self._loaded or _Pass(self._next_epoch, self._order), self._latest
        if before is not None and before.epoch == place.epoch:  # set_epoch has named it again
            what = f"epoch {place.epoch} begins again, after {before.taken} of its {self._steps} batches"
            how = "set_epoch with another number is another shuffle (with accelerate, of the prepared loader)"
            warnings.warn(f"GlobalContrastiveBatchSampler: {what}; {how}", stacklevel=3)
        self._loaded, self._latest, self._next_epoch = None, place, place.epoch + 1
        return place

    def _check_group(self) -> None:
        if self._before_group and _in_a_group() and dist.get_world_size() > 1:
            expected = "given where the sampler is built before the process group (or build it after)"
            raise ValueError(f"rank and world_size must be {expected}, got None, in a group of {dist.get_world_size()}")

    def _batches(self, place: _Pass) -> list[np.ndarray]:
        """Of this rank, or of all, in the order in which they come."""
        draws, order, runs = self._runs(place)
        rest = len(order) - runs.size
        if self.rank == "all":
            batches, starts = list(runs.reshape(-1, self.batch_size)), range(runs.size, len(order), self.batch_size)
            last = [order[start : start + self.batch_size] for start in starts]
        else:
            batches, size = list(runs[:, self.rank]), -(-rest // self.world_size)
            # What is missing is taken from the items before: neighbours, and none of them twice in the run.
            places = np.arange(size) + self.num_items + size * (self.rank - self.world_size)
            last = [order.take(places, mode="wrap")] * (rest > 0)
        return batches if self.drop_last else batches + [draws.permutation(items) for items in last]

    def _runs(self, place: _Pass) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
        """The epoch's draws, its (num_items,) order, and the (runs, world_size, batch_size) whole runs of that order as
        they come. What is left of the order fills no run."""
        draws = np.random.default_rng([self.seed, place.epoch])
        order = draws.permutation(self.num_items) if place.order is None else place.order
        order = np.roll(order, -int(draws.integers(self.num_items)))
        whole = self.num_items // self._run
        runs = order[: whole * self._run].reshape(whole, self.world_size, self.batch_size)
        # Cut over ranks before shuffling within: a rank's share of a run is the run's consecutive items.
        return draws, order, draws.permuted(runs[draws.permutation(whole)], axis=2)

    def update(self, x: Tensor | None, y: Tensor | None = None) -> None:
        """Orders the items anew; an epoch under way ends as it began, and the next has the new order.

        In a process group all ranks call it, the first rank computes, from its embeddings, and the others get what it
        found: were each to compute its own, rounding could make the orders differ, and items be lost or come twice.
        They wait for it no longer than the group's timeout. Ranks whose samplers are not of one kind, or that have
        begun other passes and would lose items, are told so.

        Args:
            x: (num_items, d) embeddings in the order of the data set, on any device. Not read on other ranks than the
                first, where it may be None.
            y: of the other tower; None: x.

        Raises:
            ValueError, TypeError: as ``similarity_graph``, on all ranks, or num_items, batch_size, world_size,
                drop_last, seed or the epoch that comes differs between ranks; the order is as it was.
            ImportError: SciPy is missing.
        """
        self._check_group()
        self._order, self.facts = self._from_first_rank(x, y) if self._grouped() else self._new_order(x, y)
        if self._loaded is not None and not self._loaded.taken:
            self._loaded.order = self._order

    def _new_order(self, x: Tensor | None, y: Tensor | None) -> tuple[np.ndarray, GraphFacts]:
        checks.matrix("x", x)
        if x.shape[0] != self.num_items:
            raise ValueError(f"x must have num_items = {self.num_items} rows, got {checks.describe(x)}")
        graph = similarity_graph(x, y, seed=self.seed, **self._graph_options)
        return consecutive_order(graph.matrix, seed=self.seed), graph.facts

    def _grouped(self) -> bool:
        return self.world_size > 1 and _in_a_group()

    def _from_first_rank(self, x: Tensor | None, y: Tensor | None) -> tuple[np.ndarray, GraphFacts]:
        names = ("num_items", "batch_size", "world_size", "drop_last", "seed")
        form = {name: getattr(self, name) for name in names}
        # The same however far each rank has taken batches ahead.
        form["the epoch that comes (by the same passes, or by set_epoch before update)"] = self._next_epoch
        meet(Call.of(f"{type(self).__name__}'s update", form), header_device(None, None), None)
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
        """The number of the epoch that comes. The one that a loaded state is in the middle of goes on from there.

        Args:
            epoch: at least 0.

        Warns:
            UserWarning: where another number drops a loaded place. accelerate's loaders call this in each pass, with a
                count of their own that begins at 0: after loading, call ``loader.set_epoch(sampler.epoch)``.
        """
        number = checks.at_least("epoch", epoch, 0)
        place = self._loaded
        if place is not None and place.epoch == number:
            return
        if place is not None and (place.taken or number < place.epoch):
            what = f"the loaded place, batch {place.taken} of epoch {place.epoch}, for the start of epoch {number}"
            how = "set_epoch of the loaded state's epoch goes on with it (accelerate: loader.set_epoch(sampler.epoch))"
            warnings.warn(f"GlobalContrastiveBatchSampler.set_epoch drops {what}; {how}", stacklevel=2)
        if number != self.epoch:
            self._loaded = self._latest = None
        self._next_epoch = number

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """Where the sampler stands: a loaded one yields the batches that are left of the epoch, then the same epochs.
        After the last of an epoch, it begins the next.

        Args:
            batches_done: of this epoch, that a rank has trained on. None: all that were taken; a DataLoader with
                workers takes them ahead of time, so there count them yourself. Where it has taken the epoch's last one,
                any number but 0 is still of that epoch, till the next begins.
        """
        place = self._loaded or self._latest
        if place is None or (place.taken == self._steps and not batches_done):
            place = _Pass(self._next_epoch, self._order)
        done = place.taken if batches_done is None else checks.at_least("batches_done", batches_done, 0)
        if done > self._steps:
            raise ValueError(f"batches_done must be at most {self._steps}, the batches of an epoch, got {done}")
        orders = {"order": place.order, "next_order": None if place.order is self._order else self._order}
        return {
            **self._same(),
            "epoch": place.epoch,
            "batches_done": done,
            **{name: None if order is None else torch.from_numpy(order.copy()) for name, order in orders.items()},
            "facts": None if self.facts is None else self.facts._asdict(),
        }

    def _same(self) -> dict[str, Any]:
        """What a sampler must have in common with the one whose state it takes."""
        return {"num_items": self.num_items, "run": self._run, "drop_last": self.drop_last, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the sampler stood that ``state_dict`` was asked of.

        The batches of all ranks together must be of one size; over how many ranks it is cut may change.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError, TypeError: it is that of a sampler with other settings, or none; this one is as it was.
        """
        loaded = _checked_state(state, self._same(), self._steps)
        epoch, done, order, self.facts = (loaded[name] for name in ("epoch", "batches_done", "order", "facts"))
        self._order = order if loaded["next_order"] is None else loaded["next_order"]
        if done == self._steps:
            epoch, done, order = epoch + 1, 0, self._order
        self._loaded, self._latest, self._next_epoch = _Pass(epoch, order, done), None, epoch


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


def _in_a_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _dealt_by_accelerate() -> bool:
    """Whether an object of accelerate's that gives each process a part of the batches is asking for them. Only the call
    stack tells: of frames, the code's names, as a look at ``f_locals`` would keep the callers' variables alive."""
    frame = inspect.currentframe()
    while frame is not None:
        owner, module = frame.f_code.co_qualname.partition(".")[0], frame.f_globals.get("__name__")
        if module == "accelerate.data_loader" and owner in ("BatchSamplerShard", "DataLoaderDispatcher"):
            return True
        frame = frame.f_back
    return False


def _place(rank: Any, world_size: Any) -> tuple[int | str, int]:
    if rank == "all" and world_size is not None:
        return rank, checks.at_least("world_size", world_size, 1)
    if rank != "all" and (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given both or neither, got {rank!r} and {world_size!r}")
    if world_size is None:
        here, count = (dist.get_rank(), dist.get_world_size()) if _in_a_group() else (0, 1)
        return here if rank is None else rank, count
    # As Python's integers, which a state that holds them can be loaded with weights_only=True.
    rank, world_size = checks.at_least("rank", rank, 0), checks.at_least("world_size", world_size, 1)
    if rank >= world_size:
        raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
    return rank, world_size
