"""Losses for the trainer of sentence-transformers (checked with 6.2), and what its checkpoints lack of them.

Batches of alike texts for the same trainer are in ``batching.sentence_transformers``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import checkpoint, checks
from ..batching.graph import extra
from ..losses import ClipLoss, NTXentLoss
from .base import Adapter

trainer_callback = extra("transformers.trainer_callback", "sentences")

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
    from transformers import TrainerControl, TrainerState

LABELS = ("label", "labels", "score", "scores")  # columns that the trainer takes for a label, the first there is
STATE_FILE = "emc2_loss.pt"


class PairLoss(Adapter):
    """A loss over pairs of texts, the two text columns of the training data: anchors and positives.

    The trainer hands it the label column, which holds the items' numbers: see ``with_index``. ``NTXentLoss`` and
    ``ClipLoss`` need none.

    The trainer tells the model that it evaluates, and no loss. What is kept of the items of the training data says
    nothing of others: the value is then the in-batch one, NT-Xent's or with ``bimodal`` CLIP's, at the loss's
    temperature, and nothing that is kept changes.

    The trainer keeps no loss in its checkpoints: ``LossStateCallback`` does. It puts the loss on the model's device,
    and hands a learnt temperature, a parameter, to the model's optimizer, with its weight decay; over several processes
    nobody averages its gradient, so learn none there.

    Args:
        model: that is trained.
        loss: any of ``emc2_kernels.losses``; its ``dim`` is ``model.get_embedding_dimension()``.
        report: whether ``stats`` has the statistics of each training step, see ``Adapter``.

    Raises:
        TypeError: names the argument, what was expected and what came.

    Example:
        >>> loss = EMC2Loss(len(pairs), model.get_embedding_dimension(), temperature=0.05, bimodal=True)
        >>> trainer = SentenceTransformerTrainer(
        ...     model=model, train_dataset=with_index(pairs), loss=PairLoss(model, loss), callbacks=[...]
        ... )
    """

    def __init__(self, model: SentenceTransformer, loss: nn.Module, *, report: bool = False) -> None:
        super().__init__(loss, report)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a SentenceTransformer, got {checks.describe(model)}")
        self.model = model

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of b pairs.

        Args:
            sentence_features: of two columns, as the trainer has tokenised them.
            labels: (b,) int64 items; None: the data has no label column.

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came.
        """
        columns, training = list(sentence_features), _trains(self.model)
        if len(columns) != 2:
            raise ValueError(
                f"sentence_features must be of two text columns, anchors and positives, got {len(columns)}"
            )
        if not training and self.keeps_items:
            labels = None  # of other data: whatever its label column holds, it is no number of an item here
        elif labels is None and self.keeps_items:
            expected = f"the items' numbers, with {type(self.loss).__name__}: train_dataset=with_index(dataset)"
            raise ValueError(f"labels must be {expected}, got no label column")
        if labels is not None and (labels.dtype != torch.int64 or labels.dim() != 1):
            raise TypeError(f"labels must be the items' numbers, (b,) int64, got {checks.describe(labels)}")
        z0, z1 = (self.model(features)["sentence_embedding"] for features in columns)
        if training or not self.keeps_items:
            return self.value_of(z0, z1, labels)
        of_batch = ClipLoss if self.loss.bimodal else NTXentLoss
        return of_batch(temperature=self.loss.temperature, normalize=self.loss.normalize)(z0, z1)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"loss": f"{type(self.loss).__name__}({self.loss.extra_repr()})"}


def _trains(model: nn.Module) -> bool:
    """The trainer has the loss call the model in its wrappers, and tells the model inside that it evaluates."""
    for name in ("module", "_orig_mod"):  # DistributedDataParallel's, torch.compile's
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return _trains(inner)
    return model.training


