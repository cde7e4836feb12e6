"""GCBS for the trainer of sentence-transformers: its batch sampler, and the callback that orders the data set anew."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from .gcbs import GlobalContrastiveBatchSampler
from .graph import MAX_PER_ROW, GraphFacts, extra

accelerate = extra("accelerate", "sentences")
base_sampler = extra("sentence_transformers.base.sampler", "sentences")
trainer_callback = extra("transformers.trainer_callback", "sentences")

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
    from transformers import TrainerControl, TrainerState


class GCBSBatchSampler(base_sampler.DefaultBatchSampler):
    """``GlobalContrastiveBatchSampler`` as the ``batch_sampler`` of ``SentenceTransformerTrainingArguments``: pass the
    class, or ``functools.partial`` of it with options. It is a plain shuffled sampler until it is updated, which
    ``GCBSCallback`` does: give it to the same trainer.

    Every item comes once an epoch, in ``ceil(N / batch_size)`` batches. Batches of all processes together are one run
    of the order, as accelerate deals them: ``world_size`` consecutive batches, one to each process. ``drop_last=True``,
    which the trainer sets where there are several processes, leaves out what fills no batch of all of them.

    The trainer takes its evaluation data from such a sampler too: shuffled, as nothing updates it.

    Data sets of a ``DatasetDict`` have a sampler and an order each. There the trainer mixes the batches of different
    ones, so that with several processes only each process's own batch is a run.

    Args:
        dataset: what the trainer passes, as are the next five.
        batch_size: of a process.
        drop_last: leave out what fills no batch of all processes.
        valid_label_columns: columns that are labels and no text.
        generator: not used; batches are named by (seed, epoch).
        seed: of the shuffles.
        quantile: share of the similarities that are no entries of the graph; see ``similarity_graph``.
        scope: "global" or "row"; see ``similarity_graph``.
        max_per_row: entries of a row that are kept at most; see ``similarity_graph``.
        normalize: cosine similarities.
        progress: whether a bar is shown; None: above 50,000 items.
        world_size: processes that batches are dealt to. None: all of accelerate's; tensor parallelism has fewer.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        quantile: float = 0.999,
        scope: str = "global",
        max_per_row: int = MAX_PER_ROW,
        normalize: bool = True,
        progress: bool | None = None,
        world_size: int | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset must have a length, got {type(dataset).__name__}")
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.dataset = dataset
        self._inner = GlobalContrastiveBatchSampler(
            len(dataset),
            batch_size,
            quantile=quantile,
            scope=scope,
            drop_last=drop_last,
            seed=seed,
            rank="all",
            world_size=accelerate.PartialState().num_processes if world_size is None else world_size,
            max_per_row=max_per_row,
            normalize=normalize,
            progress=progress,
        )

    @property
    def world_size(self) -> int:
        return self._inner.world_size

    @property
    def facts(self) -> GraphFacts | None:
        """Of the last update; None before it."""
        return self._inner.facts

    @property
    def text_columns(self) -> list[str]:
        """Of the data set, those that are no label."""
        no_text = {"dataset_name", *(self.valid_label_columns or ())}
        first = self.dataset[0]
        return [name for name in self.dataset.column_names if name not in no_text and isinstance(first[name], str)]

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._inner)

    def set_epoch(self, epoch: int) -> None:
        self._inner.set_epoch(epoch)
        super().set_epoch(epoch)

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Orders the items anew; see ``GlobalContrastiveBatchSampler.update``.

        Args:
            x: (N, d) embeddings, in the order of the data set.
            y: of the other column; None: x.
        """
        self._inner.update(x, y)

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """Where the sampler stands; see ``GlobalContrastiveBatchSampler.state_dict``.

        Args:
            batches_done: of this epoch, that a process has trained on; None: all that were taken.
        """
        return self._inner.state_dict(batches_done)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)
        super().set_epoch(self._inner.epoch)


class GCBSCallback(trainer_callback.TrainerCallback, trainer_callback.ExportableState):
    """Embeds the training data at the beginning of epochs, and has the trainer's ``GCBSBatchSampler`` order it anew.

    Two text columns of the data set are embedded, anchors and positives, by ``model.encode``, with the prompts and
    routes of the training arguments; where there is one, items are compared by it alone. Processes share the work. The
    trainer's checkpoints have the order in their ``trainer_state.json`` (5.3 bytes an item): a run that goes on in the
    middle of an epoch sees the batches that were left of it.

    Args:
        columns: one or two. None: the first two text columns that are no label.
        every: epochs from one update to the next.
        before_first: whether the first epoch has an update: right for an encoder that has learned something, such as
            one that is fine-tuned. Otherwise its batches are a plain shuffle, and the second epoch has the first.
        batch_size: texts that are embedded at a time, on each process.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came; when training begins, where the
            trainer's batches are not a ``GCBSBatchSampler``'s, or are dealt to more or fewer processes than it knows.
    """

    def __init__(
        self,
        columns: Sequence[str] | None = None,
        *,
        every: int = 1,
        before_first: bool = False,
        batch_size: int = 32,
    ) -> None:
        if columns is not None and (isinstance(columns, str) or len(columns) not in (1, 2)):
            raise ValueError(f"columns must be one or two names in a list, or None, got {columns!r}")
        checks.boolean("before_first", before_first)
        self.columns = None if columns is None else list(columns)
        self.every = checks.at_least("every", every, 1)
        self.before_first = before_first
        self.batch_size = checks.at_least("batch_size", batch_size, 1)
        self._samplers: list[GCBSBatchSampler] = []
        self._epoch = 0  # that comes
        self.updated: int | None = None  # the epoch that the present order was made for

    @property
    def _first(self) -> int:
        return 0 if self.before_first else 1

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``: how this was built, and its samplers' orders."""
        options = ("columns", "every", "before_first", "batch_size")
        states = [_as_json(sampler.state_dict(batches_done=0)) for sampler in self._samplers]
        return {
            "args": {name: getattr(self, name) for name in options},
            "attributes": {"updated": self.updated, "saved": states},
        }

    def on_train_begin(
        self,
        args: SentenceTransformerTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._samplers = _samplers(train_dataloader)
        # As the trainer counts epochs: state.epoch is a fraction, and behind where an epoch was stopped early.
        self._epoch = state.global_step // max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        self.updated = None
        name = type(self).__name__
        if state.global_step and name in state.stateful_callbacks:
            self._restore(state.stateful_callbacks[name]["attributes"])
        # A checkpoint of a run without this callback lacks the entry, and the trainer cannot save again without it.
        state.stateful_callbacks[name] = self.state()
        if state.num_train_epochs <= self._first:
            expected = "before_first=True, or batches are a plain shuffle throughout"
            warnings.warn(f"GCBSCallback: training for one epoch needs {expected}", stacklevel=2)

    def _restore(self, attributes: dict[str, Any]) -> None:
        saved = attributes["saved"]
        if len(saved) != len(self._samplers):
            expected = f"{len(self._samplers)} data sets, as there are"
            raise ValueError(f"the checkpoint must have the order of {expected}, got {len(saved)}")
        for sampler, one in zip(self._samplers, saved, strict=True):
            # The epoch as the trainer counts, which it then sets: another one would drop what is loaded here.
            sampler.load_state_dict(_from_json(one) | {"epoch": self._epoch})
        self.updated = attributes["updated"]

    def on_epoch_begin(
        self,
        args: SentenceTransformerTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: SentenceTransformer | None = None,
        **kwargs: Any,
    ) -> None:
        epoch, self._epoch = self._epoch, self._epoch + 1
        for sampler in self._samplers:
            # The trainer does so as well, but not where it skips batches on several processes.
            sampler.set_epoch(epoch)
        since = epoch - self._first
        if since < 0 or since % self.every or epoch == self.updated:
            return
        training = model.training
        try:
            for sampler in self._samplers:
                sampler.update(*self._embeddings(sampler, model, args, state.is_local_process_zero))
        finally:
            model.train(training)
        self.updated = epoch

    def _embeddings(
        self, sampler: GCBSBatchSampler, model: SentenceTransformer, args: Any, shows_progress: bool
    ) -> list[Tensor]:
        """(N, d) of each column."""
        dataset = sampler.dataset
        columns = self.columns or sampler.text_columns[:2]
        if not columns or not set(columns) <= set(dataset.column_names):
            expected = f"columns of the data set, {dataset.column_names}"
            raise ValueError(f"columns must be {expected}, got {self.columns or 'None, and none of them is text'}")
        name = dataset[0].get("dataset_name")
        found = []
        for column in columns:
            route = _column_setting(args.router_mapping, name, column)
            options = {
                # Without a prompt of its own a column has none in training: "" keeps the model's default away.
                "prompt": _column_setting(args.prompts, name, column) or "",
                "batch_size": self.batch_size,
                "show_progress_bar": shows_progress and not args.disable_tqdm,
                **({} if route is None else {"task": route}),
            }
            found.append(_shared_encode(model, list(dataset[column]), options))
        return found


def _samplers(dataloader: Any) -> list[GCBSBatchSampler]:
    layers = list(_layers(dataloader))
    found = [layer for layer in layers if isinstance(layer, GCBSBatchSampler)]
    if not found:
        expected = "batch_sampler=GCBSBatchSampler in its arguments, and training data that have a length"
        raise ValueError(f"the trainer of a GCBSCallback must have {expected}, got {type(layers[-1]).__name__}")
    for shard in layers:
        if not isinstance(shard, accelerate.data_loader.BatchSamplerShard):
            continue
        if shard.split_batches:
            raise ValueError("accelerator_config must have split_batches False with GCBSBatchSampler, got True")
        for sampler in found:
            if sampler.world_size != shard.num_processes:
                expected = f"{shard.num_processes}, the processes that accelerate deals batches to"
                raise ValueError(f"GCBSBatchSampler's world_size must be {expected}, got {sampler.world_size}")
    return found


def _layers(wrapper: Any) -> Iterator[Any]:
    """The data loader, what accelerate and samplers of several data sets wrap around samplers, and these."""
    yield wrapper
    for inner in (*getattr(wrapper, "batch_samplers", ()), getattr(wrapper, "batch_sampler", None)):
        if inner is not None:
            yield from _layers(inner)


def _column_setting(setting: Any, dataset_name: str | None, column: str) -> str | None:
    """From the trainer's prompts or routes: one for all, by column, by data set, or by data set and column."""
    if isinstance(setting, dict):
        setting = setting.get(dataset_name, setting)
    return setting.get(column) if isinstance(setting, dict) else setting


def _shared_encode(model: SentenceTransformer, texts: list[str], options: dict[str, Any]) -> Tensor:
    """(N, d) on all processes, of which each encodes its share: equally many, so that all take part in all steps."""
    state = accelerate.PartialState()
    share = -(-len(texts) // state.num_processes)
    start = share * state.process_index
    mine = [texts[place % len(texts)] for place in range(start, start + share)]
    with torch.no_grad():
        rows = model.encode(mine, convert_to_tensor=True, **options)
        return accelerate.utils.gather(rows)[: len(texts)]


def _as_json(state: dict[str, Any]) -> dict[str, Any]:
    """A sampler's state, with orders as base64 of little-endian int32."""

    def text(order: Tensor) -> str:
        return base64.b64encode(order.numpy().astype("<i4").tobytes()).decode()

    return {name: text(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def _from_json(state: dict[str, Any]) -> dict[str, Any]:
    def order(text: str) -> Tensor:
        return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<i4").astype(np.int64))

    return {name: order(value) if isinstance(value, str) else value for name, value in state.items()}
