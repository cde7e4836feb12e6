"""Fine-tunes a sentence encoder on verses in two translations, and asks which verses it finds in the other one.

python -m examples.two_towers.finetune_verses --batching gcbs
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from examples.pretrain.config import expect, expect_choice
from examples.pretrain.report import table
from examples.two_towers.arguments import parse_settings
from examples.two_towers.halves import retrieve
from examples.two_towers.verses import Pair, encoder, package, verses

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCHINGS = ("random", "gcbs")
HEADER = ("", "recall@1", "MRR", "seconds")


@dataclass(frozen=True)
class Settings:
    batching: str = "gcbs"
    pairs: int = 2000
    held_out: int = 1000
    epochs: int = 2
    batch_size: int = 32
    quantile: float = 0.999
    lr: float = 2e-5
    seed: int = 0
    out: str = ""
    quiet: bool = False

    def __post_init__(self) -> None:
        expect_choice("batching", self.batching, BATCHINGS)
        expect("pairs", self.pairs, "an integer of at least 2", self.pairs >= 2)
        expect("held_out", self.held_out, "an integer of at least 2", self.held_out >= 2)
        expect("epochs", self.epochs, "an integer of at least 1", self.epochs >= 1)
        expect("batch_size", self.batch_size, "an integer of at least 2", self.batch_size >= 2)
        expect("quantile", self.quantile, "a number from 0 to below 1", 0 <= self.quantile < 1)
        expect("lr", self.lr, "a finite number above 0", 0 < self.lr < float("inf"))
        expect("seed", self.seed, "an integer from 0 to below 2**32", 0 <= self.seed < 2**32)


HELP = {
    "batching": "random: shuffled batches; gcbs: batches of verses that the encoder finds alike, anew in each epoch",
    "pairs": "verses to train on, drawn from the whole Bible",
    "held_out": "other verses, that are asked for and searched, the same for all settings",
    "epochs": "passes over the pairs",
    "batch_size": "pairs per step",
    "quantile": "share of the pairs of verses that gcbs does not count as alike",
    "lr": "peak learning rate of AdamW: linear warm-up over a tenth of the steps, then linear to 0",
    "seed": "names the batches and the dropout",
    "out": "folder that keeps the fine-tuned model",
    "quiet": "no progress bar",
}


def split(settings: Settings) -> tuple[list[Pair], list[Pair]]:
    """Verses to train on, and held-out ones. None of them has its text, in either translation, from another."""
    unique, seen = [], set()
    for pair in verses():
        if seen.isdisjoint(pair):
            unique.append(pair)
            seen.update(pair)
    wanted = settings.pairs + settings.held_out
    if wanted > len(unique):
        raise ValueError(f"--pairs and --held-out: expected at most {len(unique)} together, got {wanted}")
    # The draw has a seed of its own, so that runs with different seeds are measured on the same held-out verses.
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, train = order[: settings.held_out], order[settings.held_out : wanted]
    return [unique[item] for item in train], [unique[item] for item in held_out]


def scores(model: SentenceTransformer, pairs: list[Pair], quiet: bool) -> tuple[str, str]:
    """BBE's verses ask for KJV's, in %."""
    bbe, kjv = (
        model.encode([getattr(pair, side) for pair in pairs], convert_to_tensor=True, show_progress_bar=not quiet)
        for side in ("bbe", "kjv")
    )
    return tuple(f"{100 * share:.1f}" for share in retrieve(bbe, kjv))


def finetune(settings: Settings, model: SentenceTransformer, pairs: list[Pair], folder: str) -> None:
    """Here are the two lines that GCBS takes: ``batch_sampler`` and ``callbacks``."""
    dataset = package("datasets", "datasets").Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import PrinterCallback

    from emc2_kernels.batching.sentence_transformers import GCBSBatchSampler, GCBSCallback

    chosen, callbacks = {}, []
    if settings.batching == "gcbs":
        chosen = {"batch_sampler": partial(GCBSBatchSampler, quantile=settings.quantile)}
        # The encoder has been trained already: what it finds alike counts from the first epoch on.
        callbacks = [GCBSCallback(before_first=True)]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        warmup_steps=0.1,
        seed=settings.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=settings.quiet,
        dataloader_pin_memory=torch.cuda.is_available(),
        **chosen,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset.from_dict({"anchor": [one.bbe for one in pairs], "positive": [one.kjv for one in pairs]}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # what it prints is no table
    trainer.train()


def compare(settings: Settings) -> str:
    train, held_out = split(settings)
    if settings.batch_size > len(train):
        raise ValueError(f"--batch-size: expected at most {len(train)} (pairs), got {settings.batch_size}")
    model = encoder()
    rows = [HEADER, ("before", *scores(model, held_out, settings.quiet), "")]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        finetune(settings, model, train, scratch)
    seconds = time.perf_counter() - start
    rows.append((settings.batching, *scores(model, held_out, settings.quiet), f"{seconds:.0f}"))
    if settings.out:
        model.save_pretrained(settings.out)
    explained = f"Of {len(held_out)} held-out BBE verses, each asks for its KJV verse among as many; in %."
    return "\n".join([table(rows), explained, "MRR: mean reciprocal rank. Seconds: of training, embeddings included."])


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m examples.two_towers.finetune_verses"
    settings = parse_settings(program, __doc__.splitlines()[0], Settings, HELP, arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is needed is installed
    try:
        print(compare(settings))
    except (ImportError, ValueError) as error:
        print(f"finetune_verses: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
