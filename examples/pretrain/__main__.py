"""Pre-trains an image encoder with a contrastive loss and says what its features are worth.

python -m examples.pretrain --data digits --method emc2
python -m examples.pretrain --config examples/pretrain/configs/stl10.yaml --data stl10:PATH
torchrun --standalone --nproc-per-node 2 -m examples.pretrain --data digits --method emc2

There is a flag for every setting, and there are files of settings.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn, get_type_hints

from jsonargparse import ArgumentParser

from emc2_kernels.checkpoint import CheckpointError
from examples.pretrain.config import ONLY_WITH, Config
from examples.pretrain.data import CHOICES
from examples.pretrain.encoders import ENCODERS
from examples.pretrain.evaluate import FEW_LABELS, LOGISTIC_IMAGES
from examples.pretrain.optimizers import OPTIMIZERS
from examples.pretrain.processes import LostProcess, Processes
from examples.pretrain.tracing import SKIPPED
from examples.pretrain.training import CHECKPOINT, Results, train

HELP = {
    "data": f"data set to pre-train on: {', '.join(CHOICES)}; PATH is a directory, for stl10 with the official binary "
    "files, for folder with train/CLASS/FILE and val/CLASS/FILE or test/CLASS/FILE; nothing is downloaded",
    "subset": "train on this many images, the same ones in every run, labelled ones first",
    "image_size": "stl10 and folder only: side of the views in pixels",
    "augmentations": "views of an image that are drawn once, for the whole run; 0: fresh ones at each visit",
    "jitter": "stl10 and folder only: strength of the colour jitter, SimCLR's s (0.5 for CIFAR, 1 for ImageNet)",
    "blur": "stl10 and folder only: share of the views that are blurred (SimCLR: 0 for CIFAR, 0.5 for ImageNet)",
    "encoder": f"backbone: {', '.join(ENCODERS)}",
    "stem": "resnet18 and resnet50 only: imagenet (7 x 7, stride 2, max-pooling) or cifar (3 x 3, for small images)",
    "norm": "group, none, or batch, which makes an image's embedding depend on its batch (one process only)",
    "projector_hidden": "width of the projector between features and projections",
    "dim": "size of the projections",
    "method": "loss: emc2 (negatives sampled from the whole data set), simclr (NT-Xent, the batch's negatives), sogclr "
    "(the batch's, weighted by each image's running denominator), isogclr (that, and a temperature learned for each "
    "image) or cached (sampled from a cache of embeddings)",
    "batch_size": "images per step, of all processes together; each is encoded twice",
    "epochs": "passes over the training images. With --resume it may be another number than before: the learning rate "
    "then goes on by the schedule of this number, so that of a run that was at its end, 0, rises again",
    "optimizer": f"one of {', '.join(OPTIMIZERS)}; lars leaves biases and norms out of decay and scaling",
    "lr": "peak learning rate: linear warm-up times a cosine to 0",
    "momentum": "sgd and lars only",
    "weight_decay": "weight decay of the optimizer",
    "warmup_epochs": "epochs of the warm-up; 0: none",
    "clip_grad": "gradients are scaled down to this norm where theirs is above it",
    "amp": "precision of PyTorch's autocast for the encoder: bfloat16, float16 (gradients are scaled then), or none",
    "temperature": "similarities are divided by this",
    "sampler": "emc2 only: what moves the chains, importance resampling among all candidates (isir) or the paper's "
    "Metropolis-Hastings walk (mh); auto is isir, and mh where an option of the walk is given",
    "burn_in": "emc2's walk only: share of a visit's proposals that give no sample",
    "queue": "emc2 with --sampler isir only: images of the latest batches whose kept embeddings are negatives as well",
    "coupled": "emc2 with --sampler isir only: the positive is a term of the denominator, as it is in simclr's loss",
    "proposals": "emc2's walk only: what is proposed to the chains, the batch or draws from the bank of all embeddings",
    "carry": "emc2 and cached only: what stands for samples outside the batch: kept embeddings (cached for emc2 with "
    "proposals from the batch, else corrected), or new encodings (recompute); auto is the kept ones",
    "views": "emc2 only: views of an image that are negatives, one or both (both is the paper's choice, biased with "
    "its walk); auto is one with the walk",
    "gamma": "sogclr and isogclr only: weight of the present batch in an image's running denominator",
    "rho": "isogclr only: divergence of the negatives' weights from uniform ones (nats) that temperatures settle at",
    "refresh": "cached only: share of the cache that is encoded again at each step",
    "num_samples": "emc2 and cached only: negatives of an anchor and step",
    "num_proposals": "emc2 with proposals from the bank only: proposals of an anchor and step",
    "batching": "shuffle (uniform batches), or gcbs (batches of alike images, chosen before each epoch but the first); "
    "not with emc2 and proposals from the batch",
    "quantile": "gcbs only: similarities from this quantile on up join two images",
    "scope": "gcbs only: the quantile of all similarities (global) or of each image's own (row)",
    "gather": "negatives and proposals of several processes (torchrun): none (each its own), all (those of all, "
    "gathered), ring (those of all, one process's at a time; simclr, and emc2 with proposals from the batch); "
    "auto is all, with one process none",
    "probe": "linear probe with all labels: logistic (regression), sgd (the EMC² paper's), or auto: logistic up to "
    f"{LOGISTIC_IMAGES:,} labelled images",
    "evaluate_every": "epochs between evaluations of 1-NN with few labels; the last epoch always has one",
    "seed": "names the initial weights, the batches, the augmentations and the chains",
    "device": "auto, cpu or cuda; auto takes the GPU if there is one",
    "threads": "CPU threads of PyTorch; the small encoder is too small for a second one to pay",
    "workers": "threads that read and decode images on disk",
    "out": "directory of the checkpoint, metrics.csv and curves.png; without --resume its files are overwritten",
    "resume": "continue from the checkpoint in --out, with the same options but for --epochs; the result is that of an "
    "uninterrupted run. Processes that torchrun has started again do so by themselves",
    "quiet": "no progress bar",
    "tensorboard": "also write metrics.csv's columns for TensorBoard, into --out (needs the package tensorboard)",
    "profile": "steps that torch.profiler traces into trace.json, in --out, from the third of this start on",
}

UNSET = {
    "out": "runs/DATA-METHOD-bBATCH_SIZE, or runs/DATA-METHOD-gcbs-bBATCH_SIZE",
    "subset": "all",
    "image_size": "96 for stl10, 224 for folder",
    "projector_hidden": "as many as the backbone's features",
    "warmup_epochs": "a tenth of the epochs",
    "clip_grad": "no limit",
    "num_samples": "16; emc2 with proposals from the batch: as many as it has after burn-in, up to 16",
    "num_proposals": "64",
    "queue": "16, and 0 with --carry recompute",
    "burn_in": "0.5",
}


KINDS = {"int": "an integer", "float": "a number", "str": "a text"}
# What jsonargparse says of a value, with and without None as an alternative.
WRONG_TYPE = r"(?:Expected a |Does not validate .* Subtypes: \[)<class '(int|float|str)'>.*(?:Got|Given) value: (.*)"


class Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Names the flag, also where a file of settings is meant, and prints no usage: it would be a page."""
        message = " ".join(message.split())
        message = re.sub(r'Parser key "(\w+)": ', lambda found: f"{_flag(found[1])}: ", message)
        message = re.sub(r"Option '(.+)' is not accepted", r"--config: expected names of settings, got '\1'", message)
        message = re.sub(r"^(Unexpected config|Problems parsing config)", r"--config: \1", message)
        message = re.sub(WRONG_TYPE, lambda found: f"expected {KINDS[found[1]]}, got {found[2]!r}", message)
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        raise SystemExit(2)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """What is given on the command line stands over what --config's file says, and that over the defaults.

    An option that means nothing with this run is an error on the command line; a file may hold it, so that it can be
    used with several methods.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="python -m examples.pretrain", description="Contrastive pre-training of an image encoder.")
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of settings, named like the flags")
    kinds = get_type_hints(Config)
    for field in fields(Config):
        # Suppressed, so that what was not given is told apart from what was: the defaults live in Config.
        options = {"default": argparse.SUPPRESS, "help": HELP[field.name]}
        if isinstance(field.default, bool):
            parser.add_argument(_flag(field.name), action="store_true", **options)
            continue
        options["help"] += f" (default: {UNSET[field.name] if field.default is None else field.default})"
        parser.add_argument(_flag(field.name), type=kinds[field.name], metavar="VALUE", **options)
    given = vars(parser.parse_args(arguments))
    del given["config"]
    for name, value in given.items():
        if kinds[name] is bool and not isinstance(value, bool):  # a file can say anything
            parser.error(f"{_flag(name)}: expected true or false, got {value!r}")
    try:
        config = Config(**given)
    except ValueError as error:
        parser.error(str(error))
    flags = {argument.partition("=")[0] for argument in arguments}
    for name in ONLY_WITH:
        unmet = config.unmet(name)
        if unmet is not None and _flag(name) in flags:
            setting, values = unmet
            got = f"{_flag(setting)} {getattr(config, setting)}"
            parser.error(f"{_flag(name)}: expected only with {_flag(setting)} {' or '.join(values)}, got {got}")
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    processes, stderr = Processes.launched(), sys.stderr
    with processes.silence_others():
        config = parse_arguments(arguments)
        try:
            results = train(config)
        except KeyboardInterrupt:
            print(f"\ninterrupted; {config.directory / CHECKPOINT} holds the last whole epoch: add --resume to go on")
            return 130
        except (CheckpointError, FloatingPointError, ImportError, LostProcess, OSError, ValueError) as error:
            # Whichever process it is: the others may only see that it is gone.
            stderr.write(f"pretrain: error: {processes.name}{error}\n")
            return 2
        if results is not None:
            report(config, results)
    return 0


def report(config: Config, results: Results) -> None:
    found = results.accuracy
    print(f"{config.method}: {results.steps} steps of {config.batch_size} images, {results.seconds:.1f} s of training")
    print("accuracy on held-out images     linear probe    1-NN   10-NN")
    every = (found.linear_probe, found.nearest_neighbour, found.ten_nearest_neighbours)
    print(f"  all training labels           {every[0]:12.1%}  {every[1]:6.1%}  {every[2]:6.1%}")
    print(
        f"  {FEW_LABELS} labels a class             {found.few_linear_probe:12.1%}  {found.few_nearest_neighbour:6.1%}"
    )
    if config.profile:
        print(results.traced or f"no trace: fewer than {config.profile + SKIPPED} steps were left")
    print("written: " + ", ".join(str(path) for path in results.paths))


if __name__ == "__main__":
    sys.exit(main())
