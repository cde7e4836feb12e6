"""The latest embedding of every view of every item: it rescores chains, and stands for keys outside the batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from .strict_state import MAX_STEP, range_errors
from .table import SlotTable


class EmbeddingBank(SlotTable):
    """Label = item * views + view -> latest embedding, detached, and the step that wrote it, in ``state_dict``.

    What was never written is infinite: where the whole bank is a walk's or a sampler's keys, its score is not finite
    and it is never moved to, without anyone asking (on a GPU, the question would wait for the answer).

    Args:
        num_items: items of the data set.
        dim: of the embeddings.
        views: of an item.
        dtype: of what is kept: float32, bfloat16, float16 or float64.
        device: of the tables; None: torch's default.
        process_group: over whose ranks it lies with ``sharded``; None: the default group.
        sharded: each rank keeps a block of items; reads and writes are then collectives.

    Attributes:
        embeddings: (num_items * views, dim); inf: never written.
        written_at: (num_items * views,) int64, the step of each; -1: never.
        last_step: () int64, of the latest update.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """

    embeddings: Tensor
    written_at: Tensor
    last_step: Tensor

    def __init__(
        self,
        num_items: int,
        dim: int,
        *,
        views: int = 2,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        sharded: bool = False,
    ) -> None:
        super().__init__(num_items, views, process_group=process_group, sharded=sharded)
        self.dim = checks.at_least("dim", dim, 1)
        checks.embedding_dtype("dtype", dtype)
        self.keep("embeddings", torch.inf, dtype, device, dim)
        self.keep("written_at", -1, torch.int64, device)
        self.register_buffer("last_step", torch.zeros((), dtype=torch.int64, device=device))

    def update(
        self, index: Tensor, view: int | Tensor, embeddings: Tensor, step: int | Tensor, *, only: Tensor | None = None
    ) -> None:
        """Writes b embeddings; of several rows with the same (index, view), the last one's.

        One that is not finite is refused where values are looked at (on the CPU), and elsewhere not written, nor
        anywhere one that overflows in the bank's dtype.

        Args:
            index: (b,) int64 items.
            view: one number or (b,) int64, in [0, views).
            embeddings: (b, dim), any floating dtype.
            step: 0 <= step < 2^32, an integer or a 0-d int64 tensor.
            only: () bool; False: nothing is written. It is not waited for.

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came; nothing has been written.
        """
        with self.report_errors():
            slots = self.slots(index, view, self.embeddings.device)
            checks.tensor("embeddings", embeddings)
            if embeddings.shape != (slots.shape[0], self.dim) or embeddings.device != slots.device:
                expected = f"shape ({slots.shape[0]}, {self.dim}) on {slots.device}"
                raise ValueError(f"embeddings must have {expected}, got {checks.describe(embeddings)}")
            checks.finite("embeddings", embeddings.detach())
            checks.counter("step", step, 32, slots.device)
        self.put_embeddings(slots, embeddings, step, only=only)

    def put_embeddings(
        self, slots: Tensor, embeddings: Tensor, step: int | Tensor, *, only: Tensor | None = None, **known: bool
    ) -> None:
        """``update`` of slots (b,), with arguments that have been checked. For ``known`` see ``SlotTable.put``."""
        steps = torch.as_tensor(step, dtype=torch.int64, device=slots.device).expand(slots.shape[0])
        self.put(slots, only=only, **known, embeddings=embeddings, written_at=steps)
        # A difference and no copy, which Inductor might make after a caller's `step += 1` (pytorch/pytorch#198131).
        passed = step - self.last_step
        self.last_step.add_(passed if only is None else passed * only)

    def _checked(self, labels: Tensor) -> Tensor:
        with self.report_errors():
            checks.vector("labels", labels, None, torch.int64, self.embeddings.device)
            return checks.within("labels", labels, -1, self.num_slots, on_gpu=True)

    def _legal(self, labels: Tensor) -> Tensor:
        return labels.clamp_min(0) if self.owners is None else labels

    def find(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the bank holds each label, and its embedding.

        Args:
            labels: (k,) int64, item * views + view; -1: none.

        Returns:
            (k,) bool, and (k, dim) embeddings, zeros for what the bank does not hold.
        """
        return self.read(self._checked(labels))

    def read(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``find`` of labels that have been checked."""
        embeddings, written_at = self.rows(self._legal(labels), "embeddings", "written_at")
        held = (labels >= 0) & (written_at >= 0)
        if checks.values_visible(held) and bool(held.all()):  # as nearly always; on a CPU the rest takes ten times that
            return held, embeddings
        return held, torch.where(held[:, None], embeddings, 0)

    def lookup(self, labels: Tensor) -> Tensor:
        """(k, dim) embeddings; zeros for -1 and for what was never written.

        Args:
            labels: (k,) int64, item * views + view; -1: none.
        """
        return self.find(labels)[1]

    def age(self, labels: Tensor) -> Tensor:
        """(k,) int64 steps between each embedding and the latest update; -1 for what was never written.

        Args:
            labels: (k,) int64, item * views + view; -1: none.
        """
        (written_at,) = self.rows(self._legal(self._checked(labels)), "written_at")
        return torch.where((labels >= 0) & (written_at >= 0), self.last_step - written_at, -1)

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        embeddings, written_at = tables["embeddings"], tables["written_at"]
        yield from range_errors(f"{prefix}written_at", written_at, -1, MAX_STEP)
        if embeddings.is_meta:
            return
        lowest, highest = torch.aminmax(embeddings, dim=1)  # NaN where one of a row is; no table of flags
        held = written_at >= 0
        rows = {"finite where written_at is not -1": held & ~(lowest.isfinite() & highest.isfinite())}
        rows["infinite where written_at is -1"] = ~held & (lowest != torch.inf)
        for expected, wrong in rows.items():
            if wrong.any():
                yield f"{prefix}embeddings must be {expected}, got {int(wrong.sum())} rows that are not"

    def extra_repr(self) -> str:
        return f"num_items={self.num_items}, dim={self.dim}, views={self.views}, dtype={self.embeddings.dtype}"
