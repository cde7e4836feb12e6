"""The settings of a run: defaults, checks, command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from data import DATASETS
from processes import Processes

from emc2_kernels.batching import SCOPES
from emc2_kernels.distributed import GATHERS

# Of the losses that losses.get knows, those for two views of one modality.
METHODS = ("emc2", "simclr", "sogclr", "isogclr", "cached")
CARRIES = ("auto", "cached", "corrected", "two_sided", "recompute", "drop")
PROPOSALS = ("batch", "bank")
ESTIMATORS = ("states", "recycled")
VIEWS = ("one", "both")
BATCHINGS = ("shuffle", "gcbs")
# Options that mean something with some values of another option only. Where that is the method, their names are those
# of the loss's arguments; where it is the batching, the sampler's.
ONLY_WITH = {
    "proposals": ("method", ("emc2",)),
    "estimator": ("method", ("emc2",)),
    "burn_in": ("method", ("emc2",)),
    "carry": ("method", ("emc2", "cached")),
    "views": ("method", ("emc2",)),
    "gamma": ("method", ("sogclr", "isogclr")),
    "rho": ("method", ("isogclr",)),
    "refresh": ("method", ("cached",)),
    "num_samples": ("method", ("cached",)),
    "quantile": ("batching", ("gcbs",)),
    "scope": ("batching", ("gcbs",)),
}


@dataclass(frozen=True)
class Config:
    """Defaults are one reasonable setting for all methods, tuned for none. `out` None: see `directory`."""

    data: str = "digits"
    method: str = "emc2"
    batch_size: int = 32
    epochs: int = 30
    lr: float = 1e-3
    weight_decay: float = 1e-4
    temperature: float = 0.2
    dim: int = 64
    burn_in: float = 0.5
    proposals: str = "batch"
    estimator: str = "states"
    carry: str = "auto"
    views: str = "one"
    gamma: float = 0.9
    rho: float = 1.0
    refresh: float = 0.01
    num_samples: int = 1
    batching: str = "shuffle"
    quantile: float = 0.99
    scope: str = "global"
    gather: str = "auto"
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    out: str | None = None
    resume: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        expect_one_of("data", self.data, tuple(DATASETS))
        expect_one_of("method", self.method, METHODS)
        expect_one_of("proposals", self.proposals, PROPOSALS)
        expect_one_of("estimator", self.estimator, ESTIMATORS)
        expect_one_of("carry", self.carry, CARRIES)
        expect_one_of("views", self.views, VIEWS)
        expect_one_of("batching", self.batching, BATCHINGS)
        expect_one_of("scope", self.scope, SCOPES)
        expect_one_of("gather", self.gather, ("auto", *GATHERS))
        expect_one_of("device", self.device, ("auto", "cpu", "cuda"))
        expect("batch_size", self.batch_size, "an integer of at least 2", self.batch_size >= 2)
        expect("epochs", self.epochs, "an integer of at least 1", self.epochs >= 1)
        expect("lr", self.lr, "a finite number above 0", math.isfinite(self.lr) and self.lr > 0)
        decay = self.weight_decay
        expect("weight_decay", decay, "a finite number of at least 0", math.isfinite(decay) and decay >= 0)
        heat = self.temperature
        expect("temperature", heat, "a finite number above 0", math.isfinite(heat) and heat > 0)
        expect("dim", self.dim, "an integer of at least 2", self.dim >= 2)
        expect("burn_in", self.burn_in, "a share from 0 to below 1", 0 <= self.burn_in < 1)
        expect("gamma", self.gamma, "a share above 0, up to 1", 0 < self.gamma <= 1)
        expect("rho", self.rho, "a finite number of at least 0", math.isfinite(self.rho) and self.rho >= 0)
        expect("refresh", self.refresh, "a share from 0 to 1", 0 <= self.refresh <= 1)
        expect("num_samples", self.num_samples, "an integer of at least 1", self.num_samples >= 1)
        expect("quantile", self.quantile, "a share from 0 to below 1", 0 <= self.quantile < 1)
        if (self.method, self.proposals, self.batching) == ("emc2", "batch", "gcbs"):
            uniform = "shuffle, as chains take the batch for uniform draws with --method emc2 --proposals batch"
            raise ValueError(f"--batching: expected {uniform}, got gcbs: add --proposals bank")
        expect("seed", self.seed, "an integer from 0 to below 2**63", 0 <= self.seed < 2**63)
        expect("threads", self.threads, "an integer of at least 1", self.threads >= 1)
        self._check_processes()
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"--out: expected a directory, or a new name, got the file {self.directory}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: expected cpu or auto, as PyTorch finds no CUDA device here, got cuda")

    def _check_processes(self) -> None:
        processes = Processes.launched()
        if processes.count == 1:
            one = "auto or none with one process; torchrun starts several"
            expect("gather", self.gather, one, self.gather in ("auto", "none"))
            return
        each = f"2 images for each of the {processes.count} processes"
        expect("batch_size", self.batch_size, f"at least {each}", self.batch_size >= 2 * processes.count)
        if self.batching == "gcbs":
            multiple = f"a multiple of the {processes.count} processes with --batching gcbs"
            expect("batch_size", self.batch_size, multiple, self.batch_size % processes.count == 0)
        gpus = torch.cuda.device_count()
        if self.torch_device.type == "cuda" and processes.local_count > gpus:
            raise ValueError(f"--device: expected cpu, or a GPU for each process, got {self.device} with {gpus} GPUs")

    @property
    def directory(self) -> Path:
        chosen = "" if self.batching == "shuffle" else f"-{self.batching}"
        return Path(self.out or f"runs/{self.data}-{self.method}{chosen}-b{self.batch_size}")

    @property
    def torch_device(self) -> torch.device:
        cuda = torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"
        return torch.device("cuda", Processes.launched().local_rank) if cuda else torch.device("cpu")

    @property
    def gathers(self) -> str:
        """The loss's argument."""
        if self.gather == "auto":
            return "all" if Processes.launched().count > 1 else "none"
        return self.gather

    def own_options(self, *settings: str) -> dict[str, Any]:
        """Those that mean something with this run's method and batching, or with those of the two that are named."""
        return {
            name: getattr(self, name)
            for name, (setting, values) in ONLY_WITH.items()
            if getattr(self, setting) in values and setting in (settings or (setting,))
        }

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that it continues."""
        settings = asdict(self)
        for name in ("out", "resume", "quiet"):
            del settings[name]
        for name in ONLY_WITH:
            del settings[name]
        settings |= self.own_options()
        # The state of a random generator cannot move to another kind of device.
        settings["device"] = self.torch_device.type
        settings |= {"gather": self.gathers, "processes": Processes.launched().count}
        return settings


def expect(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, got {value!r}")


def expect_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    expect(name, value, "one of " + ", ".join(choices), value in choices)


HELP = {
    "data": f"data set to pre-train on: {', '.join(DATASETS)}; nothing is downloaded",
    "method": "loss: emc2 (negatives sampled from the whole data set), simclr (NT-Xent, the batch's negatives), sogclr "
    "(the batch's, weighted by each image's running denominator), isogclr (that, and a temperature learned for each "
    "image) or cached (sampled from a cache of embeddings)",
    "batch_size": "images per step, of all processes together; each is encoded twice",
    "epochs": "passes over the training images",
    "lr": "peak learning rate of AdamW: linear warm-up over a tenth of the steps, then cosine to 0",
    "weight_decay": "weight decay of AdamW",
    "temperature": "similarities are divided by this",
    "dim": "size of the projections",
    "burn_in": "emc2 only: share of a visit's proposals that give no sample",
    "proposals": "emc2 only: what is proposed to the chains, the batch or draws from the bank of all embeddings",
    "estimator": "emc2 only: chains' states, or recycled, which also counts what was rejected",
    "carry": "emc2 and cached only: what stands for samples outside the batch, see EMC2Loss; auto is the loss's choice",
    "views": "emc2 only: views of an image that are proposed, one or both (both is the paper's choice, biased)",
    "gamma": "sogclr and isogclr only: weight of the present batch in an image's running denominator",
    "rho": "isogclr only: divergence of the negatives' weights from uniform ones (nats) that temperatures settle at",
    "refresh": "cached only: share of the cache that is encoded again at each step",
    "num_samples": "cached only: negatives drawn for each anchor",
    "batching": "shuffle (uniform batches), or gcbs (batches of alike images, chosen before each epoch but the first); "
    "not with emc2 and proposals from the batch",
    "quantile": "gcbs only: similarities from this quantile on up join two images",
    "scope": "gcbs only: the quantile of all similarities (global) or of each image's own (row)",
    "gather": "negatives and proposals of several processes (torchrun): none (each its own), all (those of all, "
    "gathered), ring (those of all, one process's at a time; simclr, and emc2 with proposals from the batch); "
    "auto is all, with one process none",
    "seed": "names the initial weights, the batches, the augmentations and the chains",
    "device": "auto, cpu or cuda; auto takes the GPU if there is one",
    "threads": "CPU threads of PyTorch; this model is too small for a second one to pay",
    "out": "directory of the checkpoint, metrics.csv and curves.png; without --resume its files are overwritten",
    "resume": "continue from the checkpoint in --out; the result is that of an uninterrupted run. Processes that "
    "torchrun has started again do so by themselves",
    "quiet": "no progress bar",
}

UNSET = {
    "out": "runs/DATA-METHOD-bBATCH_SIZE, or runs/DATA-METHOD-gcbs-bBATCH_SIZE",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(description="Contrastive pre-training of a small convolutional encoder.")
    for field in fields(Config):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=HELP[field.name])
            continue
        default = UNSET[field.name] if field.default is None else field.default
        kind = str if field.default is None else type(field.default)
        help_text = f"{HELP[field.name]} (default: {default})"
        # Suppressed, so that what was not given is told apart from what was: the defaults live in Config.
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=help_text, metavar=kind.__name__.upper())
    given = vars(parser.parse_args(arguments))
    try:
        config = Config(**given)
    except ValueError as error:
        parser.error(str(error))
    for name in ONLY_WITH.keys() & given.keys() - config.own_options().keys():
        (setting, values), flag = ONLY_WITH[name], "--" + name.replace("_", "-")
        expected = f"--{setting} {' or '.join(values)}"
        parser.error(f"{flag}: expected only with {expected}, got --{setting} {getattr(config, setting)}")
    return config
