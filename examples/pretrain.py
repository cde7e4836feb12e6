"""Pre-trains a small encoder with a contrastive loss and says what its features are worth.

python examples/pretrain.py --data digits --method emc2
torchrun --standalone --nproc-per-node 2 examples/pretrain.py --data digits --method emc2
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint
from config import Config, parse_arguments
from data import DATASETS, Split, augment, batches, draw_noise
from evaluate import FEW_LABELS, Accuracy, accuracy, encode, few_nearest_neighbour
from model import build_encoder
from plots import History, plot_curves
from processes import LostProcess, Processes
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm import tqdm

from emc2_kernels import losses
from emc2_kernels.batching import GlobalContrastiveBatchSampler, check_loss
from emc2_kernels.checkpoint import CheckpointError, load, save

# What every loss reports, and what one method's does alone; the rest of that is not written.
STATS = ("ntxent", "positive_similarity", "negative_similarity", "mean_cosine")
OWN_STATS = ("acceptance", "carry_share", "cache_age", "weight_sum", "temperature")
COLUMNS = ("epoch", "step", "loss", *STATS, *OWN_STATS, "lr", "images_per_second", "few_nearest_neighbour")
CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.csv", "curves.png"
ONE = Processes()


@dataclass(frozen=True)
class Results:
    """seconds: training alone, without evaluation and checkpoints; history: the rows of metrics.csv."""

    accuracy: Accuracy
    history: History
    steps: int
    seconds: float
    paths: tuple[Path, ...]


class Run:
    """All that changes during training, in one place, so that a checkpoint can hold all of it.

    With several processes each has a part of every batch. Encoder, optimizer and generators are alike in all of them,
    and so is the loss's state unless it gathers nothing.
    """

    def __init__(self, config: Config, split: Split, processes: Processes = ONE) -> None:
        self.config = config
        self.split = split
        self.processes = processes
        num_items = len(split.train_images)
        if config.batch_size > num_items:
            raise ValueError(f"--batch-size: expected at most {num_items} (training images), got {config.batch_size}")
        self.steps_per_epoch = num_items // config.batch_size
        device = config.torch_device
        # No draw comes from PyTorch's global generators: these are the whole random state outside the loss.
        seeds = torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(config.seed)).tolist()
        self.order_generator = torch.Generator().manual_seed(seeds[0])
        self.view_generator = torch.Generator(device).manual_seed(seeds[1])
        # Of each process alone: what it encodes again is its own affair.
        self.again_generator = torch.Generator(device).manual_seed(seeds[2] + processes.rank)
        self.encoder = build_encoder(config.dim, config.seed).to(device)
        self.averaging_encoder = processes.averaging(self.encoder)
        self.loss = build_loss(config, num_items, self.encode_again).to(device)
        self.sampler: GlobalContrastiveBatchSampler | None = None
        if config.batching == "gcbs":
            check_loss(self.loss)
            options = {"drop_last": True, "seed": config.seed, **config.own_options("batching")}
            place = {"rank": processes.rank, "world_size": processes.count}
            part = config.batch_size // processes.count
            self.sampler = GlobalContrastiveBatchSampler(num_items, part, **options, **place)
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        schedule = warmup_cosine(config.epochs * self.steps_per_epoch)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.history: History = []

    def encode_again(self, items: Tensor, views: Tensor) -> Tensor:
        """items (k,), views (k,) -> (k, dim) with gradient. Views 0 and 1 are drawn alike: `views` is unused."""
        images = self.split.train_images[items]
        return self.encoder(augment(images, draw_noise(len(items), images, self.again_generator)))

    def batches(self) -> Iterator[Tensor]:
        """One epoch of this process's parts of batches, int64 items; where batches are chosen, by the encoder as it is
        now."""
        if self.sampler is None:
            whole = batches(len(self.split.train_images), self.config.batch_size, self.order_generator)
            yield from map(self.processes.part, whole)
            return
        if self.epoch > 0:  # an untrained encoder has nothing to say
            self.sampler.update(*self.embeddings())
        yield from map(torch.tensor, self.sampler)

    @torch.no_grad()
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """(n, dim) of all training images, twice: their two views of the last epoch where the loss keeps them, which
        costs nothing; else encoded, without augmentation."""
        images = self.split.train_images
        bank = getattr(self.loss, "bank", None)
        own = self.config.gathers == "none" and self.processes.count > 1  # the bank: without the others' last epoch
        if bank is None or own:
            encoded = torch.cat([self.encoder(part) for part in images.split(1024)])
            return encoded, encoded
        labels = torch.arange(bank.num_slots, device=images.device).view(-1, bank.views).T
        views = [bank.lookup(label).float() for label in labels]
        missing = (bank.age(labels[0]) < 0).nonzero().squeeze(1)  # what the epoch's last, dropped batch would have had
        for view in views:
            view[missing] = self.encoder(images[missing])
        return tuple(views)

    def views(self, index: Tensor) -> Tensor:
        """index: this process's part (b,) of a batch -> (2b, 1, h, w), one view of each image and then another.

        Every process draws the noise of the whole batch and keeps its part of it: images are then changed as one
        process would change them.
        """
        images = self.split.train_images[index]
        size = self.config.batch_size
        noise = draw_noise(2 * size, images, self.view_generator)
        part = self.processes.part(torch.arange(size, device=images.device))
        return augment(torch.cat([images, images]), noise.rows(torch.cat([part, part + size])))

    def train_step(self, index: Tensor) -> dict[str, Tensor]:
        """index: this process's part (b,) of a batch: one update. Returns its detached 0-d statistics; nothing is read
        back from the device."""
        z0, z1 = self.averaging_encoder(self.views(index)).chunk(2)
        loss, stats = self.loss(z0, z1, index, return_stats=True)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return {"loss": loss.detach(), **stats}

    def train_epoch(self, progress: tqdm) -> dict[str, float]:
        """One pass over the training images. Returns the row of metrics.csv, means over steps and processes; what only
        the first process finds out is missing in the others."""
        self.averaging_encoder.train()
        self.loss.train()
        sums: dict[str, Tensor] = {}
        lr = self.scheduler.get_last_lr()[0]
        start = time.perf_counter()
        for index in self.batches():
            for name, value in self.train_step(index.to(self.view_generator.device)).items():
                sums[name] = sums[name] + value if name in sums else value
            progress.update()
        found = self.processes.mean(torch.stack([value.double() for value in sums.values()]) / self.steps_per_epoch)
        means = dict(zip(sums, found.tolist(), strict=True))  # waits for the device
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.epoch += 1
        row = {"epoch": self.epoch, "step": self.step, **means, "lr": lr}
        row["images_per_second"] = self.steps_per_epoch * self.config.batch_size / seconds
        if self.processes.first:
            row["few_nearest_neighbour"] = few_nearest_neighbour(encode(self.encoder, self.split))
        return row

    def state(self) -> dict[str, Any]:
        """Of all processes, which all call this."""
        of_each = self.processes.of_each
        loss = {name: value.cpu() for name, value in self.loss.state_dict().items()}
        generators = [self.order_generator, self.view_generator]
        return {
            "settings": self.config.settings(),
            "job": self.processes.job,
            "epoch": self.epoch,
            "step": self.step,
            "encoder": self.encoder.state_dict(),
            # Replicated state once, else by rank.
            "losses": of_each(loss) if self.config.gathers == "none" else [loss],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sampler": None if self.sampler is None else self.sampler.state_dict(),
            "generators": [generator.get_state() for generator in generators],
            "again_generators": of_each(self.again_generator.get_state()),
            "history": self.history,
            "seconds": self.seconds,
        }

    def save(self, path: Path) -> None:
        state = self.state()
        if self.processes.first:
            save(path, state)

    def restore(self, state: dict[str, Any]) -> None:
        rank = self.processes.rank
        self.epoch, self.step = state["epoch"], state["step"]
        self.encoder.load_state_dict(state["encoder"])
        self.loss.load_state_dict(state["losses"][rank if len(state["losses"]) > 1 else 0])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.sampler is not None:
            self.sampler.load_state_dict(state["sampler"])
        self.order_generator.set_state(state["generators"][0])
        self.view_generator.set_state(state["generators"][1])
        self.again_generator.set_state(state["again_generators"][rank])
        self.history, self.seconds = state["history"], state["seconds"]


def build_loss(config: Config, num_items: int, encode_again: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    common = {"num_items": num_items, "dim": config.dim, "temperature": config.temperature, "seed": config.seed}
    common["gather"] = config.gathers
    takes = losses.TABLE[config.method].options()
    options = {name: value for name, value in common.items() if name in takes} | config.own_options("method")
    if config.method == "cached" or options.get("carry") == "recompute":
        options["encode"] = encode_again
    return losses.get(config.method, **options)


def warmup_cosine(total: int) -> Callable[[int], float]:
    """Step -> factor of the peak learning rate: linear over the first tenth, times a cosine from 1 to 0."""
    return lambda step: min(1.0, 10 * (step + 1) / total) * (0.5 + 0.5 * math.cos(math.pi * step / total))


def write_metrics(path: Path, history: History) -> None:
    """The whole file each time: it then never disagrees with the checkpoint, whenever the run was cut off."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(history)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Limits PyTorch, and the BLAS below scikit-learn: with matrices this small, threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def train(config: Config) -> Results | None:
    """One run, start to end or from its checkpoint; writes into `config.directory`. None in all processes but the
    first."""
    processes = Processes.launched()
    with cpu_threads(config.threads), processes.together(config.torch_device):
        return _train(Run(config, DATASETS[config.data]().to(config.torch_device), processes))


