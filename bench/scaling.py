"""What a step costs over many GPUs: bytes from formulas that tests hold against counts, and a model of the time.

    python -m bench.scaling                         the tables of docs/results/scaling-model.md
    python -m bench.scaling --bandwidth 400e9       GPUs of one NVLink domain

Each of W ranks has b pairs of d numbers. Embeddings travel in float32, whatever the encoder computes in.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

AGREED = 4 * 8  # rows of a rank, and what ranks make sure to have in common
ID, KEY, SCORE = 8, 8, 4
WRITTEN_AT = 8
QUEUE = 16  # items that i-SIR has beside a batch's
LOSSES = ("ntxent", "clip", "emc2")


class Batch(NamedTuple):
    pairs: int  # b, of a rank
    dim: int
    ranks: int

    @property
    def embeddings(self) -> int:
        """Bytes of a rank's, both views."""
        return 2 * self.pairs * self.dim * 4

    @property
    def others(self) -> int:
        return self.ranks - 1


class Bytes(NamedTuple):
    """Bytes that a rank sends in a step; what goes to several receivers counts for each."""

    forward: float
    backward: float


def bytes_sent(loss: str, gather: str, batch: Batch, *, sharded: bool = False, kept: int = 2) -> Bytes:
    """Args: see ``bytes_exchanged``. loss: "isir" is EMC2 with that sampler."""
    ids = 2 * batch.pairs * ID
    if loss in ("ntxent", "clip"):
        if gather == "all":
            return Bytes(batch.others * (AGREED + batch.embeddings + ids // 2), batch.others * batch.embeddings)
        # Backward, keys go round again, and their gradients behind them: these are one hop more on the way, home.
        sums = batch.ranks * batch.embeddings if batch.others else 0
        forward = batch.others * (AGREED + batch.embeddings + ids)
        return Bytes(forward, batch.others * (batch.embeddings + ids) + sums)
    states = 2 * batch.pairs * (KEY + SCORE)
    keys, sums = batch.embeddings, batch.embeddings // 2  # a ring: one view's, twice
    if loss == "isir" and gather == "ring":  # both views', once, with their ids
        keys, sums = batch.embeddings + ids, batch.embeddings
    forward = batch.others * (AGREED + ids // 2 + keys)
    if loss == "isir":
        forward += batch.others * (2 * batch.dim + 3) * 4  # of how stale is what is kept
    if sharded:
        forward += bytes_exchanged(loss, batch, kept)
    elif gather == "all":
        forward += batch.others * states
    else:  # every rank keeps every rank's anchors
        forward += batch.others * (batch.embeddings + ids + states)
    if gather == "all":
        return Bytes(forward, batch.others * batch.embeddings)
    again = batch.others * keys if loss == "isir" else 0  # EMC2's gradient of what was sampled needs no keys
    return Bytes(forward, again + batch.ranks * sums if batch.others else 0)


def bytes_exchanged(loss: str, batch: Batch, kept: int) -> float:
    """Bytes to and from owners of items that are uniform draws, in the mean over ranks: 2b anchors' chains and what
    they sit on are read, and chains and embeddings are written. i-SIR reads both views of that, the anchors' own and
    the queue's.

    Args:
        kept: bytes of a number in the bank.
    """
    row = kept * batch.dim + WRITTEN_AT
    read, queue = ID + KEY + SCORE + ID + row, 0
    if loss == "isir":
        read, queue = ID + KEY + 3 * (ID + row), 2 * QUEUE * (ID + row)
    written = ID + KEY + SCORE + ID + row
    counts = 4 * 2 * 8 * batch.others  # with what ranks make sure of
    return batch.others / batch.ranks * (2 * batch.pairs * (read + written) + queue) + counts


def bytes_stored(items: float, dim: int, ranks: int = 1, kept: int = 2) -> float:
    """Bytes on a rank of both views' chains and bank, sharded over so many."""
    return 2 * items * (KEY + SCORE + kept * dim + WRITTEN_AT) / ranks


def bytes_held(gather: str, batch: Batch) -> float:
    """Bytes of the embeddings and gradients that a rank holds at once, at most. "all": those of all ranks, in the order
    of the ranks and in that of the views, and gradients as well. "ring": its own, those in work and those on the way,
    and sums of each."""
    return (4 * batch.ranks if gather == "all" else 6) * batch.embeddings


@dataclass(frozen=True)
class Machine:
    """Assumptions, not measurements."""

    bandwidth: float  # bytes a second that a GPU sends
    flops: float  # a second, of matrix products of this size
    hop: float  # seconds before the first byte of an exchange that Python starts arrives
    step: float  # and of one inside a collective

    def compute(self, loss: str, batch: Batch) -> float:
        """Seconds of a rank's products: NT-Xent's and CLIP's forward pass has one, and their backward pass three."""
        rows, keys = 2 * batch.pairs, 2 * batch.pairs * batch.ranks
        products = {"ntxent": 4, "clip": 2, "emc2": 0.5, "isir": 4}[loss]  # of all rows with all keys, of two views
        return products * 2 * rows * keys * batch.dim / self.flops

    def seconds(self, loss: str, gather: str, batch: Batch, **options: float) -> float:
        """Seconds of gathering and products in a step. A ring's exchange runs while products do; a gathering is waited
        for."""
        transfer = sum(bytes_sent(loss, gather, batch, **options)) / self.bandwidth
        if gather == "all":
            return transfer + self.compute(loss, batch) + 3 * batch.others * self.step
        rounds = 2 if loss == "ntxent" else 3  # forward and backward; EMC2's walk, samples and their gradients
        return max(transfer, self.compute(loss, batch)) + rounds * batch.ranks * self.hop


def crossover(loss: str, machine: Machine, dim: int, ranks: int) -> int | None:
    """The fewest pairs of a rank, a power of two, with which a ring takes less time."""
    for power in range(4, 18):
        batch = Batch(2**power, dim, ranks)
        if machine.seconds(loss, "ring", batch) < machine.seconds(loss, "all", batch):
            return batch.pairs
    return None


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


RANKS = (8, 64, 256, 1024)
ITEMS = {"ImageNet, 1.28e6": 1.28e6, "1e8": 1e8, "LAION-400M, 4e8": 4e8, "LAION-5B, 5.8e9": 5.8e9}


def byte_rows(make_batch: Callable[[int], Batch]) -> Iterator[list[str]]:
    for loss in ("ntxent", "emc2"):
        for gather in ("all", "ring"):
            for sharded in (False, True) if loss == "emc2" else (False,):
                name = f"{loss} {gather}" + (", sharded" if sharded else "")
                yield [name, *(size(sum(bytes_sent(loss, gather, make_batch(W), sharded=sharded))) for W in RANKS)]
    yield ["embeddings held: all", *(size(bytes_held("all", make_batch(W))) for W in RANKS)]
    yield ["embeddings held: ring", *(size(bytes_held("ring", make_batch(W))) for W in RANKS)]


def time_rows(machine: Machine, make_batch: Callable[[int], Batch]) -> Iterator[list[str]]:
    for loss in ("ntxent", "emc2"):
        yield [f"{loss}: products alone", *(duration(machine.compute(loss, make_batch(W))) for W in RANKS)]
        for gather in ("all", "ring"):
            yield [f"{loss} {gather}", *(duration(machine.seconds(loss, gather, make_batch(W))) for W in RANKS)]


def table(title: str, head: Sequence[str], rows: Iterator[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bytes, memory and modelled time of a step over many GPUs.")
    parser.add_argument("--bandwidth", type=float, default=50e9, help="bytes/s that a GPU sends (default: 50e9)")
    parser.add_argument("--flops", type=float, default=4e14, help="of matrix products (default: 4e14)")
    parser.add_argument("--hop", type=float, default=30e-6, help="seconds of an exchange's start (default: 30e-6)")
    parser.add_argument("--step", type=float, default=5e-6, help="the same inside a collective (default: 5e-6)")
    machine = Machine(**vars(parser.parse_args(arguments)))
    head = ["", *(f"W = {ranks}" for ranks in RANKS)]
    for pairs, dim in ((256, 128), (4096, 512)):
        shape = f"b = {pairs} pairs a rank, d = {dim}"

        def make_batch(ranks: int, pairs: int = pairs, dim: int = dim) -> Batch:
            return Batch(pairs, dim, ranks)

        table(f"Bytes that a rank sends in a step, {shape}", head, byte_rows(make_batch))
        table(f"Time of gathering and products, {shape}", head, time_rows(machine, make_batch))
    for dim in (128, 512):
        found = ([name, *(size(bytes_stored(n, dim, W)) for W in (1, *RANKS))] for name, n in ITEMS.items())
        table(f"Chains and bank on a rank, d = {dim}", ["items", "replicated", *head[1:]], found)
    found = (
        [f"{loss}, d = {d}", *(str(crossover(loss, machine, d, W)) for W in RANKS)]
        for loss in LOSSES
        for d in (128, 512)
    )
    table("Pairs a rank from which a ring takes less time", head, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
