"""All that changes during a training run, its steps, and the checkpoint that holds it and refuses to be mixed up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from emc2_kernels import losses
from emc2_kernels.batching import GlobalContrastiveBatchSampler, check_loss
from emc2_kernels.checkpoint import CheckpointError, load, save
from examples.pretrain.augment import Views, choose_augmentation
from examples.pretrain.config import Config
from examples.pretrain.encoders import Encoder, build_encoder
from examples.pretrain.evaluate import Features, centre, encode, few_nearest_neighbour
from examples.pretrain.images import Split, ahead, batches, chunks
from examples.pretrain.optimizers import build_optimizer, warmup_cosine
from examples.pretrain.processes import Processes
from examples.pretrain.report import History
from examples.pretrain.tracing import Tracer

TRACE = "trace.json"
FIELDS = (  # of a checkpoint
    "settings", "job", "epoch", "step", "encoder", "losses", "optimizer", "scheduler", "scaler", "sampler",
    "generators", "again_generators", "history", "seconds",
)  # fmt: skip
ONE = Processes()


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
        source = torch.Generator().manual_seed(config.seed)
        seeds = torch.randint(2**62, (3,), generator=source).tolist()
        fixed_views_seed = int(torch.randint(2**62, (), generator=source))
        self.order_generator = torch.Generator().manual_seed(seeds[0])
        self.view_generator = torch.Generator(device).manual_seed(seeds[1])
        # Of each process alone: what it encodes again is its own affair.
        self.again_generator = torch.Generator(device).manual_seed(seeds[2] + processes.rank)
        augmentation = choose_augmentation(config.view_size, config.jitter, config.blur)
        self.views_of = Views(augmentation, split.train_images, config.augmentations, fixed_views_seed)
        self.encoder = self._build_encoder().to(device)
        self.averaging_encoder = processes.averaging(self.encoder)
        self.loss = build_loss(config, num_items, self.encode_again).to(device)
        self.sampler = self._build_sampler(num_items)
        options = (config.lr, config.weight_decay, config.momentum)
        self.optimizer = build_optimizer(config.optimizer, self.encoder.parameters(), *options)
        self.schedule = warmup_cosine(config.epochs * self.steps_per_epoch, config.warmups)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.tracer = Tracer(config.profile if processes.first else 0, config.directory / TRACE, device)
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.history: History = []

    def _build_encoder(self) -> Encoder:
        config = self.config
        shape = {
            "name": config.encoder,
            "channels": self.split.train_images.shape[1],
            "hidden": config.projector_hidden,
        }
        return build_encoder(config.dim, config.seed, stem=config.stem, norm=config.norm, **shape)

    def _build_sampler(self, num_items: int) -> GlobalContrastiveBatchSampler | None:
        config, processes = self.config, self.processes
        if config.batching == "shuffle":
            return None
        check_loss(self.loss)
        options = {"drop_last": True, "seed": config.seed, **config.own_options("batching")}
        place = {"rank": processes.rank, "world_size": processes.count}
        return GlobalContrastiveBatchSampler(num_items, config.batch_size // processes.count, **options, **place)

    def autocast(self) -> torch.autocast:
        """For the encoder in training. What is kept of its weights, and the losses' arithmetic, stay float32."""
        amp = self.config.amp
        dtype = torch.float16 if amp == "float16" else torch.bfloat16
        return torch.autocast(self.config.torch_device.type, dtype, enabled=amp != "none")

    def encode_again(self, items: Tensor, views: Tensor) -> Tensor:
        """items (k,), views (k,) -> (k, dim) with gradient. Without fixed views, 0 and 1 are drawn alike."""
        images = self.split.train_images[items]
        drawn = self.views_of.draw(len(items), images, self.again_generator)
        with self.autocast():
            return self.encoder(self.views_of.make(images, drawn, items, views))

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
        bank = getattr(self.loss, "bank", None)
        own = self.config.gathers == "none" and self.processes.count > 1  # the bank: without the others' last epoch
        if bank is None or own:
            encoded = self._encode_all(torch.arange(len(self.split.train_images), device=self.view_generator.device))
            return encoded, encoded
        labels = torch.arange(bank.num_slots, device=self.view_generator.device).view(-1, bank.views).T
        views = [bank.lookup(label).float() for label in labels]
        missing = (bank.age(labels[0]) < 0).nonzero().squeeze(1)  # what the epoch's last, dropped batch would have had
        for view in views:
            view[missing] = self._encode_all(missing)
        return tuple(views)

    def _encode_all(self, positions: Tensor) -> Tensor:
        """positions (k,) of training images -> (k, dim), with the statistics that a BatchNorm has kept."""
        training = self.encoder.training
        self.encoder.eval()
        images = chunks(self.split.train_images, positions)
        parts = [self.encoder(centre(part, self.config.view_size)) for part in images]
        self.encoder.train(training)
        return torch.cat(parts) if parts else torch.empty(0, self.config.dim, device=positions.device)

    def views(self, index: Tensor) -> Tensor:
        """index: this process's part (b,) of a batch -> (2b, channels, h, w), a view of each image and then another.

        Every process draws the noise of the whole batch and keeps its part of it: images are then changed as one
        process would change them.
        """
        images = self.split.train_images[index]
        size = self.config.batch_size
        drawn = self.views_of.draw(2 * size, images, self.view_generator)
        part = self.processes.part(torch.arange(size, device=images.device))
        rows = torch.cat([part, part + size])
        views, items = (rows >= size).long(), index.to(images.device).repeat(2)
        return self.views_of.make(torch.cat([images, images]), drawn.rows(rows), items, views)

    def train_step(self, index: Tensor) -> dict[str, Tensor]:
        """index: this process's part (b,) of a batch: one update. Returns its detached 0-d statistics; nothing is read
        back from the device."""
        part = self.tracer.part
        with part("views"):
            views = self.views(index)
        with part("encoder"), self.autocast():
            z0, z1 = self.averaging_encoder(views).chunk(2)
        with part("loss"):
            loss, stats = self.loss(z0, z1, index.to(z0.device), return_stats=True)
        with part("backward"):
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
        with part("optimizer"):
            if self.config.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.encoder.parameters(), self.config.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
        self.step += 1
        return {"method_loss": loss.detach(), **stats}

    def train_epoch(self, progress: tqdm) -> dict[str, float]:
        """One pass over the training images. Returns the row of metrics.csv, means over steps and processes; what only
        the first process finds out is missing in the others."""
        self.averaging_encoder.train()
        self.loss.train()
        sums: dict[str, Tensor] = {}
        lr = self.optimizer.param_groups[0]["lr"]
        start = time.perf_counter()
        # Positions stay on the CPU until the images are read: it would wait for the device to give them back.
        for index in ahead(self.batches(), self.split.train_images):
            with self.tracer.step():
                stats = self.train_step(index)
            for name, value in stats.items():
                sums[name] = sums[name] + value.float() if name in sums else value.float()
            progress.update(self.config.batch_size)
        found = self.processes.mean(torch.stack([value.double() for value in sums.values()]) / self.steps_per_epoch)
        means = dict(zip(sums, found.tolist(), strict=True))  # waits for the device
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.epoch += 1
        row = {"epoch": self.epoch, "step": self.step, **means, "lr": lr}
        row["images_per_second"] = self.steps_per_epoch * self.config.batch_size / seconds
        last = self.epoch == self.config.epochs
        if self.processes.first and (last or self.epoch % self.config.evaluate_every == 0):
            row["few_nearest_neighbour"] = few_nearest_neighbour(self.features())
        return row

    def features(self) -> Features:
        return encode(self.encoder, self.split, self.config.view_size)

    def state(self) -> dict[str, Any]:
        """Of all processes, which all call this."""
        collect = self.processes.collect
        loss = {name: value.cpu() for name, value in self.loss.state_dict().items()}
        generators = [self.order_generator, self.view_generator]
        return {
            "settings": self.config.settings(),
            "job": self.processes.job,
            "epoch": self.epoch,
            "step": self.step,
            "encoder": self.encoder.state_dict(),
            # Replicated state once, else by rank.
            "losses": collect(loss) if self.config.gathers == "none" else [loss],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sampler": None if self.sampler is None else self.sampler.state_dict(),
            "generators": [generator.get_state() for generator in generators],
            "again_generators": collect(self.again_generator.get_state()),
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
        # Of this run's schedule: with another number of epochs it is not the one that the checkpoint was on its way by.
        for group, peak in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = peak * self.schedule(self.step)
        self.scaler.load_state_dict(state["scaler"])
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
    own = config.own_options("method", "sampler", "proposals")
    own = {name: value for name, value in own.items() if value is not None}
    if own.pop("coupled", False):
        own["decoupled"] = False
    options = {name: value for name, value in common.items() if name in takes} | own
    if config.method == "cached" or options.get("carry") == "recompute":
        options["encode"] = encode_again
    return losses.get(config.method, **options)


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state that was saved at `path`, on the CPU, by a run with these `settings`; its number of epochs may be
    another, if no fewer than it has behind it."""
    state = load(path)
    missing = [field for field in FIELDS if not (isinstance(state, dict) and field in state)]
    if missing:
        raise CheckpointError(f"{path}: expected a checkpoint with the fields {', '.join(FIELDS)}; {missing} missing")
    differences = _differences(state["settings"] | {"epochs": settings["epochs"]}, settings)
    if differences:
        remedy = "give the options of that run, or another --out for a new one"
        raise CheckpointError(f"{path}: the checkpoint is of a run with other options: {differences}; {remedy}")
    if settings["epochs"] < state["epoch"]:
        least = f"at least the {state['epoch']} that the run in {path} has behind it"
        raise CheckpointError(f"--epochs: expected {least}, got {settings['epochs']}")
    return state


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return ", ".join(f"{name} was {found.get(name)!r} and is {expected.get(name)!r} now" for name in names)