def state_to_go_on_from(config: Config, processes: Processes, path: Path) -> dict[str, Any] | None:
    """The checkpoint's, where asked for it and where torchrun has started the processes again; None: a fresh start."""
    if config.resume:
        return load_checkpoint(path, config.settings())
    # Of an older run it may still be, where processes ended before they could replace it.
    if processes.restarts and path.exists() and load(path).get("job") == processes.job:
        return load_checkpoint(path, config.settings())
    return None


def _train(run: Run) -> Results | None:
    config, processes = run.config, run.processes
    paths = tuple(config.directory / name for name in (CHECKPOINT, METRICS, CURVES))
    config.directory.mkdir(parents=True, exist_ok=True)
    state = processes.from_first(lambda: state_to_go_on_from(config, processes, paths[0]))
    if state is None:
        # Also replaces the checkpoint of an older run: --resume after an early interrupt must not continue that one.
        run.save(paths[0])
    else:
        try:
            run.restore(state)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{paths[0]}: expected a checkpoint of this version of the code: {error}") from error
        print(f"going on after epoch {run.epoch} of {paths[0]}", file=sys.stderr)
    total = config.epochs * run.steps_per_epoch
    options = {"unit": "step", "mininterval": 1, "disable": config.quiet or not processes.first}
    with tqdm(total=total, initial=run.step, desc=config.method, **options) as progress:
        while run.epoch < config.epochs:
            row = run.train_epoch(progress)
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is {row['loss']} in epoch {run.epoch}; a lower --lr may help")
            run.history.append(row)
            run.save(paths[0])
            if processes.first:
                write_metrics(paths[1], run.history)
                progress.set_postfix(ntxent=f"{row['ntxent']:.3f}", knn=f"{row['few_nearest_neighbour']:.1%}")
    if not processes.first:
        return None
    write_metrics(paths[1], run.history)
    plot_curves(paths[2], {config.method: run.history}, f"{config.method} on {config.data}, batch {config.batch_size}")
    return Results(accuracy(encode(run.encoder, run.split)), run.history, run.step, run.seconds, paths)