def with_index(dataset: Dataset, column: str = "label") -> Dataset:
    """The data set with a column of its items' numbers, 0, 1, 2 .., which the trainer takes for labels.

    Shuffled, filtered or cut afterwards, items keep their numbers: ``num_items`` is the length of what came here.

    Args:
        dataset: a ``datasets.Dataset``. One that streams has no numbers: ``dataset.map`` a column of ``hash_slot``.
        column: one of "label", "labels", "score", "scores".

    Raises:
        TypeError: ``dataset`` is something else. ValueError: it has such a column already, or ``column`` is another.
    """
    checks.one_of("column", column, LABELS)
    if not (hasattr(dataset, "add_column") and hasattr(dataset, "column_names") and hasattr(dataset, "__len__")):
        instead = "for a stream map a column of emc2_kernels.data.hash_slot(key, num_slots); of a dict each"
        raise TypeError(f"dataset must be a datasets.Dataset ({instead}), got {type(dataset).__name__}")
    taken = [name for name in LABELS if name in dataset.column_names]
    if taken:
        expected = f"without a label column {', '.join(LABELS)} (dataset.remove_columns)"
        raise ValueError(f"dataset must be {expected}, got one with {', '.join(taken)}")
    return dataset.add_column(column, list(range(len(dataset))))


class LossStateCallback(trainer_callback.TrainerCallback):
    """Saves what losses keep in the trainer's checkpoints, and loads it where ``train(resume_from_checkpoint=...)``
    goes on.

    The file is ``emc2_loss.pt`` in the checkpoint's folder, written by ``emc2_kernels.checkpoint``. With gather="none"
    over several processes each has a file of its own, ``emc2_loss-RANK.pt``. Losses with sharded=True need
    ``torch.distributed.checkpoint``.

    Args:
        loss: a ``PairLoss``, or the dict of them, one a data set, that the trainer has.
        resume_from: the checkpoint's folder. None: that of ``args.resume_from_checkpoint``, or
            ``output_dir/checkpoint-STEP``, where the trainer has saved it.

    Raises:
        TypeError: names the argument. When training goes on, CheckpointError: the folder has no whole file, or one of
            another checkpoint than the trainer's.
    """

    def __init__(self, loss: PairLoss | Mapping[str, PairLoss], *, resume_from: str | os.PathLike[str] | None = None):
        self.losses = dict(loss) if isinstance(loss, Mapping) else {"loss": loss}
        for value in self.losses.values():
            if not isinstance(value, Adapter):
                raise TypeError(f"loss must be a PairLoss or a dict of them, got {checks.describe(value)}")
        if resume_from is not None and not isinstance(resume_from, (str, os.PathLike)):
            raise TypeError(f"resume_from must be a folder, got {checks.describe(resume_from)}")
        self.resume_from = resume_from

    def on_save(
        self,
        args: SentenceTransformerTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._own_file(args) or state.is_world_process_zero:
            states = {name: loss.loss.state_dict() for name, loss in self.losses.items()}
            saved = {"run": _run_of(state), "losses": states}
            checkpoint.save(_checkpoint_folder(args, state) / self._file_name(args), saved)

    def on_train_begin(
        self,
        args: SentenceTransformerTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not state.global_step:
            return
        folder = self.resume_from or args.resume_from_checkpoint or _checkpoint_folder(args, state)
        path = Path(folder) / self._file_name(args)
        saved = checkpoint.load(path)
        if saved["run"] != _run_of(state):
            expected = f"the losses of the checkpoint that training goes on from, at step {state.global_step}"
            raise checkpoint.CheckpointError(f"{path}: expected {expected}, found those of another: see resume_from")
        states = saved["losses"]
        if states.keys() != self.losses.keys():
            raise ValueError(f"the checkpoint must have the losses {[*self.losses]}, as there are, got {[*states]}")
        for name, loss in self.losses.items():
            loss.loss.load_state_dict(states[name])

    def _own_file(self, args: SentenceTransformerTrainingArguments) -> bool:
        return args.world_size > 1 and any(loss.loss.gather == "none" for loss in self.losses.values())

    def _file_name(self, args: SentenceTransformerTrainingArguments) -> str:
        path = Path(STATE_FILE)
        return f"{path.stem}-{args.process_index}{path.suffix}" if self._own_file(args) else path.name


def _run_of(state: TrainerState) -> str:
    """Tells one moment of a run from others: the trainer keeps what it has logged in its checkpoints."""
    return hashlib.sha256(json.dumps([state.global_step, state.log_history], sort_keys=True).encode()).hexdigest()


def _checkpoint_folder(args: SentenceTransformerTrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
