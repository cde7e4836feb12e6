"""The settings of a run: defaults and checks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from emc2_kernels.batching import SCOPES
from emc2_kernels.distributed.shards import GATHERS
from emc2_kernels.losses.emc2 import NUM_DRAWS
from emc2_kernels.losses.emc2_options import BURN_IN, resolved_sampler
from examples.pretrain.data import CHOICES, READERS, is_known, view_size
from examples.pretrain.encoders import ENCODERS, NORMS, STEMS
from examples.pretrain.evaluate import PROBES
from examples.pretrain.optimizers import OPTIMIZERS
from examples.pretrain.processes import Processes

# Of the losses that losses.get knows, those for two views of one modality.
METHODS = ("emc2", "simclr", "sogclr", "isogclr", "cached")
CARRIES = ("auto", "cached", "corrected", "recompute")
PROPOSALS = ("batch", "bank")
SAMPLERS = ("auto", "isir", "mh")
VIEWS = ("auto", "one", "both")
BATCHINGS = ("shuffle", "gcbs")
AMP = ("none", "bfloat16", "float16")
# Options that mean something with some values of another option only. Where that is the method, the sampler or the
# proposals, their names are those of the loss's arguments, and coupled is decoupled=False; where it is the batching,
# those of the batches' sampler. Of --data, what is in front of the path counts.
ONLY_WITH = {
    "sampler": ("method", ("emc2",)),
    "proposals": ("sampler", ("auto", "mh")),
    "burn_in": ("sampler", ("auto", "mh")),
    "queue": ("sampler", ("auto", "isir")),
    "coupled": ("sampler", ("auto", "isir")),
    "carry": ("method", ("emc2", "cached")),
    "views": ("method", ("emc2",)),
    "gamma": ("method", ("sogclr", "isogclr")),
    "rho": ("method", ("isogclr",)),
    "refresh": ("method", ("cached",)),
    "num_samples": ("method", ("emc2", "cached")),
    "num_proposals": ("proposals", ("bank",)),
    "quantile": ("batching", ("gcbs",)),
    "scope": ("batching", ("gcbs",)),
    "image_size": ("data", tuple(READERS)),
    "jitter": ("data", tuple(READERS)),
    "blur": ("data", tuple(READERS)),
    "stem": ("encoder", ENCODERS[1:]),
    "momentum": ("optimizer", ("sgd", "lars")),
}
# What may differ between a run and the one that it continues.
FREE = ("out", "resume", "quiet", "workers", "tensorboard", "profile")


@dataclass(frozen=True)
class Config:
    """Defaults are one reasonable setting for all methods, tuned for none. `out` None: see `directory`."""

    data: str = "digits"
    subset: int | None = None
    image_size: int | None = None
    augmentations: int = 0
    jitter: float = 0.5
    blur: float = 0.0
    encoder: str = "small"
    stem: str = "imagenet"
    norm: str = "group"
    projector_hidden: int | None = None
    dim: int = 64
    method: str = "emc2"
    batch_size: int = 32
    epochs: int = 30
    optimizer: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float | None = None
    clip_grad: float | None = None
    amp: str = "none"
    temperature: float = 0.2
    sampler: str = "auto"
    burn_in: float | None = None
    proposals: str = "batch"
    queue: int | None = None
    coupled: bool = False
    carry: str = "auto"
    views: str = "auto"
    gamma: float = 0.9
    rho: float = 1.0
    refresh: float = 0.01
    num_samples: int | None = None
    num_proposals: int | None = None
    batching: str = "shuffle"
    quantile: float = 0.99
    scope: str = "global"
    gather: str = "auto"
    probe: str = "auto"
    evaluate_every: int = 1
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    workers: int = 2
    out: str | None = None
    resume: bool = False
    quiet: bool = False
    tensorboard: bool = False
    profile: int = 0

    def __post_init__(self) -> None:
        expect("data", self.data, "one of " + ", ".join(CHOICES), is_known(self.data))
        self._check_choices()
        self._check_training()
        self._check_method()
        self._check_processes()
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"--out: expected a directory, or a new name, got the file {self.directory}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: expected cpu or auto, as PyTorch finds no CUDA device here, got cuda")

    def _check_choices(self) -> None:
        expect_choice("method", self.method, METHODS)
        expect_choice("sampler", self.sampler, SAMPLERS)
        expect_choice("proposals", self.proposals, PROPOSALS)
        expect_choice("carry", self.carry, CARRIES)
        expect_choice("views", self.views, VIEWS)
        expect_choice("batching", self.batching, BATCHINGS)
        expect_choice("scope", self.scope, SCOPES)
        expect_choice("gather", self.gather, ("auto", *GATHERS))
        expect_choice("device", self.device, ("auto", "cpu", "cuda"))
        expect_choice("encoder", self.encoder, ENCODERS)
        expect_choice("stem", self.stem, STEMS)
        expect_choice("norm", self.norm, NORMS)
        expect_choice("optimizer", self.optimizer, OPTIMIZERS)
        expect_choice("amp", self.amp, AMP)
        expect_choice("probe", self.probe, PROBES)

    def _check_training(self) -> None:
        """Numbers that mean something with every method."""
        expect_at_least("batch_size", self.batch_size, 2)
        expect_at_least("epochs", self.epochs, 1)
        expect("lr", self.lr, "a finite number above 0", math.isfinite(self.lr) and self.lr > 0)
        decay = self.weight_decay
        expect("weight_decay", decay, "a finite number of at least 0", math.isfinite(decay) and decay >= 0)
        heat = self.temperature
        expect("temperature", heat, "a finite number above 0", math.isfinite(heat) and heat > 0)
        expect_at_least("dim", self.dim, 2)
        expect("momentum", self.momentum, "a share from 0 to below 1", 0 <= self.momentum < 1)
        warmup = 0 if self.warmup_epochs is None else self.warmup_epochs
        expect("warmup_epochs", warmup, f"from 0 to the {self.epochs} epochs", 0 <= warmup <= self.epochs)
        clip = 1 if self.clip_grad is None else self.clip_grad
        expect("clip_grad", clip, "a finite norm above 0", math.isfinite(clip) and clip > 0)
        expect("jitter", self.jitter, "a strength from 0 to 2", 0 <= self.jitter <= 2)
        expect("blur", self.blur, "a share from 0 to 1", 0 <= self.blur <= 1)
        fixed = self.augmentations
        expect("augmentations", fixed, "0 (fresh ones at each visit) or at least 2", fixed == 0 or fixed >= 2)
        expect_at_least("subset", 2 if self.subset is None else self.subset, 2)
        expect_at_least("image_size", 8 if self.image_size is None else self.image_size, 8)
        expect_at_least("projector_hidden", 1 if self.projector_hidden is None else self.projector_hidden, 1)
        expect_at_least("evaluate_every", self.evaluate_every, 1)
        expect("seed", self.seed, "an integer from 0 to below 2**63", 0 <= self.seed < 2**63)
        expect_at_least("threads", self.threads, 1)
        expect_at_least("workers", self.workers, 1)
        expect_at_least("profile", self.profile, 0)

    def _check_method(self) -> None:
        """Numbers that mean something with some methods or batchings."""
        expect("burn_in", self.burn_in, "a share from 0 to below 1", 0 <= (self.burn_in or 0) < 1)
        expect("gamma", self.gamma, "a share above 0, up to 1", 0 < self.gamma <= 1)
        expect("rho", self.rho, "a finite number of at least 0", math.isfinite(self.rho) and self.rho >= 0)
        expect("refresh", self.refresh, "a share from 0 to 1", 0 <= self.refresh <= 1)
        expect_at_least("queue", self.queue or 0, 0)
        walk = "--sampler mh, which --proposals bank, --burn-in and --num-samples mean"
        if self.queue and (self.carry == "recompute" or self.walks):
            raise ValueError(f"--queue: expected 0 with --carry recompute and with {walk}, got {self.queue}")
        if self.coupled and self.walks:
            raise ValueError(f"--coupled: expected only without {walk}")
        expect_at_least("num_proposals", 1 if self.num_proposals is None else self.num_proposals, 1)
        if self.unmet("carry") is None:
            kept = "cached" if (self.method, self.proposals) == ("emc2", "batch") else "corrected"
            setting = f"--proposals {self.proposals}" if self.method == "emc2" else f"--method {self.method}"
            possible = ("auto", kept, "recompute")
            expect("carry", self.carry, f"one of {', '.join(possible)} with {setting}", self.carry in possible)
        self._check_samples()
        expect("quantile", self.quantile, "a share from 0 to below 1", 0 <= self.quantile < 1)
        if (self.method, self.proposals, self.batching) == ("emc2", "batch", "gcbs"):
            uniform = "shuffle, as chains take the batch for uniform draws with --method emc2 --proposals batch"
            raise ValueError(f"--batching: expected {uniform}, got gcbs: add --proposals bank")

    def _check_samples(self) -> None:
        if self.num_samples is None:
            return
        expect_at_least("num_samples", self.num_samples, 1)
        if self.method == "emc2":
            expect("num_samples", self.num_samples, "none with --sampler isir, which weighs all candidates", self.walks)
            parts = Processes.launched().count if self.gathers == "none" else 1
            keys = self.batch_size // parts * (2 if self.views == "both" else 1)
            proposals = keys if self.proposals == "batch" else self.num_proposals or NUM_DRAWS
            most = proposals - int((BURN_IN if self.burn_in is None else self.burn_in) * proposals)
            after = f"at most {most}, the {proposals} proposals after burn-in"
            expect("num_samples", self.num_samples, after, self.num_samples <= most)

    def _check_processes(self) -> None:
        processes = Processes.launched()
        if processes.count == 1:
            one = "auto or none with one process; torchrun starts several"
            expect("gather", self.gather, one, self.gather in ("auto", "none"))
            return
        if self.norm == "batch":
            # Each would take the statistics of its own part, and run ahead of the others where it encodes again.
            raise ValueError(f"--norm: expected group or none with {processes.count} processes, got batch")
        each = f"2 images for each of the {processes.count} processes"
        expect("batch_size", self.batch_size, f"at least {each}", self.batch_size >= 2 * processes.count)
        if self.batching == "gcbs":
            multiple = f"a multiple of the {processes.count} processes with --batching gcbs"
            expect("batch_size", self.batch_size, multiple, self.batch_size % processes.count == 0)
        gpus = torch.cuda.device_count()
        if self.torch_device.type == "cuda" and processes.local_count > gpus:
            raise ValueError(f"--device: expected cpu, or a GPU for each process, got {self.device} with {gpus} GPUs")

    @property
    def walks(self) -> bool:
        """Whether EMC²'s chains do, see ``EMC2Loss``."""
        return resolved_sampler(self.sampler, self.proposals, self.burn_in, self.num_samples) == "mh"

    @property
    def directory(self) -> Path:
        chosen = "" if self.batching == "shuffle" else f"-{self.batching}"
        name, _, path = self.data.partition(":")
        data = f"{name}-{Path(path).resolve().name}" if name == "folder" else name
        return Path(self.out or f"runs/{data}-{self.method}{chosen}-b{self.batch_size}")

    @property
    def warmups(self) -> float:
        """How many times the warm-up fits into the run."""
        if self.warmup_epochs is None:
            return 10
        return math.inf if self.warmup_epochs == 0 else self.epochs / self.warmup_epochs

    @property
    def view_size(self) -> int | None:
        """Side of the views; None: that of the images."""
        return view_size(self.data, self.image_size)

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
        """Those that mean something with this run's method, batching and so on, or with those of these that are
        named."""
        return {
            name: getattr(self, name)
            for name, (setting, _) in ONLY_WITH.items()
            if self.unmet(name) is None and setting in (settings or (setting,))
        }

    def unmet(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """The setting, and its values, without which this option means nothing in this run; None: it means
        something."""
        if name not in ONLY_WITH:
            return None
        setting, values = ONLY_WITH[name]
        met = getattr(self, setting).partition(":")[0] in values
        return self.unmet(setting) or (None if met else (setting, values))

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that it continues."""
        settings = asdict(self)
        for name in FREE:
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


def expect_at_least(name: str, value: int, least: int) -> None:
    expect(name, value, f"an integer of at least {least}", value >= least)


def expect_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    expect(name, value, "one of " + ", ".join(choices), value in choices)