def main(arguments: Sequence[str] | None = None) -> int:
    processes, stderr = Processes.launched(), sys.stderr
    with processes.only_first_prints():
        config = parse_arguments(arguments)
        try:
            results = train(config)
        except KeyboardInterrupt:
            print(f"\ninterrupted; {config.directory / CHECKPOINT} holds the last whole epoch: add --resume to go on")
            return 130
        except (CheckpointError, FloatingPointError, ImportError, LostProcess, OSError, ValueError) as error:
            # Whichever process it is: the others may only see that it is gone.
            stderr.write(f"pretrain.py: error: {processes.name}{error}\n")
            return 2
        if results is not None:
            report(config, results)
    return 0


def report(config: Config, results: Results) -> None:
    found = results.accuracy
    print(f"{config.method}: {results.steps} steps of {config.batch_size} images, {results.seconds:.1f} s of training")
    print("accuracy on held-out images     linear probe    1-NN")
    print(f"  all training labels           {found.linear_probe:12.1%}  {found.nearest_neighbour:6.1%}")
    print(
        f"  {FEW_LABELS} labels a class             {found.few_linear_probe:12.1%}  {found.few_nearest_neighbour:6.1%}"
    )
    print("written: " + ", ".join(str(path) for path in results.paths))


if __name__ == "__main__":
    sys.exit(main())
